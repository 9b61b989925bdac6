"""How a process of this project ends: the exit codes, and the one line of a refusal.

The shell, the launchers and schedulers read the codes. Any Python from 3.7 on reads this file.
"""

import contextlib
import json
import os
import sys
import time

EXIT_FAILED = 1
EXIT_CONFIGURATION = 2  # cannot be run as asked; one line says why
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL: the same command resumes
EXIT_RANK_LOST = 76  # EX_PROTOCOL: this rank is well, another one is gone
EXIT_HELD = 77  # another process has the run directory


def refuse(error: Exception) -> int:
    """Print one line on each node's standard error. Returns the exit code: it cannot run at all, or not now."""
    from training.config import RankRefusedError, RunHeldError
    from training.recording.terminal import printable
    from training.secrets import redacted

    line = f"error: {printable(redacted(' '.join(str(error).split())))}"
    # All ranks of a node meet the same error, unless it says that it is one rank's alone.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankRefusedError):
        print(line, file=sys.stderr, flush=True)
    # torchrun prints its own traceback for a rank that fails, and last of all what the rank leaves in this file.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError), open(file, "w") as message:
            json.dump({"message": line, "timestamp": int(time.time())}, message)
    return EXIT_HELD if isinstance(error, RunHeldError) else EXIT_CONFIGURATION
