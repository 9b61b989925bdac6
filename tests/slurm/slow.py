"""`train.py` whose steps take a second at least until it resumes: a trial outlasts its time limit once on any machine, and costs
little."""

from __future__ import annotations

import sys
import time
from typing import Any

import training.launching.sweep as sweep
import training.loop as loop

run_trial = sweep.run_trial


def slow_trial(config: Any) -> int:
    reported = loop.Reporter.step

    def report(self: Any, *arguments: Any) -> None:
        if not self._run.saved_step:  # a resumed run starts from a checkpoint
            time.sleep(1)
        reported(self, *arguments)

    loop.Reporter.step = report  # type: ignore[method-assign]
    return run_trial(config)


if __name__ == "__main__":
    from tests.slurm.slow import slow_trial as importable
    from training.launching.command import main

    sweep.run_trial = importable
    sys.exit(main(sys.argv[1:]))
