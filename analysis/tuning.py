"""Results of the hyper-parameter searches: settings tried, best settings, and whether these are at an edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.trials import Arm, Cell, RecordedTrial, Study

# A random or Halton point this close to the end of its range (in units of the range) counts as at the edge.
_NEAR = 0.05


@dataclass(frozen=True)
class Candidate:
    """One setting of the searched hyper-parameters, over its seeds."""

    values: Mapping[str, Any]
    loss: float  # mean final validation loss, nats; infinite unless all of its runs completed
    trials: tuple[RecordedTrial, ...]


@dataclass(frozen=True)
class Edge:
    """A value at an end of what its search tried: the optimum may lie outside."""

    arm: str
    model: str
    horizon: int  # at which the value is used
    key: str
    value: float
    side: str  # "lowest" or "highest"
    inherited_from: str  # the search that chose the value, as "64 steps", if the key was not searched here


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
    def diverged(self) -> int:
        return sum(trial.status == "diverged" for candidate in self.candidates for trial in candidate.trials)


def tunings(study: Study) -> list[Tuning]:
    """Return the searches of a study, one for each arm, model and horizon with finished tuning trials."""
    cells: dict[Cell, list[RecordedTrial]] = {}
    for trial in study.tuning:
        if trial.run is not None and trial.status in ("completed", "diverged"):
            cells.setdefault(trial.cell, []).append(trial)
    chosen = {trial.cell: trial.values for trial in study.reporting if trial.values}
    found = []
    for cell, trials in sorted(cells.items()):
        settings = candidates(trials)
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
                if side := _side(study.arms[arm], points, key, value):
                    place = "" if source.model == model else f"{source.model}, "
                    place = "" if source.cell == cell else f"{place}{source.horizon:,} steps"
                    found.append(Edge(arm, model, horizon, key, float(value), side, place))
                break
    return found


def candidates(trials: Sequence[RecordedTrial]) -> list[Candidate]:
    """Group trials with the same values, best first."""
    groups: dict[str, list[RecordedTrial]] = {}
    for trial in trials:
        groups.setdefault(repr(sorted(trial.values.items())), []).append(trial)
    found = []
    for members in groups.values():
        losses = [trial.loss for trial in members]
        loss = float(np.mean(losses)) if np.all(np.isfinite(losses)) else math.inf
        found.append(Candidate(members[0].values, loss, tuple(members)))
    return sorted(found, key=lambda candidate: candidate.loss)


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


def _side(arm: Arm, values: Sequence[float], key: str, value: float) -> str | None:
    """Return whether the value is the "lowest" or "highest" of those tried, ascending; None inside."""
    space = arm.search.get(key)
    if isinstance(space, Mapping) and "low" in space and "high" in space:
        low, high = float(space["low"]), float(space["high"])
        if space.get("scale") == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        place = (value - low) / (high - low)
        return "lowest" if place <= _NEAR else "highest" if place >= 1 - _NEAR else None
    # Zero (no weight decay, no warm-up) is a natural limit, not an edge of the search.
    if value == values[0] and value != 0:
        return "lowest"
    return "highest" if value == values[-1] else None
