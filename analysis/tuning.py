"""Results of the hyper-parameter searches: settings tried, best settings, and whether these are at an edge."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.comparison import Contrast, Interval, contrast
from analysis.trials import Arm, Cell, RecordedTrial, Study

# A random or Halton point this close to the end of its range (in units of the range) counts as at the edge.
_NEAR = 0.05
# Runs beyond an edge answer it if this interval excludes a gain (nats) that would matter.
_LEVEL = 0.95
MATTERS = 0.02


@dataclass(frozen=True)
class Candidate:
    """One setting of the searched hyper-parameters, over its seeds."""

    values: Mapping[str, Any]
    loss: float  # mean final validation loss over the deciding seeds, nats; infinite unless all of its runs completed
    trials: tuple[RecordedTrial, ...]
    finalist: bool = False  # it ran on seeds that others did not, which then decide


@dataclass(frozen=True)
class Beyond:
    """Reported runs once more with one value beyond the edge of its search, compared with those at the edge."""

    ablation: str
    value: float
    horizon: int
    interval: Interval  # of the mean difference from the runs at the edge, nats, paired by seed


@dataclass(frozen=True)
class Edge:
    """A value at an end of what its search tried: the optimum may lie outside, unless runs beyond it say no."""

    arm: str
    model: str
    horizon: int  # at which the value is used
    key: str
    value: float
    side: str  # "lowest" or "highest"
    inherited_from: str  # the search that chose the value, as "64 steps", if the key was not searched here
    beyond: tuple[Beyond, ...] = ()  # at any horizon: the same value, from the same search

    @property
    def is_open(self) -> bool:
        """Whether nobody looked beyond it, or a gain lies there, or one that would matter may."""
        return not self.beyond or any(one.interval.low < -MATTERS or one.interval.high < 0 for one in self.beyond)


@dataclass(frozen=True)
class Tuning:
    """One arm's search on one model at one horizon, lowest loss first."""

    arm: str
    model: str
    horizon: int
    candidates: tuple[Candidate, ...]
    best: Candidate  # the reported setting; the lowest if there is no reported run

    @property
    def cell(self) -> Cell:
        return self.arm, self.model, self.horizon

    @property
    def is_full(self) -> bool:
        """Whether every key was searched, and not only those of a re-tuning."""
        keys = {key for candidate in self.candidates for key in candidate.values}
        return all(len({repr(one.values.get(key)) for one in self.candidates}) > 1 for key in keys)

    @property
    def noise(self) -> float:
        """Standard deviation of the lowest loss, nats, had the search drawn other points: a bootstrap over its settings.

        For random and Halton search, on the seeds of all settings. NaN for fewer than three settings or a re-tuning.
        """
        shared = set.intersection(*({trial.seed for trial in one.trials} for one in self.candidates))
        losses = [np.mean([t.loss for t in one.trials if t.seed in shared]) for one in self.candidates if shared]
        ended = np.sort([loss for loss in losses if np.isfinite(loss)])
        if not self.is_full or len(ended) < 3:
            return math.nan
        n = len(ended)
        above = (np.arange(n, -1, -1) / n) ** n  # the chance that no draw is among the i lowest
        chance = above[:-1] - above[1:]  # that the lowest draw is the i-th
        return float(np.sqrt(chance @ ended**2 - (chance @ ended) ** 2))

    @property
    def diverged(self) -> int:
        return sum(trial.status == "diverged" for candidate in self.candidates for trial in candidate.trials)


def tunings(study: Study) -> list[Tuning]:
    """Return the searches of a study, one for each arm, model and horizon with finished tuning trials."""
    cells: dict[Cell, list[RecordedTrial]] = {}
    for trial in study.tuning:
        if trial.run is not None and trial.ended:
            cells.setdefault(trial.cell, []).append(trial)
    chosen = {trial.cell: trial.values for trial in study.reporting if trial.values}
    found = []
    for cell, trials in sorted(cells.items()):
        settings = candidates(trials, study.deciding)
        best = next((one for one in settings if one.values == chosen.get(cell)), settings[0])
        found.append(Tuning(*cell, tuple(settings), best))
    return found


def edges(study: Study, searches: Sequence[Tuning]) -> list[Edge]:
    """Return the reported values at an end of what was tried, the baseline's first.

    A key that was not searched at a horizon has its value, and its edge, from the search at another horizon, or on
    another model. Before any reported run, the edges of the best settings count.
    """
    cells = {
        trial.cell: trial.values for trial in study.reporting if trial.values and study.arms[trial.arm].role == "arm"
    } or {search.cell: search.best.values for search in searches}
    order = sorted(study.arms, key=lambda arm: arm != study.baseline)
    found = []
    for cell in sorted(cells, key=lambda cell: (order.index(cell[0]), *cell[1:])):
        arm, model, horizon = cell
        sources = sorted(
            (search for search in searches if search.arm == arm),
            key=lambda one: (one.cell != cell, one.model != model, -len(one.candidates)),
        )
        for key, value in cells[cell].items():
            for source in sources:
                points = explored(source.candidates, key)
                if len(points) < 2 or value not in points:
                    continue
                if side := _side(study.arms[arm], points, key, value, full=source.is_full):
                    place = "" if source.model == model else f"{source.model}, "
                    place = "" if source.cell == cell else f"{place}{source.horizon:,} steps"
                    beyond = tuple(_beyond(study, arm, model, key, float(value), side))
                    found.append(Edge(arm, model, horizon, key, float(value), side, place, beyond))
                break
    return found


def _beyond(study: Study, arm: str, model: str, key: str, value: float, side: str) -> Iterator[Beyond]:
    """Yield the ablations that move this value alone, by a step of the search, at the horizons at which the arm has it."""
    used = {trial.cell: trial.values for trial in study.reporting if trial.values}
    ends = {end.horizon: end for end in study.endpoints(arm, model)}
    farthest = _step_beyond(study.arms[arm].search.get(key, {}), value, side)
    low, high = sorted((value, farthest))
    for name in study.arm_names("ablation"):
        ablation = study.arms[name]
        if (ablation.of, ablation.varies) != (arm, (key.split("[")[0],)):
            continue
        for end in study.endpoints(name, model):
            theirs, ours = used[name, model, end.horizon], used.get((arm, model, end.horizon), {})
            tried = theirs.get(key)
            alone = ours.get(key) == value and {**theirs, key: value} == dict(ours)
            if not alone or not isinstance(tried, (int, float)) or not low <= tried <= high or tried == value:
                continue
            paired = contrast(end, ends[end.horizon], _LEVEL)
            if isinstance(paired, Contrast) and paired.interval:
                yield Beyond(name, float(tried), end.horizon, paired.interval)


def _step_beyond(space: Mapping[str, Any], value: float, side: str) -> float:
    """Return how far a run beyond an edge may be: a quarter of a range, or the ratio of the last two listed values."""
    up = side == "highest"
    if "low" in space and "high" in space:
        low, high = float(space["low"]), float(space["high"])
        if space.get("scale") != "log":
            return value + (0.25 if up else -0.25) * (high - low)
        ratio = (high / low) ** 0.25
    else:
        listed = sorted(float(one) for one in space.get("values", ()) if isinstance(one, (int, float)))
        near = listed[-2:] if up else listed[:2]
        ratio = near[1] / near[0] if len(near) == 2 and near[0] > 0 else 2.0
    return value * (ratio if up else 1 / ratio) * (1 + (1e-3 if up else -1e-3))  # values are rounded


def candidates(trials: Sequence[RecordedTrial], deciding: Collection[int] = ()) -> list[Candidate]:
    """Group trials with the same values, best first.

    Settings that ran again on the seeds of the finalists, `deciding`, come first, and these seeds alone decide between them:
    the search chose them on the others.
    """
    groups: dict[str, list[RecordedTrial]] = {}
    for trial in trials:
        groups.setdefault(repr(sorted(trial.values.items())), []).append(trial)
    found = []
    for members in groups.values():
        further = [trial.loss for trial in members if trial.seed in deciding]
        losses = further or [trial.loss for trial in members]
        loss = float(np.mean(losses)) if np.all(np.isfinite(losses)) else math.inf
        found.append(Candidate(members[0].values, loss, tuple(members), bool(further)))
    return sorted(found, key=lambda candidate: (not candidate.finalist, candidate.loss))


def explored(found: Sequence[Candidate], key: str) -> list[float]:
    """Return the distinct numeric values tried for a key, ascending."""
    values = {candidate.values.get(key) for candidate in found}
    return sorted(float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool))


def predicted_gain(search: Tuning, key: str) -> float | None:
    """Return the gain, in nats, at the minimum of a parabola through the best candidate and its two neighbours.

    The parabola is in the logarithm of `key`; neighbours agree in all other values. None without a neighbour on each side.
    """
    others = {name: value for name, value in search.best.values.items() if name != key}
    line = {
        float(one.values[key]): one.trials
        for one in search.candidates
        if key in one.values and {n: v for n, v in one.values.items() if n != key} == others and math.isfinite(one.loss)
    }
    points = sorted(line)
    best = float(search.best.values.get(key, math.nan))
    at = points.index(best) if best in line else 0
    if at == 0 or at == len(points) - 1 or points[0] <= 0:
        return None
    near = points[at - 1 : at + 2]
    # The best settings may have run on further seeds, on which their neighbours are unknown.
    shared = set.intersection(*({trial.seed for trial in line[point]} for point in near))
    losses = [np.mean([trial.loss for trial in line[point] if trial.seed in shared]) for point in near if shared]
    if not losses:
        return None
    a, b, c = np.polyfit(np.log(near) - np.log(best), losses, 2)
    return 0.0 if a <= 0 else max(0.0, float(losses[1] - (c - b * b / (4 * a))))


def _side(arm: Arm, values: Sequence[float], key: str, value: float, *, full: bool) -> str | None:
    """Return whether the value is the "lowest" or "highest" of those tried, ascending; None inside.

    The points of a full search over ranges leave a gap at the ends of each; a re-tuning tries steps.
    """
    space = arm.search.get(key)
    if full and isinstance(space, Mapping) and "low" in space and "high" in space:
        low, high = float(space["low"]), float(space["high"])
        if space.get("scale") == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        place = (value - low) / (high - low)
        return "lowest" if place <= _NEAR else "highest" if place >= 1 - _NEAR else None
    # Zero (no weight decay, no warm-up) is a natural limit, not an edge of the search.
    if value == values[0] and value != 0:
        return "lowest"
    return "highest" if value == values[-1] else None
