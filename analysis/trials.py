"""Which run is what: arms, horizons, seeds and phases, from a study's index or read off the records themselves.

A study directory holds `study.json`, written by `studies`, and the run records that it names. Bare run directories do
as
well: the arms are then the optimizers, and everything counts as reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from analysis.records import Run, flatten, load_each
from analysis.speedup import Endpoints
from analysis.wallclock import ReferenceTimes, training_seconds
from training.records import CONFIG_FILE, Form, RecordError, find_runs, read_object

INDEX_FILE = "study.json"
REFERENCE_TIMES_FILE = "reference_times.json"

Phase = Literal["tuning", "reporting"]
Role = Literal["arm", "ablation"]


@dataclass(frozen=True)
class Arm:
    """One arm of a study.

    An ablation is reported like an arm but takes no part in the verdict: it inherits its hyper-parameters from the arm
    that it varies. `search` maps a configuration key ("optimizer.lr", "optimizer.betas[0]") to its search space;
    `budget` is the number of tuning trials granted where the search runs in full, `budgets` for each (model, horizon).
    """

    name: str
    role: Role = "arm"
    search: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    method: str = ""
    of: str | None = None  # the arm that an ablation varies,
    varies: tuple[str, ...] = ()  # and the keys in which it does
    budgets: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def granted(self, model: str, horizon: int) -> int | None:
        """Tuning trials on a model at a horizon; None where there is no search or nothing is known."""
        return self.budgets.get((model, horizon), self.budget)


@dataclass(frozen=True)
class Trial:
    """One run of a study. `run` is None as long as the record does not exist."""

    arm: str
    phase: Phase
    model: str
    horizon: int  # steps
    seed: int
    values: Mapping[str, Any]  # hyper-parameters that the search set, by configuration key
    directory: Path
    run: Run | None

    @property
    def status(self) -> str:
        return "missing" if self.run is None else self.run.status

    @property
    def loss(self) -> float:
        """Final validation loss in nats, NaN where there is none."""
        return float("nan") if self.run is None else self.run.final_val_loss

    @property
    def seconds(self) -> float:
        """Training seconds spent, whatever became of the run."""
        return 0.0 if self.run is None else training_seconds(self.run)

    @property
    def device_seconds(self) -> float:
        """Training seconds times the devices (ranks) that they were spent on."""
        ranks = 1 if self.run is None else int(self.run.record.environment.get("world_size") or 1)
        return self.seconds * ranks


@dataclass(frozen=True)
class Study:
    """Arms and trials, ready to be analysed."""

    name: str
    baseline: str
    arms: Mapping[str, Arm]
    trials: Sequence[Trial]
    seeds: tuple[int, ...]  # planned for reporting, fixed before any of them was run
    level: float = 0.95
    description: str = ""
    directory: Path | None = None
    reference_times: ReferenceTimes | None = None
    planned: bool = True  # False: read off bare records, so that nothing is known about plans and budgets
    finished: bool = True
    trials_at_most: int | None = None  # in all, if every search uses its budget
    damaged: tuple[str, ...] = ()  # a line about each record that is left out because it cannot be read

    @property
    def left_out(self) -> str:
        """Which records are damaged, and how: a sentence of a few, empty where none is."""
        if not self.damaged:
            return ""
        more = f"; and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
        return f"{'; '.join(self.damaged[:3])}{more}. Restore these files, or run again."

    @property
    def reporting(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.phase == "reporting"]

    @property
    def tuning(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.phase == "tuning"]

    @property
    def under_way(self) -> str:
        """How far a study is that has not ended, in a sentence; empty for one that has."""
        if self.finished:
            return ""
        done = sum(trial.run is not None for trial in self.trials)
        of = "" if self.trials_at_most is None else f" of at most {self.trials_at_most:,}"
        reported = {trial.arm for trial in self.reporting if trial.run is not None}
        models = {model for arm in self.arms.values() for model, _ in arm.budgets} - {*self.models}
        missing = sorted(models) + [
            name for name, arm in self.arms.items() if arm.role == "arm" and name not in reported
        ]
        ablations = sum(arm.role == "ablation" and name not in reported for name, arm in self.arms.items())
        missing += [f"{ablations} ablation{'s' if ablations > 1 else ''}"] if ablations else []
        text = f"The study is under way: {done:,}{of} trials are on record, and what is said here may change."
        return f"{text} Not reported yet: {', '.join(missing)}." if missing else text

    @property
    def models(self) -> list[str]:
        """Models of reported runs, smallest first."""
        sizes: dict[str, float] = {}
        for trial in self.reporting:
            if trial.run is not None:
                size = (trial.run.record.summary or {}).get("parameters") or _shape_size(trial.run)
                sizes[trial.model] = max(sizes.get(trial.model, 0.0), float(size))
        return sorted(sizes, key=lambda model: (sizes[model], model))

    def arm_names(self, role: Role = "arm") -> list[str]:
        """The baseline first, then in order of appearance; arms of the role that have reported runs."""
        present = [trial.arm for trial in self.reporting if trial.run is not None]
        names = [name for name in dict.fromkeys(present) if self.arms[name].role == role]
        return sorted(names, key=lambda name: name != self.baseline)

    def runs(self, *, arm: str | None = None, model: str | None = None, phase: Phase = "reporting") -> list[Run]:
        return [
            trial.run
            for trial in self.trials
            if trial.run is not None
            and trial.phase == phase
            and (arm is None or trial.arm == arm)
            and (model is None or trial.model == model)
        ]

    def endpoints(self, arm: str, model: str, *, times: ReferenceTimes | None = None) -> list[Endpoints]:
        """The ends of an arm's reported runs, one per horizon, ascending; runs that have not ended are left out.

        Args:
            times: count seconds by the reference-time model instead of the runs' own clocks.
        """
        cells: dict[int, dict[int, Run]] = {}
        for trial in self.reporting:
            if trial.arm != arm or trial.model != model or trial.run is None:
                continue
            if trial.status in ("completed", "diverged"):
                cells.setdefault(trial.horizon, {})[trial.seed] = trial.run
        return [_endpoints(arm, model, horizon, cells[horizon], times) for horizon in sorted(cells)]


def load_study(paths: Sequence[str | Path], *, baseline: str = "adamw", train_points: int = 400) -> Study:
    """A study directory, or any run directories (or directories that hold some).

    Raises:
        FileNotFoundError: a path does not exist, or holds neither a study nor a run.
        RecordError: the study's own files are damaged, or the record of every run is.
    """
    roots = [Path(path) for path in paths]
    if len(roots) == 1 and (roots[0] / INDEX_FILE).is_file():
        return _from_index(roots[0], train_points)
    directories = find_runs(roots)
    if not directories:
        raise FileNotFoundError(
            f"no run record under {', '.join(map(str, roots))}: give a study directory, or run directories"
        )
    runs, damaged = _sound(load_each(directories, train_points=train_points))
    study = replace(study_of_runs(runs, baseline=baseline), damaged=damaged)
    if not runs:
        raise RecordError(f"no run record can be read: {study.left_out}")
    return study


def _sound(loaded: Iterable[Run | RecordError]) -> tuple[list[Run], tuple[str, ...]]:
    """The runs, and a line about each that is damaged."""
    listed = list(loaded)
    damaged = tuple(" ".join(str(error).split()) for error in listed if isinstance(error, RecordError))
    return [run for run in listed if isinstance(run, Run)], damaged


def study_of_runs(runs: Sequence[Run], *, baseline: str = "adamw", name: str = "runs") -> Study:
    """A study made of bare records: every run is reported, and the arms are the optimizers.

    Where one optimizer has several runs of the same model, horizon and seed, the hyper-parameters that tell them apart
    become part of the arm's name.
    """
    arms = dict(zip((run.directory for run in runs), arm_names(runs), strict=True))
    trials = [
        Trial(
            arm=arms[run.directory],
            phase="reporting",
            model=run.model,
            horizon=run.horizon,
            seed=run.seed,
            values={},
            directory=run.directory,
            run=run,
        )
        for run in runs
    ]
    return Study(
        name=name,
        baseline=baseline,
        arms={arm: Arm(arm) for arm in dict.fromkeys(arms.values())},
        trials=trials,
        seeds=tuple(sorted({run.seed for run in runs})),
        planned=False,
    )


def arm_names(runs: Sequence[Run]) -> list[str]:
    """A name for the arm of each run: its optimizer, with the values in which runs of one cell differ."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    own = [flatten(run.config["optimizer"]) for run in runs]
    for run, values in zip(runs, own, strict=True):
        cells.setdefault((run.optimizer, run.model, run.horizon, run.seed), []).append(values)
    telling: dict[str, set[str]] = {}
    for (optimizer, *_), members in cells.items():
        keys = {key for values in members for key in values}
        differing = {key for key in keys if len({repr(values.get(key)) for values in members}) > 1}
        telling.setdefault(optimizer, set()).update(differing)
    names = []
    for run, values in zip(runs, own, strict=True):
        suffix = ", ".join(f"{key}={short(values.get(key))}" for key in sorted(telling[run.optimizer]))
        names.append(f"{run.optimizer} ({suffix})" if suffix else run.optimizer)
    return names


def _from_index(directory: Path, train_points: int) -> Study:
    index = read_object(directory / INDEX_FILE, _ReadIndex)
    if index is None:
        raise RecordError(f"{directory} is no study: {INDEX_FILE} is missing")
    entries = index["trials"]
    directories = [directory / entry["run"] for entry in entries]
    existing = [path for path in directories if os.path.lexists(path / CONFIG_FILE)]
    sound, damaged = _sound(load_each(existing, train_points=train_points))
    runs = {run.directory: run for run in sound}
    arms = {
        name: Arm(
            name=name,
            role=arm.get("role", "arm"),
            search=arm.get("search") or {},
            budget=arm.get("budget"),
            method=arm.get("method", ""),
            of=arm.get("of"),
            varies=tuple(arm.get("varies") or ()),
            budgets={
                (model, int(horizon)): trials
                for model, by_horizon in (arm.get("budgets") or {}).items()
                for horizon, trials in by_horizon.items()
            },
        )
        for name, arm in index["arms"].items()
    }
    times = directory / REFERENCE_TIMES_FILE
    return Study(
        name=index["name"],
        baseline=index["baseline"],
        arms=arms,
        trials=[
            Trial(
                arm=entry["arm"],
                phase=entry["phase"],
                model=entry["model"],
                horizon=int(entry["horizon"]),
                seed=int(entry["seed"]),
                values=entry.get("values") or {},
                directory=path,
                run=runs.get(path),
            )
            for entry, path in zip(entries, directories, strict=True)
        ],
        seeds=tuple(index["seeds"]["reporting"]),
        level=float(index.get("level", 0.95)),
        description=index.get("description", ""),
        finished=bool(index.get("finished", True)),
        trials_at_most=index.get("trials_at_most"),
        damaged=damaged,
        directory=directory,
        reference_times=ReferenceTimes.load(times) if times.is_file() else None,
    )


class _ReadArm(Form):
    role: Role = "arm"
    search: dict[str, Any] | None = None
    budget: int | None = None
    method: str = ""
    of: str | None = None
    varies: list[str] | None = None
    budgets: dict[str, dict[str, int]] | None = None


class _ReadTrial(Form):
    arm: str
    phase: Phase
    model: str
    horizon: int
    seed: int
    values: dict[str, Any] | None = None
    run: str


class _ReadSeeds(Form):
    reporting: list[int]


class _ReadIndex(Form):
    """What a study.json must hold to be read."""

    name: str
    baseline: str
    arms: dict[str, _ReadArm]
    trials: list[_ReadTrial]
    seeds: _ReadSeeds
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    description: str = ""
    finished: bool = True
    trials_at_most: int | None = None

    @model_validator(mode="after")
    def _arms_are_known(self) -> Self:
        if unknown := [
            name for name in (self.baseline, *(trial.arm for trial in self.trials)) if name not in self.arms
        ]:
            raise ValueError(f"there is no arm {unknown[0]!r} in it")
        return self


def _endpoints(arm: str, model: str, horizon: int, by_seed: dict[int, Run], times: ReferenceTimes | None) -> Endpoints:
    seeds = tuple(sorted(by_seed))
    runs = [by_seed[seed] for seed in seeds]

    def seconds(run: Run) -> float:
        if times is None:
            return training_seconds(run)
        modelled = times.training_seconds(run, arm)
        return float("nan") if modelled is None else modelled

    def column(values: Iterable[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array(list(values), dtype=np.float64)

    return Endpoints(
        arm=arm,
        model=model,
        horizon=horizon,
        seeds=seeds,
        losses=column(run.final_val_loss for run in runs),
        tokens=column(run.total("tokens") for run in runs),
        flops=column(run.total("flops") for run in runs),
        seconds=column(seconds(run) for run in runs),
        runs=tuple(run.directory for run in runs),
    )


def _shape_size(run: Run) -> float:
    model = run.config["model"]
    return 12.0 * model.get("n_layer", 0) * model.get("n_embd", 0) ** 2


def short(value: Any) -> str:
    """A configuration value as a reader writes it: 0.001, false, 0.9/0.95."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(short, value)) if isinstance(value, (list, tuple)) else str(value)
