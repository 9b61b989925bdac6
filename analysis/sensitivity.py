"""The effect of single hyper-parameters: ablations paired with their arm, and runs over a few settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.comparison import Interval, paired_interval
from analysis.guards import INCIDENTAL, TIMING, is_under
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


def ablations(study: Study) -> list[Ablation]:
    """Return every ablation with finished runs, in the study's order."""
    found = []
    for name in study.arm_names("ablation"):
        arm = study.arms[name]
        for model in study.models:
            base = {end.horizon: end for end in study.endpoints(arm.of, model)} if arm.of else {}
            for end in study.endpoints(name, model):
                of = base.get(end.horizon)
                varied = {run.seed: run for run in study.runs(arm=name, model=model) if run.horizon == end.horizon}
                plain = {run.seed: run for run in study.runs(arm=arm.of, model=model) if run.horizon == end.horizon}
                lost = len(end.diverged) + (len(of.diverged) if of else 0)
                common = [seed for seed in end.seeds if of is not None and seed in of.seeds]
                differences: tuple[float, ...] = ()
                if of is not None and common and not lost:
                    differences = tuple(map(float, end.at(common).losses - of.at(common).losses))
                found.append(
                    Ablation(
                        arm=name,
                        of=arm.of or "",
                        model=model,
                        horizon=end.horizon,
                        setting=_setting(next(iter(varied.values())), arm.varies) or name,
                        mean=math.nan if end.diverged else float(end.losses.mean()),
                        differences=differences,
                        interval=paired_interval(differences, LEVEL),
                        time_ratio=_per_step(varied.values()) / _per_step(plain.values()) if plain else math.nan,
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
    gammas, betas = sorted({gamma for gamma, _ in cells}), sorted({beta for _, beta in cells})
    if len(gammas) < 2 or len(betas) < 2:
        return None
    losses = np.array([[np.mean(cells.get((gamma, beta), [math.nan])) for beta in betas] for gamma in gammas])
    return Grid(tuple(gammas), tuple(betas), losses, tuple(group))


def comparable_runs(study: Study, keys: Sequence[str], *, prefix: str = "sophia") -> list[RecordedRun]:
    """Return finished runs of one phase that agree in all but `keys`, with the same seeds at every setting.

    Among several such groups, the one with the most settings. Of `optimizer.betas` only β2 counts as a key. If no seed
    has all settings, take the seeds with the most settings, and the settings that all of these seeds have.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for trial in sorted(study.trials, key=lambda trial: trial.phase != "reporting"):
        run = trial.run
        if run is None or not run.completed or not run.optimizer.startswith(prefix):
            continue
        values = flatten(run.config)
        if any(key not in values for key in keys):
            continue
        rest = {
            key: value
            for key, value in values.items()
            if key not in keys and not is_under(key, (*INCIDENTAL, *TIMING, "seed", "seeds"))
        }
        if "optimizer.betas" in keys:
            rest["optimizer.betas[0]"] = run.config["optimizer"].get("betas", [None])[0]
        groups.setdefault(repr((trial.phase, sorted(rest.items()))), []).append(run)
    paired = [_at_common_seeds(runs, keys) for runs in groups.values()]
    return max(paired, key=lambda runs: len({_values(run, keys) for run in runs}), default=[])


def _at_common_seeds(runs: Sequence[RecordedRun], keys: Sequence[str]) -> list[RecordedRun]:
    settings: dict[int, set[str]] = {}
    for run in runs:
        settings.setdefault(run.seed, set()).add(_values(run, keys))
    most = max(map(len, settings.values()))
    seeds = [seed for seed, found in settings.items() if len(found) == most]
    common = set.intersection(*(settings[seed] for seed in seeds))
    return [run for run in runs if run.seed in seeds and _values(run, keys) in common]


def _values(run: RecordedRun, keys: Sequence[str]) -> str:
    values = flatten(run.config)
    return repr([values.get(key) for key in keys])


def _per_step(runs: Iterable[RecordedRun]) -> float:
    steps = seconds = 0.0
    for run in runs:
        steps += run.total("steps")
        seconds += training_seconds(run)
    return seconds / steps if steps else math.nan


def _setting(run: RecordedRun, keys: Sequence[str]) -> str:
    values = flatten(run.config)
    shown = []
    for key in keys:
        group = run.config.get(key)
        value = group.get("name") if isinstance(group, Mapping) else values.get(key)
        shown.append(f"{key.removeprefix('optimizer.')}={short(value)}")
    return ", ".join(shown)
