"""Exit codes, read by shells, launchers and schedulers, and the one-line message of a refusal.

This file parses on Python 3.7 and newer.
"""

import contextlib
import json
import os
import sys
import time

EXIT_FAILED = 1
EXIT_CONFIGURATION = 2  # the configuration cannot be run; one line says why
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL: rerun the same command to resume
EXIT_RANK_LOST = 76  # EX_PROTOCOL: this rank is fine, another one is gone
EXIT_HELD = 77  # another process has the run directory


def refuse(error: Exception) -> int:
    """Print one line per node on standard error. Returns the exit code.

    EXIT_HELD for a held run directory, EXIT_FAILED where the same command may succeed later, else EXIT_CONFIGURATION.
    """
    from training.config import PassingError, RankRefusedError, RanksNotMetError, RunHeldError
    from training.recording.terminal import printable
    from training.secrets import redacted

    line = f"error: {printable(redacted(' '.join(str(error).split())))}"
    # All ranks of a node raise the same error, except for RankRefusedError.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankRefusedError):
        print(line, file=sys.stderr, flush=True)
    # torchrun ends its report of a failed rank with the content of this file.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError), open(file, "w") as message:
            json.dump({"message": line, "timestamp": int(time.time())}, message)
    if isinstance(error, RunHeldError):
        return EXIT_HELD
    return EXIT_FAILED if isinstance(error, (RanksNotMetError, PassingError)) else EXIT_CONFIGURATION
