"""Stop signals at random moments lose no step; a second signal ends a run immediately."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.faults.kills import overrides_of
from tests.faults.sittings import Sitting, completed
from tests.faults.stops import stop_again_and_again, stop_torchrun, stop_twice
from tests.training.runs import summary


def test_a_signal_at_a_random_moment_is_honoured_and_no_step_is_lost(corpus: list[str], tmp_path: Path) -> None:
    found = stop_again_and_again(corpus, tmp_path, stops=2, seed=1, ranks=2)
    assert found["faults"] == []
    assert found["honoured"] == 2
    assert found["largest_difference"] <= 1e-6


def signal_in_set_up_of_rank_1() -> None:
    from tests.training.reliability.test_signals import signal_self
    from tests.training.runs import before
    from training import run

    before(run, "build_strategy", lambda: signal_self(signal.SIGTERM), lambda *_: os.environ["RANK"] == "1")


def test_a_signal_to_one_rank_before_the_first_step_ends_both_as_preempted(corpus: list[str], tmp_path: Path) -> None:
    command = overrides_of(corpus, tmp_path, "run", 12)
    sitting = Sitting(command, tmp_path / "log", ranks=2, prepare=signal_in_set_up_of_rank_1)
    assert sitting.wait() == [75, 75], sitting.said()
    assert summary(tmp_path / "run")["steps"] == 0
    completed(command, tmp_path / "log", ranks=2)


def test_a_signal_to_every_process_of_torchrun_is_one_request_and_no_step_is_lost(
    corpus: list[str], tmp_path: Path
) -> None:
    found = stop_torchrun(corpus, tmp_path, 1, seed=0)
    assert found["faults"] == []
    assert found["honoured"] == 1


def test_a_second_signal_ends_a_run_in_the_middle_of_a_step(corpus: list[str], tmp_path: Path) -> None:
    found = stop_twice(corpus, tmp_path, 2, seed=0)
    assert found["faults"] == []
