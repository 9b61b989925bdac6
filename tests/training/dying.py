"""Ranks that act, for tests of what the others and their parent do; to be called in the process that starts the ranks."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import training.launching.ranks as launch
import training.loop as loop
from tests.training.runs import signals_of_this_run
from training.reliability.signals import STOP_SIGNALS

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


def rank_under_a_terminal_that_closes(values: dict[str, Any], codes: Any) -> int:
    """`run_rank`, but after step 5 rank 0 sends its parent SIGHUP twice, and goes on once it is told to stop."""
    reported = loop.Reporter.step

    def report(self: Any, number: int, *arguments: Any) -> None:
        reported(self, number, *arguments)
        if number == 5 and os.environ["RANK"] == "0":
            for _ in range(2):
                os.kill(os.getppid(), signal.SIGHUP)
                time.sleep(0.1)
            asked_to_stop = signals_of_this_run()
            while not asked_to_stop():
                time.sleep(0.01)

    loop.Reporter.step = report  # type: ignore[method-assign]
    return run_rank(values, codes)


def signalled_rank(values: dict[str, Any], codes: Any) -> int:
    """`run_rank`, but rank 1 alone gets SIGUSR1 after step 5."""
    reported = loop.Reporter.step

    def report(self: Any, number: int, *arguments: Any) -> None:
        reported(self, number, *arguments)
        if number == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    loop.Reporter.step = report  # type: ignore[method-assign]
    return run_rank(values, codes)


def begin_as(rank: Any) -> None:
    """Have ranks be started as this, by a process of its own session that blocks stop signals, as a worker of a sweep."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    launch.run_rank = rank
