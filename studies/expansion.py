"""Expand a study and its recorded outcomes into trials: which exist, which can run now, which wait for a search.

Expansion is a pure function of the study and the outcomes so far. To run or resume a study, expand it, run the trials
that are ready, and repeat until none is left.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from studies.search import Point, Search, best_of, coordinate_descent, quasi_random, replay, settled, start_point
from studies.spec import AblationSpec, ArmSpec, FinalistsSpec, Range, StudySpec, Value, points
from training.compose import compose_dictionary
from training.config import ConfigurationError

Phase = Literal["tuning", "reporting"]
Status = Literal["completed", "diverged"]
Cell = tuple[str, str, int, Phase]  # arm, model, horizon, phase

ELEMENT = re.compile(r"^(?P<key>.+)\[(?P<index>\d+)\]$")


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: the final validation loss in nats, infinite if it diverged."""

    status: Status
    loss: float


# Recorded outcomes by trial name.
Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Trial:
    """One run of a study, identified by its overrides."""

    arm: str
    phase: Phase
    model: str
    horizon: int  # steps
    seed: int
    values: Point  # chosen by the search
    overrides: tuple[str, ...]  # all configuration overrides except name and directories

    @property
    def cell(self) -> Cell:
        return self.arm, self.model, self.horizon, self.phase

    @property
    def name(self) -> str:
        """`<arm>-<model>-<horizon>-<hash>-s<seed>`, from the overrides alone, so that new defaults do not rename it."""
        canonical = json.dumps(sorted(self.overrides), separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return f"{self.arm}-{self.model}-{self.horizon}-{digest}-s{self.seed}"


@dataclass(frozen=True)
class Expansion:
    """The trials that follow from the outcomes so far, in running order."""

    trials: tuple[Trial, ...]
    finished: bool  # no trial is missing and no search is waiting
    budgets: Mapping[tuple[str, str, int], int]  # tuning trials by arm, model, horizon

    def missing(self, outcomes: Outcomes) -> list[Trial]:
        """Return the trials without an outcome."""
        return [trial for trial in self.trials if trial.name not in outcomes]


def expand(spec: StudySpec, outcomes: Outcomes) -> Expansion:
    """Return the study's trials, as far as its searches have progressed.

    The order is by model; for each model the searches at `tune_at`, then by horizon from the shortest, then by arm, so
    that an interrupted study has complete horizons and arms. Ablations come after all models.

    Args:
        spec: the study.
        outcomes: outcomes of finished trials by name; other names are ignored.
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
                found, tried = _tuned(spec, arm, model, horizon, search, outcomes)
                budget = budgets[arm, model, horizon] = _budget(spec, arm, model, horizon)
                assert len(tried) <= budget, f"{arm}, {model}, {horizon} steps: {len(tried)} trials of {budget}"
                trials += tried
                if found is None:
                    waiting = True
                    continue
                best[arm, model, horizon] = found
                if horizon in spec.horizons(arm, model):
                    seeds = spec.seeds(arm, model)
                    trials += [_trial(spec, arm, "reporting", model, horizon, seed, found) for seed in seeds]
    for name, ablation in spec.ablations.items():
        for horizon in ablation.horizons:
            values = best.get((ablation.of, ablation.model, horizon))
            if values is None:
                waiting = True
                continue
            seeds = spec.seeds(ablation.of, ablation.model)[: ablation.seeds]
            trials += [_ablation_trial(spec, name, ablation, horizon, seed, values) for seed in seeds]
    ordered = sorted(trials, key=functools.partial(_place, spec))
    finished = not waiting and all(trial.name in outcomes for trial in ordered)
    return Expansion(tuple(ordered), finished, budgets)


def expected_trials(spec: StudySpec) -> dict[Cell, int]:
    """Return the maximum number of trials by arm, model, horizon and phase."""
    counts: dict[Cell, int] = {}
    for model in spec.models:
        for arm in spec.arms_on(model):
            for horizon in sorted({spec.models[model].tune_at, *spec.horizons(arm, model)}):
                budget = _budget(spec, arm, model, horizon)
                if budget:
                    counts[arm, model, horizon, "tuning"] = budget
            for horizon in spec.horizons(arm, model):
                counts[arm, model, horizon, "reporting"] = len(spec.seeds(arm, model))
    for name, ablation in spec.ablations.items():
        seeds = spec.seeds(ablation.of, ablation.model)[: ablation.seeds]
        for horizon in ablation.horizons:
            counts[name, ablation.model, horizon, "reporting"] = len(seeds)
    return counts


def common_overrides(spec: StudySpec, arm: ArmSpec, model: str) -> list[str]:
    """Return the overrides of every run of an arm on a model, without horizon, seed and hyper-parameters."""
    return [f"model={model}", *spec.base, *spec.models[model].overrides, *arm.overrides]


def arm_overrides(spec: StudySpec, name: str, model: str) -> list[str]:
    """Return `common_overrides` of an arm or an ablation by name."""
    ablation = spec.ablations.get(name)
    if ablation is None:
        return common_overrides(spec, spec.arms[name], model)
    common = common_overrides(spec, spec.arms[ablation.of], model)
    return [*_merged(common, ablation.overrides), *ablation.overrides]


def value_overrides(values: Mapping[str, Value], defaults: Callable[[], Mapping[str, Any]]) -> list[str]:
    """Return Hydra overrides for chosen values. List elements (optimizer.betas[0]) replace those of the default list.

    Args:
        values: by configuration key.
        defaults: returns the composed configuration; called only if there are list elements.

    Raises:
        ConfigurationError: an element of something that is no list there.
    """
    overrides = []
    lists: dict[str, list[Any]] = {}
    for key, value in values.items():
        element = ELEMENT.match(key)
        if element is None:
            overrides.append(f"{key}={_written(value)}")
            continue
        name = element["key"]
        if name not in lists:
            node: Any = defaults()
            for part in name.split("."):
                node = node.get(part) if isinstance(node, Mapping) else None
            if not isinstance(node, list):
                raise ConfigurationError(f"{key}: {name} is no list; give the list in the arm's overrides or arguments")
            lists[name] = list(node)
        index = int(element["index"])
        if index >= len(lists[name]):
            raise ConfigurationError(
                f"{key}: {name} has {len(lists[name])} elements, numbered from 0; choose one of them"
            )
        lists[name][index] = value
    return overrides + [f"{name}=[{','.join(map(_written, items))}]" for name, items in lists.items()]


def _search_for(
    spec: StudySpec, arm: str, model: str, horizon: int, best: Mapping[tuple[str, str, int], Point]
) -> Search | None:
    """Return the search of an arm on a model at a horizon; None while the search that it starts from is unfinished."""
    model_spec, tuning, space = spec.models[model], spec.tuning, spec.arms[arm].search
    settings = _settings(spec, arm, model, horizon)
    if horizon != model_spec.tune_at:
        start = best.get((arm, model, model_spec.tune_at))
    elif model_spec.like is not None:
        start = best.get((arm, model_spec.like, spec.models[model_spec.like].tune_at))
    else:
        start = start_point(space)
        if settings and tuning.method == "grid":
            return best_of(points(space))
        if settings and tuning.method in ("random", "halton"):
            ranges = {key: one for key, one in space.items() if isinstance(one, Range)}
            return quasi_random(ranges, settings, method=tuning.method)
    if start is None:
        return None
    if not settings:
        return settled(start)
    full = _is_full_search(spec, model, horizon)
    return coordinate_descent(
        space,
        start,
        settings,
        threshold=tuning.threshold,
        keys=[] if full or tuning.retune is None else tuning.retune.keys,
        follow_at_once=tuning.follow == "at_once",
    )


def _settings(spec: StudySpec, arm: str, model: str, horizon: int) -> int:
    """Return how many settings a search may try: the same for all arms with something to search."""
    tuning, space = spec.tuning, spec.arms[arm].search
    if space and _is_full_search(spec, model, horizon):
        return tuning.trials // len(tuning.seeds)
    if tuning.retune is None or not any(key in space for key in tuning.retune.keys):
        return 0
    return tuning.retune.trials // len(tuning.seeds)


def _is_full_search(spec: StudySpec, model: str, horizon: int) -> bool:
    """Return False for a re-tuning, which starts from the result of another search."""
    return horizon == spec.models[model].tune_at and spec.models[model].like is None


def _finalists(spec: StudySpec, model: str, horizon: int) -> FinalistsSpec | None:
    finalists = spec.tuning.finalists
    return finalists if finalists and (finalists.retune or _is_full_search(spec, model, horizon)) else None


def _budget(spec: StudySpec, arm: str, model: str, horizon: int) -> int:
    """Return the maximum number of tuning trials, finalists included."""
    settings, finalists = _settings(spec, arm, model, horizon), _finalists(spec, model, horizon)
    again = min(settings, finalists.settings) * len(finalists.seeds) if finalists else 0
    return settings * len(spec.tuning.seeds) + again


def _tuned(
    spec: StudySpec, arm: str, model: str, horizon: int, search: Search, outcomes: Outcomes
) -> tuple[Point | None, list[Trial]]:
    """Replay a search, then its finalists; return the chosen setting, if all losses are known, and the trials so far.

    Finalists are the settings with the lowest losses of the search. One that diverged there is none.
    """

    def trials_of(point: Point, seeds: Sequence[int]) -> list[Trial]:
        return [_trial(spec, arm, "tuning", model, horizon, seed, point) for seed in seeds]

    def loss_of(point: Point, seeds: Sequence[int]) -> float | None:
        found = [outcomes.get(trial.name) for trial in trials_of(point, seeds)]
        known = [outcome.loss for outcome in found if outcome is not None]
        return math.fsum(known) / len(known) if len(known) == len(found) else None

    tuning = spec.tuning
    found = replay(search, lambda point: loss_of(point, tuning.seeds))
    trials = [trial for point in found.asked for trial in trials_of(point, tuning.seeds)]
    finalists = _finalists(spec, model, horizon)
    if found.best is None or finalists is None:
        return found.best, trials
    losses = [(loss_of(point, tuning.seeds), point) for point in found.asked]
    ranked = sorted(
        ((loss, point) for loss, point in losses if loss is not None and loss < math.inf), key=itemgetter(0)
    )
    if not ranked:  # nothing was searched, or all diverged
        return found.best, trials
    chosen = [point for _, point in ranked[: finalists.settings]]
    best = replay(best_of(chosen), lambda point: loss_of(point, finalists.seeds)).best
    return best, trials + [trial for point in chosen for trial in trials_of(point, finalists.seeds)]


def _trial(spec: StudySpec, arm: str, phase: Phase, model: str, horizon: int, seed: int, values: Point) -> Trial:
    common = common_overrides(spec, spec.arms[arm], model)
    chosen = value_overrides(values, lambda: composed(tuple(common)))
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
    """Return the sort key of the running order."""
    model = list(spec.models).index(trial.model)
    if trial.arm in spec.ablations:
        return True, model, 0, 0, True
    tuning = trial.phase == "tuning"
    search = tuning and trial.horizon == spec.models[trial.model].tune_at
    return False, model, 0 if search else trial.horizon, spec.arms_on(trial.model).index(trial.arm), not tuning


def _merged(overrides: Sequence[str], later: Sequence[str]) -> list[str]:
    """Merge overrides; later ones replace earlier ones, because Hydra refuses a group that is given twice."""
    replaced = {override.split("=")[0] for override in later}
    return [override for override in overrides if override.split("=")[0] not in replaced]


@functools.lru_cache(maxsize=256)
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose_dictionary(overrides)


def _written(value: Any) -> str:
    """Format a value in Hydra's syntax."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)
