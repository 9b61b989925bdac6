"""From a study and what is on record to its trials: which there are, which can run now, which wait for a search.

Expanding is a pure function of the study and of the outcomes so far. Running a study is then nothing but: expand, run
what is ready, expand again, until nothing is left; and resuming it is the same.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from studies.search import Point, Replay, Search, coordinate_descent, grid, quasi_random, replay, settled, start_point
from studies.spec import AblationSpec, ArmSpec, StudySpec, Value
from training.compose import compose_dictionary

Phase = Literal["tuning", "reporting"]
Status = Literal["completed", "diverged"]

_ELEMENT = re.compile(r"^(?P<key>.+)\[(?P<index>\d+)\]$")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: the final validation loss in nats, infinite if it diverged."""

    status: Status
    loss: float


# What is on record, by trial name.
Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Trial:
    """One run of a study, known by what it overrides."""

    arm: str
    phase: Phase
    model: str
    horizon: int  # steps
    seed: int
    values: Point  # that the search chose
    overrides: tuple[str, ...]  # of the configuration, complete but for name and place

    @property
    def name(self) -> str:
        """`<arm>-<model>-<horizon>-<hash>-s<seed>`: from the overrides alone, so that new defaults rename nothing."""
        canonical = json.dumps(sorted(self.overrides), separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return f"{self.arm}-{self.model}-{self.horizon}-{digest}-s{self.seed}"


@dataclass(frozen=True)
class Expansion:
    """The trials that the outcomes so far call for, in the order in which they should run."""

    trials: tuple[Trial, ...]
    finished: bool  # no trial is missing and no search waits
    budgets: Mapping[tuple[str, str, int], int] = field(default_factory=dict)  # tuning trials by arm, model, horizon

    def missing(self, outcomes: Outcomes) -> list[Trial]:
        """Trials without an outcome."""
        return [trial for trial in self.trials if trial.name not in outcomes]


def expand(spec: StudySpec, outcomes: Outcomes) -> Expansion:
    """The study's trials, as far as its searches have got.

    One model after the other; on each the searches at `tune_at`, then horizon by horizon, the shortest first, and on each
    arm by arm, so that a study that is broken off has whole horizons and whole arms to show; after all models the ablations.

    Args:
        spec: the study.
        outcomes: of the trials that have ended, by name; others may be among them.
    """
    trials: list[Trial] = []
    waiting = False
    budgets: dict[tuple[str, str, int], int] = {}
    best: dict[tuple[str, str, int], Point] = {}
    for model, model_spec in spec.models.items():
        for arm in spec.arms_on(model):
            others = [horizon for horizon in spec.horizons(arm, model) if horizon != model_spec.tune_at]
            for horizon in (model_spec.tune_at, *others):
                search = _search_for(spec, arm, model, horizon, best)
                if search is None:
                    waiting = True
                    continue
                conversation, budget = search
                found, tried = _converse(spec, arm, model, horizon, conversation, outcomes)
                budgets[arm, model, horizon] = budget
                _within_budget(spec, arm, model, horizon, tried, budget)
                trials += tried
                if found.best is None:
                    waiting = True
                    continue
                best[arm, model, horizon] = found.best
                if horizon in spec.horizons(arm, model):
                    trials += [
                        _trial(spec, arm, "reporting", model, horizon, seed, found.best) for seed in model_spec.seeds
                    ]
    for name, ablation in spec.ablations.items():
        for horizon in ablation.horizons:
            values = best.get((ablation.of, ablation.model, horizon))
            if values is None:
                waiting = True
                continue
            seeds = spec.models[ablation.model].seeds[: ablation.seeds]
            trials += [_ablation_trial(spec, name, ablation, horizon, seed, values) for seed in seeds]
    ordered = sorted(trials, key=functools.partial(_place, spec))
    finished = not waiting and all(trial.name in outcomes for trial in ordered)
    return Expansion(tuple(ordered), finished, budgets)


def expected_trials(spec: StudySpec) -> dict[tuple[str, str, int, Phase], int]:
    """How many trials a study has at most, by arm, model, horizon and phase; known before anything runs."""
    counts: dict[tuple[str, str, int, Phase], int] = {}
    for model, model_spec in spec.models.items():
        for arm in spec.arms_on(model):
            for horizon in {model_spec.tune_at, *spec.horizons(arm, model)}:
                budget = _budget(spec, arm, model, horizon)
                if budget:
                    counts[arm, model, horizon, "tuning"] = budget
            for horizon in spec.horizons(arm, model):
                counts[arm, model, horizon, "reporting"] = len(model_spec.seeds)
    for name, ablation in spec.ablations.items():
        seeds = spec.models[ablation.model].seeds[: ablation.seeds]
        for horizon in ablation.horizons:
            counts[name, ablation.model, horizon, "reporting"] = len(seeds)
    return counts


def common_overrides(spec: StudySpec, arm: ArmSpec, model: str) -> list[str]:
    """What every run of an arm on a model overrides, before horizon, seed and hyper-parameters."""
    return [f"model={model}", *spec.base, *spec.models[model].overrides, *arm.overrides]


def arm_overrides(spec: StudySpec, name: str, model: str) -> list[str]:
    """The same for an arm or an ablation by name."""
    ablation = spec.ablations.get(name)
    if ablation is None:
        return common_overrides(spec, spec.arms[name], model)
    common = common_overrides(spec, spec.arms[ablation.of], model)
    return [*_merged(common, ablation.overrides), *ablation.overrides]


def value_overrides(values: Mapping[str, Value], defaults: Callable[[], Mapping[str, Any]]) -> list[str]:
    """Hydra overrides for chosen values; elements of a list (optimizer.betas[0]) are put into the default list.

    Args:
        values: by configuration key.
        defaults: the composed configuration that elements are put into, asked for only if there are any.
    """
    overrides = []
    lists: dict[str, list[Any]] = {}
    for key, value in values.items():
        element = _ELEMENT.match(key)
        if element is None:
            overrides.append(f"{key}={_written(value)}")
            continue
        name = element["key"]
        if name not in lists:
            node: Any = defaults()
            for part in name.split("."):
                node = node[part]
            lists[name] = list(node)
        lists[name][int(element["index"])] = value
    return overrides + [f"{name}=[{','.join(map(_written, items))}]" for name, items in lists.items()]


def _search_for(
    spec: StudySpec, arm: str, model: str, horizon: int, best: Mapping[tuple[str, str, int], Point]
) -> tuple[Search, int] | None:
    """The search of an arm on a model at a horizon, and its budget in trials; None while what it builds on is
    unknown."""
    model_spec, tuning, space = spec.models[model], spec.tuning, spec.arms[arm].search
    budget = _budget(spec, arm, model, horizon)
    candidates = budget // len(tuning.seeds)
    if horizon != model_spec.tune_at:
        start = best.get((arm, model, model_spec.tune_at))
    elif model_spec.like is not None:
        start = best.get((arm, model_spec.like, spec.models[model_spec.like].tune_at))
    else:
        start = start_point(space)
        if not budget:
            return settled(start), 0
        if tuning.method == "grid":
            return grid(space), budget
        if tuning.method in ("random", "halton"):
            return quasi_random(space, candidates, method=tuning.method), budget
        return coordinate_descent(space, start, candidates, threshold=tuning.threshold), budget
    if start is None:
        return None
    if not budget or tuning.retune is None:
        return settled(start), 0
    keys = [key for key in tuning.retune.keys if key in space]
    return coordinate_descent(space, start, candidates, threshold=tuning.threshold, keys=keys), budget


def _budget(spec: StudySpec, arm: str, model: str, horizon: int) -> int:
    """Tuning trials granted to an arm on a model at a horizon: the same for all arms that have anything to search."""
    model_spec, tuning, space = spec.models[model], spec.tuning, spec.arms[arm].search
    if not space:
        return 0
    if horizon == model_spec.tune_at and model_spec.like is None:
        return tuning.trials
    if tuning.retune is None or not any(key in space for key in tuning.retune.keys):
        return 0
    return tuning.retune.trials


def _converse(
    spec: StudySpec, arm: str, model: str, horizon: int, search: Search, outcomes: Outcomes
) -> tuple[Replay, list[Trial]]:
    def trials_of(point: Point) -> list[Trial]:
        return [_trial(spec, arm, "tuning", model, horizon, seed, point) for seed in spec.tuning.seeds]

    def loss_of(point: Point) -> float | None:
        found = [outcomes.get(trial.name) for trial in trials_of(point)]
        known = [outcome.loss for outcome in found if outcome is not None]
        return math.fsum(known) / len(known) if len(known) == len(found) else None

    found = replay(search, loss_of)
    return found, [trial for point in found.asked for trial in trials_of(point)]


def _within_budget(spec: StudySpec, arm: str, model: str, horizon: int, tried: Sequence[Trial], budget: int) -> None:
    if len(tried) > budget:
        raise AssertionError(
            f"{spec.name}: {arm} on {model} at {horizon} steps: {len(tried)} tuning trials, {budget} are granted"
        )


def _trial(spec: StudySpec, arm: str, phase: Phase, model: str, horizon: int, seed: int, values: Point) -> Trial:
    common = common_overrides(spec, spec.arms[arm], model)
    chosen = value_overrides(values, lambda: _composed(tuple(common)))
    overrides = (*common, *chosen, f"train.steps={horizon}", f"seed={seed}")
    return Trial(arm, phase, model, horizon, seed, values, overrides)


def _ablation_trial(
    spec: StudySpec, name: str, ablation: AblationSpec, horizon: int, seed: int, values: Point
) -> Trial:
    values = {**values, **ablation.values}
    like = _trial(spec, ablation.of, "reporting", ablation.model, horizon, seed, values)
    overrides = (*_merged(like.overrides, ablation.overrides), *ablation.overrides)
    return Trial(name, "reporting", ablation.model, horizon, seed, values, overrides)


def _place(spec: StudySpec, trial: Trial) -> tuple[bool, int, int, int, bool]:
    """What runs first has a lower one."""
    model = list(spec.models).index(trial.model)
    if trial.arm in spec.ablations:
        return True, model, 0, 0, True
    tuning = trial.phase == "tuning"
    search = tuning and trial.horizon == spec.models[trial.model].tune_at
    return False, model, 0 if search else trial.horizon, spec.arms_on(trial.model).index(trial.arm), not tuning


def _merged(overrides: Sequence[str], later: Sequence[str]) -> list[str]:
    """The overrides that later ones do not replace: Hydra takes a group twice for an error."""
    replaced = {override.split("=")[0] for override in later}
    return [override for override in overrides if override.split("=")[0] not in replaced]


@functools.lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose_dictionary(overrides)


def _written(value: Any) -> str:
    """A value in Hydra's syntax."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)
