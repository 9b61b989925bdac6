"""A rank that dies, for tests of what the others do: `train.py` whose rank 1 kills itself."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import training.launching.ranks as launch
import training.loop as loop

run_rank = launch.run_rank


def dying_rank(values: dict[str, Any], codes: Any) -> int:
    """`run_rank`, but rank 1 is killed two steps before the end, again after each restart."""
    reported = loop.Reporter.step

    def report(self: Any, number: int, *arguments: Any) -> None:
        reported(self, number, *arguments)
        if number == self._run.config.train.steps - 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    loop.Reporter.step = report  # type: ignore[method-assign]
    return run_rank(values, codes)


if __name__ == "__main__":
    from tests.training.dying import dying_rank as importable
    from training.launching.command import main

    launch.run_rank = importable
    sys.exit(main(sys.argv[1:]))
