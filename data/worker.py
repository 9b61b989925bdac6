"""One process of a preparation: `python -m data.worker`, started by data/preparation.py.

A plain child process and not multiprocessing's: that would import the program that asked for the preparation, torch
and all, once more in every worker, and leave orphans when it is killed. Here the pipe closes and the worker ends.

Standard input has a JSON line with the job, then one for each unit; on standard output come lines with what was done
since the last, {"bytes", "tokens", "documents"}, and at the end of a unit {"done"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import cannot_write
from data.manifest import TokenizerInfo
from data.plan import Unit
from data.tokenise import make_shards
from data.tokenizers import open_tokenizer


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too and decides
    # The pipe is for messages alone: whatever a library prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def report(read: int, tokens: int, documents: int) -> None:
        send(bytes=read, tokens=tokens, documents=documents)

    try:
        job = json.loads(sys.stdin.readline())
        tokenizer = open_tokenizer(TokenizerInfo(**job["tokenizer"]), Path(job["directory"]))
        for line in sys.stdin:
            unit = Unit.from_json(json.loads(line))
            make_shards(unit, job, tokenizer, report)
            send(done=unit.number)
    except BrokenPipeError:
        os._exit(1)  # the parent is gone; nobody is left to tell
    except DataError as error:
        send(error=str(error))
    except OSError as error:
        send(error=str(cannot_write(error, Path(job["directory"]))))


if __name__ == "__main__":
    main()
