"""The effect of a hyper-parameter is measured on runs that agree in everything else, including seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.runs import load_run
from analysis.sensitivity import Ablation, ablations, comparable_runs, sensitivity_grid
from analysis.trials import Arm, RecordedTrial, Study
from tests.analysis.synthetic import HYPERPARAMETERS, write_run


class Writer:
    """A study of reported and tuning runs of Sophia-G, as few as a test needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trials: list[RecordedTrial] = []
        self.arms = {"sophiag": Arm("sophiag")}

    def add(self, seed: int, loss: float, *, arm: str = "sophiag", phase: Any = "reporting", **more: Any) -> None:
        config = {f"optimizer.{key}": value for key, value in more.pop("optimizer", {}).items()}
        config |= more.pop("config", {})
        options = {"steps": 20, "train_lines": False, "config": config, **more}
        path = write_run(self.directory / str(len(self.trials)), optimizer="sophiag", seed=seed, final=loss, **options)
        run = load_run(path)
        self.trials.append(RecordedTrial(arm, phase, run.model, run.horizon, seed, {}, run.origin, run))

    def vary(self, name: str, *keys: str) -> str:
        self.arms[name] = Arm(name, role="ablation", of="sophiag", varies=keys)
        return name

    def study(self) -> Study:
        return Study("small", "adamw", self.arms, self.trials, (1, 2, 3))


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def by_name(study: Study) -> dict[str, Ablation]:
    return {one.arm: one for one in ablations(study)}


def test_an_ablation_is_paired_with_its_arm_at_the_seeds_that_both_have(writer: Writer) -> None:
    for seed, loss in ((1, 3.00), (2, 3.01), (3, 3.05), (4, 9.0)):
        writer.add(seed, loss)
    name = writer.vary("k1", "optimizer.hessian_interval")
    for seed, loss in ((1, 2.98), (2, 3.00), (3, 3.02)):
        writer.add(seed, loss, arm=name, optimizer={"hessian_interval": 1}, seconds_per_step=0.1)
    one = by_name(writer.study())[name]
    assert one.setting == "hessian_interval=1"
    assert one.differences == pytest.approx((-0.02, -0.01, -0.03))
    assert one.interval is not None
    assert one.interval.estimate == pytest.approx(-0.02)
    assert one.interval.high == pytest.approx(-0.02 + 4.302653 * 0.01 / math.sqrt(3))  # t(0.975; 2)
    assert one.time_ratio == pytest.approx(2.0)


def test_one_seed_has_a_difference_and_no_interval(writer: Writer) -> None:
    writer.add(1, 3.0)
    writer.add(2, 3.1)
    writer.add(1, 3.2, arm=writer.vary("wide", "optimizer.betas", "optimizer.gamma"), optimizer={"betas": [0.96, 0.9]})
    one = by_name(writer.study())["wide"]
    assert one.differences == pytest.approx((0.2,))
    assert one.interval is None
    assert one.setting == "betas=0.96/0.9, gamma=0.05"


def test_a_diverged_ablation_has_no_difference_and_says_how_many_diverged(writer: Writer) -> None:
    name = writer.vary("no_clip", "optimizer.clip")
    for seed in (1, 2):
        writer.add(seed, 3.0)
        status = "diverged" if seed == 2 else "completed"
        writer.add(seed, 3.0, arm=name, optimizer={"clip": False}, status=status)
    one = by_name(writer.study())[name]
    assert (one.differences, one.diverged, one.runs) == ((), 1, 2)
    assert math.isnan(one.mean)
    assert one.setting == "clip=false"


def test_a_grid_uses_the_seeds_that_all_its_cells_have(writer: Writer) -> None:
    """The arm's own five seeds would set its cell apart from the others by their luck."""
    beta1 = HYPERPARAMETERS["sophiag"]["betas"][0]
    for seed in (1, 2, 3):
        writer.add(seed, 3.0 + seed)
    for gamma in (0.05, 0.1):
        for beta in (0.9, 0.99):
            if (gamma, beta) != (0.05, 0.99):
                writer.add(1, 4.0 + gamma + beta, optimizer={"gamma": gamma, "betas": [beta1, beta]})
    grid = sensitivity_grid(writer.study())
    assert grid is not None
    assert (grid.gammas, grid.betas) == ((0.05, 0.1), (0.9, 0.99))
    assert grid.losses == pytest.approx(np.array([[4.95, 4.0], [5.0, 5.09]]))
    assert {run.seed for run in grid.runs} == {1}


def test_runs_that_differ_in_anything_else_are_not_compared(writer: Writer) -> None:
    for k, changed in ((1, {}), (10, {}), (100, {"schedule.warmup_steps": 5}), (1000, {"train.grad_clip": 2.0})):
        writer.add(1, 3.0, optimizer={"hessian_interval": k}, config=changed)
    keys = ("optimizer.hessian_interval",)
    assert [run.config["optimizer"]["hessian_interval"] for run in comparable_runs(writer.study(), keys)] == [1, 10]


def test_tuning_runs_are_not_mixed_with_reported_ones(writer: Writer) -> None:
    for seed in (1, 2):
        for k in (1, 10):
            writer.add(seed, 3.0, optimizer={"hessian_interval": k})
    writer.add(100, 1.0, phase="tuning", optimizer={"hessian_interval": 10})
    study = writer.study()
    found = comparable_runs(study, ("optimizer.hessian_interval",))
    assert sorted(run.seed for run in found) == [1, 1, 2, 2]
    tuned = replace(study, trials=[trial for trial in study.trials if trial.phase == "tuning"])
    assert len(comparable_runs(tuned, ("optimizer.hessian_interval",))) == 1


def test_without_two_values_of_each_there_is_no_grid(writer: Writer) -> None:
    writer.add(1, 3.0)
    writer.add(1, 3.0, optimizer={"gamma": 0.1})
    assert sensitivity_grid(writer.study()) is None
