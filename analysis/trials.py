"""Assign runs to arms, horizons, seeds and phases, from a study's tables or from bare run directories.

A study directory holds study.yaml, trials.csv and curves.parquet, written by `studies`. For bare run directories, the arms
are the optimizers and every run counts as reported.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from analysis.colours import label
from analysis.comparison import Endpoints
from analysis.runs import Origin, RecordedRun, flatten, load_each, runs_of_rows
from analysis.trial_tables import MISSING, TRIALS_FILE, Phase, TrialRow, leaves, read_curves, read_trials
from analysis.wallclock import ReferenceTimes, training_seconds
from training.records import Form, RecordError, find_runs, read_mapping, require

STUDY_FILE = "study.yaml"
PLAN = "plan"  # its section with what was derived from the rest
REFERENCE_TIMES_FILE = "reference_times.json"
VERIFICATION_FILE = "verification.json"

Role = Literal["arm", "ablation"]
Cell = tuple[str, str, int]  # arm, model, horizon


@dataclass(frozen=True)
class Arm:
    """One arm of a study.

    An ablation is reported like an arm but is not part of the verdict: it inherits its hyper-parameters from the arm that
    it varies. `search` maps a configuration key ("optimizer.lr", "optimizer.betas[0]") to its search space; `budget` is
    the number of trials of the full search, `budgets` that of each (model, horizon), and `seeds` the number of its reported
    runs.
    """

    name: str
    role: Role = "arm"
    search: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    method: str = ""
    of: str | None = None  # the arm that an ablation varies
    varies: tuple[str, ...] = ()  # the keys that an ablation varies
    budgets: Mapping[tuple[str, int], int] = field(default_factory=dict)
    seeds: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def granted(self, model: str, horizon: int) -> int | None:
        """Return the tuning budget on a model at a horizon; None if there is no search or it is unknown."""
        return self.budgets.get((model, horizon), self.budget)


@dataclass(frozen=True)
class RecordedTrial:
    """One run of a study. `run` is None until it has finished."""

    arm: str
    phase: Phase
    model: str
    horizon: int  # steps
    seed: int
    values: Mapping[str, Any]  # hyper-parameters set by the search, by configuration key
    origin: Origin
    run: RecordedRun | None

    @property
    def cell(self) -> Cell:
        return self.arm, self.model, self.horizon

    @property
    def status(self) -> str:
        return MISSING if self.run is None else self.run.status

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "diverged")

    @property
    def loss(self) -> float:
        """Final validation loss in nats, NaN if there is none."""
        return float("nan") if self.run is None else self.run.final_val_loss

    @property
    def seconds(self) -> float:
        """Training seconds, whatever the run's status."""
        return training_seconds(self.run) if self.run else 0.0

    @property
    def device_seconds(self) -> float:
        """Training seconds times the number of devices (ranks)."""
        return self.seconds * int(self.run.environment.get("world_size") or 1) if self.run else 0.0


@dataclass(frozen=True)
class Study:
    """Arms and trials, ready to be analysed."""

    name: str
    baseline: str
    arms: Mapping[str, Arm]
    trials: Sequence[RecordedTrial]
    seeds: tuple[int, ...]  # reporting seeds, fixed before any run
    level: float = 0.95
    deciding: frozenset[int] = frozenset()  # tuning seeds on which the best settings of a search run again
    description: str = ""
    directory: Path | None = None
    reference_times: ReferenceTimes | None = None
    planned: bool = True  # False: from bare records, without plans and budgets
    finished: bool = True
    trials_at_most: int | None = None  # in all, if every search uses its budget
    damaged: tuple[str, ...] = ()  # a line about each bare record that cannot be read
    set_aside: Sequence[tuple[str, int]] = ()  # arm and seed of recorded trials that are no longer in the study file
    # Seeds recorded by each study whose results chose settings of this one; None without its tables.
    builds_on: Mapping[str, frozenset[int] | None] = field(default_factory=dict)
    # Nats between the final losses of a recorded run and its rerun (`study.py verify`), by trial.
    reruns: Mapping[str, float] = field(default_factory=dict)

    @property
    def left_out(self) -> str:
        """Describe up to three damaged records; empty if there are none."""
        if not self.damaged:
            return ""
        more = f"; and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
        return f"{'; '.join(self.damaged[:3])}{more}. Restore these files, or run again."

    @property
    def reporting(self) -> list[RecordedTrial]:
        return [trial for trial in self.trials if trial.phase == "reporting"]

    @property
    def tuning(self) -> list[RecordedTrial]:
        return [trial for trial in self.trials if trial.phase == "tuning"]

    @property
    def under_way(self) -> str:
        """Describe the progress of an unfinished study; empty for a finished one."""
        if self.finished:
            return ""
        done = sum(trial.run is not None for trial in self.trials)
        of = "" if self.trials_at_most is None else f" of at most {self.trials_at_most:,}"
        text = (
            f"The study {self.name} is under way: {done:,}{of} trials are on record, and what is said here may change."
        )
        missing = "; ".join(self._lacking())
        return f"{text} Not reported yet: {missing}." if missing else text

    def _lacking(self) -> Iterator[str]:
        """Name the models without a reported run, then arms and ablations whose seeds have not all ended, by cell."""
        ended = Counter(trial.cell for trial in self.reporting if trial.ended)
        planned = {(name, *cell): n for name, arm in self.arms.items() for cell, n in arm.seeds.items()}
        yield from sorted({model for _, model, _ in planned} - {*self.models})
        lacking: dict[tuple[str, int], list[str]] = {}
        for (arm, model, horizon), seeds in planned.items():
            if model in self.models and (n := seeds - ended[arm, model, horizon]) > 0:
                of = f" ({n} of {seeds} seeds)" if n < seeds else ""
                lacking.setdefault((model, horizon), []).append(f"{label(arm)}{of}")
        for (model, horizon), arms in sorted(lacking.items()):
            yield f"{', '.join(arms)} on {model} after {horizon:,} steps"

    @property
    def models(self) -> list[str]:
        """Models of reported runs, smallest first."""
        sizes: dict[str, float] = {}
        for trial in self.reporting:
            if trial.run is not None:
                shape = trial.run.config["model"]
                size = (trial.run.summary or {}).get("parameters")
                size = size or 12 * shape.get("n_layer", 0) * shape.get("n_embd", 0) ** 2
                sizes[trial.model] = max(sizes.get(trial.model, 0.0), float(size))
        return sorted(sizes, key=lambda model: (sizes[model], model))

    def arm_names(self, *roles: Role) -> list[str]:
        """Return the arms (default) or those of the roles with reported runs, the baseline first, then as they appear."""
        present = dict.fromkeys(trial.arm for trial in self.reporting if trial.run is not None)
        names = [name for role in roles or ("arm",) for name in present if self.arms[name].role == role]
        return sorted(names, key=lambda name: name != self.baseline)

    def runs(self, *, arm: str | None = None, model: str | None = None) -> list[RecordedRun]:
        """Return the reported runs, of one arm or all, on one model or all."""
        found = [trial for trial in self.reporting if arm in (None, trial.arm) and model in (None, trial.model)]
        return [trial.run for trial in found if trial.run is not None]

    def endpoints(self, arm: str, model: str) -> list[Endpoints]:
        """Return the endpoints of an arm's finished reported runs, one per horizon, ascending."""
        runs = {
            (trial.horizon, trial.seed): trial.run
            for trial in self.reporting
            if trial.run is not None and trial.ended and (trial.arm, trial.model) == (arm, model)
        }
        return [
            self._endpoints(arm, model, horizon, {seed: runs[horizon, seed] for _, seed in cells})
            for horizon, cells in itertools.groupby(sorted(runs), key=lambda cell: cell[0])
        ]

    def corrected_level(self, model: str) -> float:
        """Return 1 - (1 - level) / m, for the m arms but the baseline on a model (Bonferroni), ended or planned."""
        arms = sum(
            bool(self.endpoints(name, model)) or any(of == model for of, _ in arm.seeds)
            for name, arm in self.arms.items()
            if arm.role == "arm" and name != self.baseline
        )
        return 1 - (1 - self.level) / max(arms, 1)

    def level_text(self, model: str) -> str:
        """ "98.8%"."""
        return f"{100 * self.corrected_level(model):.3g}%"

    def _endpoints(self, arm: str, model: str, horizon: int, by_seed: Mapping[int, RecordedRun]) -> Endpoints:
        runs, times = by_seed.values(), self.reference_times
        share = np.array([horizon / max(run.total("steps"), 1) for run in runs])  # 1 unless the run diverged
        return Endpoints(
            arm=arm,
            model=model,
            horizon=horizon,
            seeds=tuple(by_seed),
            losses=np.array([run.final_val_loss for run in runs]),
            tokens=share * [run.total("tokens") for run in runs],
            flops=share * [run.total("flops") for run in runs],
            runs=tuple(run.origin for run in runs),
            bits_per_byte=float(np.mean([run.bits_per_byte for run in runs])),
            reference_seconds=(
                float(np.mean(share * [times.training_seconds(run, arm) for run in runs])) if times else math.nan
            ),
        )


def load_study(paths: Sequence[str | Path], *, baseline: str = "adamw") -> Study:
    """Load a study directory, or run directories (or directories that contain some).

    Raises FileNotFoundError if a path does not exist, or has neither a study nor a run; RecordError if a file of the study
    or the records of all bare runs are damaged.
    """
    roots = [Path(path) for path in paths]
    if len(roots) == 1 and is_study(roots[0]):
        return _from_tables(roots[0])
    directories = find_runs(roots)
    if not directories:
        raise FileNotFoundError(
            f"no run record under {', '.join(map(str, roots))}: give a study directory, or run directories"
        )
    loaded = load_each(directories)
    runs = [run for run in loaded if isinstance(run, RecordedRun)]
    damaged = tuple(" ".join(str(error).split()) for error in loaded if isinstance(error, RecordError))
    study = replace(study_of_runs(runs, baseline=baseline), damaged=damaged)
    if not runs:
        raise RecordError(f"no run record can be read: {study.left_out}")
    return study


def is_study(directory: Path) -> bool:
    """Return whether the directory has a study's tables."""
    return (directory / TRIALS_FILE).is_file()


def study_of_runs(runs: Sequence[RecordedRun], *, baseline: str = "adamw") -> Study:
    """Make a study of bare records: every run is reported, and the arms are the optimizers.

    If an optimizer has several runs of the same model, horizon and seed, the hyper-parameters that distinguish them
    become part of the arm's name.
    """
    arms = _arm_names(runs)
    trials = [
        RecordedTrial(arm, "reporting", run.model, run.horizon, run.seed, values={}, origin=run.origin, run=run)
        for arm, run in zip(arms, runs, strict=True)
    ]
    return Study(
        name="runs",
        baseline=baseline,
        arms={arm: Arm(arm) for arm in dict.fromkeys(arms)},
        trials=trials,
        seeds=tuple(sorted({run.seed for run in runs})),
        planned=False,
    )


def _arm_names(runs: Sequence[RecordedRun]) -> list[str]:
    """Name the arm of each run: its optimizer, with the values in which runs of one cell differ."""
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


def _from_tables(directory: Path) -> Study:
    path = directory / STUDY_FILE
    values = read_mapping(path)
    if values is None:
        raise RecordError(f"{path} is missing; restore it next to {TRIALS_FILE}")
    require(_Spec, values, path)
    spec = _Spec.model_validate(values)
    recorded = read_trials(directory)
    rows = [row for row in recorded if row.phase != "set aside"]
    arms = _arms(spec)
    if unknown := [row for row in rows if row.arm not in arms]:
        raise RecordError(f"{directory / TRIALS_FILE}:{unknown[0].line}: {path} has no arm {unknown[0].arm!r}")
    runs = runs_of_rows(rows, read_curves(directory), directory)
    times = directory / REFERENCE_TIMES_FILE
    return Study(
        name=spec.name,
        baseline=spec.baseline,
        arms=arms,
        trials=[
            RecordedTrial(
                *(row.arm, row.phase, row.model, row.horizon, row.seed),
                values=_searched(row, spec),
                origin=Origin(directory / TRIALS_FILE, row.trial, row.line),
                run=runs.get(row.trial),
            )
            for row in rows
        ],
        seeds=tuple(sorted({seed for model in spec.models.values() for seed in model.seeds})),
        level=spec.level,
        deciding=frozenset(spec.tuning.finalists.seeds) if spec.tuning.finalists else frozenset(),
        description=spec.description,
        finished=len(runs) == len(rows),
        trials_at_most=spec.plan.trials_at_most,
        directory=directory,
        set_aside=[(row.arm, row.seed) for row in recorded if row.phase == "set aside"],
        builds_on={name: _seeds(_beside(directory.resolve(), name)) for name in spec.builds_on},
        reference_times=ReferenceTimes.load(times) if times.is_file() else None,
        reruns=_reruns(directory / VERIFICATION_FILE),
    )


def _reruns(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        listed = [_ReadRerun.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is damaged; remove it, or restore it") from error
    apart = {one.trial: one.difference if one.final_difference is None else one.final_difference for one in listed}
    return {trial: math.inf if value is None else value for trial, value in apart.items()}


def _beside(directory: Path, name: str) -> Path:
    """Return the directory of another study: beside this one, or beside its parent, as for an example within a study."""
    beside, above = directory.parent / name, directory.parent.parent / name
    return above if is_study(above) and not is_study(beside) else beside


def _seeds(directory: Path) -> frozenset[int] | None:
    """Return the seeds of a study's recorded trials, of every phase; None without its table."""
    return frozenset(row.seed for row in read_trials(directory) if row.summary) if is_study(directory) else None


def _arms(spec: _Spec) -> dict[str, Arm]:
    arms = {}
    for name, arm in spec.arms.items():
        arms[name] = Arm(
            name=name,
            # study.yaml omits the default scale of a range.
            search={key: {"scale": "log", **space} if "low" in space else space for key, space in arm.search.items()},
            budget=spec.tuning.trials if arm.search else None,
            method=spec.tuning.method,
            budgets=_by_cell(spec.plan.budgets.get(name, {})),
            seeds=_by_cell(spec.plan.seeds.get(name, {})),
        )
    for name, ablation in spec.ablations.items():
        keys = [override.lstrip("+").split("=")[0] for override in ablation.overrides]
        keys += [key.split("[")[0] for key in ablation.values]
        seeds = _by_cell(spec.plan.seeds.get(name, {}))
        arms[name] = Arm(name, role="ablation", of=ablation.of, varies=tuple(dict.fromkeys(keys)), seeds=seeds)
    return arms


def _by_cell(numbers: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, int], int]:
    return {(model, int(steps)): n for model, of_one in numbers.items() for steps, n in of_one.items()}


def _searched(row: TrialRow, spec: _Spec) -> dict[str, Any]:
    """Return the values set by the search of the trial's arm, or of the arm that it varies."""
    ablation = spec.ablations.get(row.arm)
    keys = [*spec.arms[ablation.of if ablation else row.arm].search, *(ablation.values if ablation else ())]
    values = leaves(row.config)
    return {key: values[key] for key in keys if key in values}


class _ReadArm(Form):
    search: dict[str, dict[str, Any]] = Field(default_factory=dict)


class _ReadAblation(Form):
    of: str
    overrides: list[str] = Field(default_factory=list)
    values: dict[str, Any] = Field(default_factory=dict)


class _ReadModel(Form):
    seeds: list[int]


class _ReadFinalists(Form):
    seeds: list[int]


class _ReadTuning(Form):
    method: str
    trials: int
    finalists: _ReadFinalists | None = None


class _ReadRerun(Form):
    trial: str
    difference: float | None  # null: infinite
    final_difference: float | None = None


class _ReadPlan(Form):
    trials_at_most: int | None = None
    budgets: dict[str, dict[str, dict[str, int]]] = Field(default_factory=dict)  # by arm, model and horizon
    seeds: dict[str, dict[str, dict[str, int]]] = Field(default_factory=dict)


class _Spec(Form):
    """The parts of a study.yaml that the analysis needs."""

    name: str
    baseline: str
    description: str = ""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    builds_on: list[str] = Field(default_factory=list)
    models: dict[str, _ReadModel]
    tuning: _ReadTuning
    arms: dict[str, _ReadArm]
    ablations: dict[str, _ReadAblation] = Field(default_factory=dict)
    plan: _ReadPlan = _ReadPlan()

    @model_validator(mode="after")
    def _arms_are_known(self) -> Self:
        named = (self.baseline, *(one.of for one in self.ablations.values()))
        if unknown := [name for name in named if name not in self.arms]:
            raise ValueError(f"no such arm: {unknown[0]!r}")
        return self


def short(value: Any) -> str:
    """Format a configuration value for display: 0.001, false, 0.9/0.95."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(short, value)) if isinstance(value, (list, tuple)) else str(value)
