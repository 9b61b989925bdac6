"""Wall-clock time counts only training, measured or from reference times that a noisy machine does not affect."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.runs import load_run
from analysis.trials import study_of_runs
from analysis.wallclock import reference_times, training_seconds
from tests.analysis.synthetic import write_run


def test_compilation_evaluation_and_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "r", optimizer="sophiag", steps=100, curvature_share=0.05, train_lines=False))
    assert training_seconds(run) == pytest.approx(100 * 0.05 * 1.05)
    ledger = run.summary["ledger"]  # type: ignore[index]
    assert ledger["compilation"]["seconds"] == 30.0


def test_reference_times_make_a_noisy_machine_irrelevant(tmp_path: Path) -> None:
    """The forward and backward pass is one computation under every optimizer: one measurement serves both arms."""
    quiet = {
        "adamw": load_run(write_run(tmp_path / "qa", steps=10, seconds_per_step=0.05)),
        "sophiag": load_run(write_run(tmp_path / "qs", optimizer="sophiag", steps=10, curvature_share=0.1)),
    }
    times = reference_times(quiet.items(), "test")
    noisy = load_run(
        write_run(tmp_path / "n", optimizer="sophiag", steps=40, curvature_share=0.1, seconds_per_step=0.4)
    )
    assert training_seconds(noisy) == pytest.approx(40 * 0.4 * 1.1)
    # 40 steps at 0.05 s, and 4 refreshes at what one cost on the quiet machine (0.05 · 10 · 0.1 s for its single one).
    assert times.training_seconds(noisy, "sophiag") == pytest.approx(40 * 0.05 + 4 * 0.05)
    shared = {arm: kinds["forward_backward"] for arm, kinds in times.seconds["tiny"].items()}
    assert shared["adamw"] == shared["sophiag"]


def test_an_arm_that_was_not_measured_has_no_reference_time(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", steps=10))
    times = reference_times([("adamw", run)], "test")
    assert math.isnan(times.training_seconds(run, "lion"))


def test_endpoints_have_the_reference_time_and_not_the_runs_own_clock(tmp_path: Path) -> None:
    quiet = load_run(write_run(tmp_path / "quiet", steps=10, seconds_per_step=0.05))
    slow = load_run(write_run(tmp_path / "slow", steps=40, seconds_per_step=0.5))
    study = replace(study_of_runs([slow]), reference_times=reference_times([("adamw", quiet)], "test"))
    (end,) = study.endpoints("adamw", "tiny")
    assert end.reference_seconds == pytest.approx(2.0)
