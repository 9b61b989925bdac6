"""The effect of single hyper-parameters: ablations paired with their arm, and runs over a few settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.comparison import Interval, contrast
from analysis.guards import INCIDENTAL, TIMING, flat_config, is_under
from analysis.runs import Origin, RecordedRun, flatten
from analysis.trials import Study, short
from analysis.wallclock import training_seconds

LEVEL = 0.95  # of the intervals, which are exploratory: not corrected for the number of ablations
GRID = ("optimizer.betas", "optimizer.gamma")
REFRESH = ("optimizer.hessian_interval",)


@dataclass(frozen=True)
class Ablation:
    """An ablation at one horizon compared with its arm, at their common seeds."""

    arm: str
    of: str
    model: str
    horizon: int
    setting: str  # what it varies: "estimator=hutchinson"
    mean: float  # final validation loss, nats; NaN if a run diverged
    differences: tuple[float, ...]  # from the arm's, per seed, nats; empty if a run diverged or no seed is common
    interval: Interval | None  # of the mean difference, 95 %; None for a single seed
    time_ratio: float  # seconds per step divided by the arm's
    diverged: int
    runs: int
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class Grid:
    """Mean final loss (nats) of Sophia over γ (rows) and β2 (columns), all else equal; NaN without a run."""

    gammas: tuple[float, ...]
    betas: tuple[float, ...]
    losses: np.ndarray[Any, np.dtype[np.float64]]
    runs: tuple[RecordedRun, ...]


def settings(run: RecordedRun) -> dict[str, Any]:
    """Return the configuration values that determine a run's losses, by dotted key, without the seed."""
    ignored = (*INCIDENTAL, *TIMING, "seed", "seeds")
    return {key: value for key, value in flat_config(run).items() if not is_under(key, ignored)}


def ablations(study: Study) -> list[Ablation]:
    """Return every ablation with finished runs, in the study's order."""
    found = []
    for name in study.arm_names("ablation"):
        arm = study.arms[name]
        for model in study.models:
            base = {end.horizon: end for end in study.endpoints(arm.of or "", model)}
            for end in study.endpoints(name, model):
                varied, plain = (
                    [run for run in study.runs(arm=one, model=model) if run.horizon == end.horizon]
                    for one in (name, arm.of or "")
                )
                paired = contrast(end, base[end.horizon], LEVEL) if end.horizon in base else "no runs of the arm"
                found.append(
                    Ablation(
                        arm=name,
                        of=arm.of or "",
                        model=model,
                        horizon=end.horizon,
                        setting=_setting(varied[0], arm.varies) or name,
                        mean=end.mean,
                        differences=() if isinstance(paired, str) else tuple(paired.differences.tolist()),
                        interval=None if isinstance(paired, str) else paired.interval,
                        time_ratio=_per_step(varied) / _per_step(plain),
                        diverged=len(end.diverged),
                        runs=len(end.seeds),
                        origins=end.runs,
                    )
                )
    return found


def sensitivity_grid(study: Study) -> Grid | None:
    """Return the grid of the runs found by `comparable_runs`; None for fewer than two γ or two β2."""
    group = comparable_runs(study, GRID)
    cells: dict[tuple[float, float], list[float]] = {}
    for run in group:
        optimizer = run.config["optimizer"]
        cells.setdefault((float(optimizer["gamma"]), float(optimizer["betas"][1])), []).append(run.final_val_loss)
    gammas, betas = (tuple(sorted(set(values))) for values in zip(*cells, strict=True)) if cells else ((), ())
    if len(gammas) < 2 or len(betas) < 2:
        return None
    losses = np.array([[np.mean(cells.get((gamma, beta), [math.nan])) for beta in betas] for gamma in gammas])
    return Grid(gammas, betas, losses, tuple(group))


def comparable_runs(study: Study, keys: Sequence[str]) -> list[RecordedRun]:
    """Return finished runs of Sophia of one phase that agree in all but `keys`, with the same seeds at every setting.

    Among several such groups, the one with the most settings. Of `optimizer.betas` only β2 counts as a key. If no seed
    has all settings, take the seeds with the most settings, and the settings that all of these seeds have.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for trial in (*study.reporting, *study.tuning):
        run = trial.run
        if run is None or not run.completed or not run.optimizer.startswith("sophia"):
            continue
        values = settings(run)
        if any(key not in values for key in keys):
            continue
        rest = {key: value for key, value in values.items() if key not in keys}
        if "optimizer.betas" in keys:
            rest["optimizer.betas[0]"] = values["optimizer.betas"][0]
        groups.setdefault(repr((trial.phase, sorted(rest.items()))), []).append(run)
    paired = [_at_common_seeds(runs, keys) for runs in groups.values()]
    return max(paired, key=lambda runs: len({_values(run, keys) for run in runs}), default=[])


def _at_common_seeds(runs: Sequence[RecordedRun], keys: Sequence[str]) -> list[RecordedRun]:
    found: dict[int, set[str]] = {}
    for run in runs:
        found.setdefault(run.seed, set()).add(_values(run, keys))
    most = max(map(len, found.values()))
    seeds = [seed for seed, values in found.items() if len(values) == most]
    common = set.intersection(*(found[seed] for seed in seeds))
    return [run for run in runs if run.seed in seeds and _values(run, keys) in common]


def _values(run: RecordedRun, keys: Sequence[str]) -> str:
    values = flatten(run.config)
    return repr([values[key] for key in keys])


def _per_step(runs: Sequence[RecordedRun]) -> float:
    steps = sum(run.total("steps") for run in runs)
    return sum(map(training_seconds, runs)) / steps if steps else math.nan


def _setting(run: RecordedRun, keys: Sequence[str]) -> str:
    groups = {key: group.get("name") for key, group in run.config.items() if isinstance(group, Mapping)}
    values = flatten(run.config) | groups
    return ", ".join(f"{key.removeprefix('optimizer.')}={short(values.get(key))}" for key in keys)
