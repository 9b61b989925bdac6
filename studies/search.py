"""Hyper-parameter searches, written as generators.

A search yields a batch of points that may run in parallel, is sent their losses, and returns the best point. It keeps no
other state, so a killed study replays the search from its records and continues at the same point.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studies.spec import Choices, Range, Space, Value, points

Point = dict[str, Value]
# Yields points to try, is sent their losses (nats; infinite for a diverged run), returns the best point.
Search = Generator[list[Point], list[float], Point]

# After two halvings, the distance between neighbouring values is within the noise of a seed.
_FINEST = 2
_DIGITS = 4  # significant digits of generated values


@dataclass(frozen=True)
class Replay:
    """The state of a search, given the recorded losses."""

    asked: tuple[Point, ...]  # every distinct point so far, in order
    waiting: tuple[Point, ...]  # those without a loss
    best: Point | None  # the result; None while points are waiting

    @property
    def finished(self) -> bool:
        return self.best is not None


def replay(search: Search, loss_of: Callable[[Point], float | None]) -> Replay:
    """Send recorded losses to a search until it returns its result or asks for an unknown one."""
    asked: list[Point] = []
    try:
        batch = next(search)
        while True:
            asked += [point for point in batch if point not in asked]
            losses = [loss_of(point) for point in batch]
            known = [loss for loss in losses if loss is not None]
            if len(known) < len(batch):
                waiting = [point for point, loss in zip(batch, losses, strict=True) if loss is None]
                return Replay(tuple(asked), tuple(waiting), None)
            batch = search.send(known)
    except StopIteration as stop:
        return Replay(tuple(asked), (), stop.value)


def start_point(search: Mapping[str, Space]) -> Point:
    """Return the default starting point of a search."""
    return {key: _rounded(space.first) for key, space in search.items()}


def settled(point: Point) -> Search:
    """A search that returns a known point without trials."""
    yield from ()
    return point


def grid(search: Mapping[str, Space]) -> Search:
    """Try all combinations in one batch."""
    everything = points(search)
    losses = yield everything
    return everything[int(np.argmin(losses))]


def quasi_random(search: Mapping[str, Space], budget: int, *, method: str, seed: int = 0) -> Search:
    """Try `budget` points of a scrambled Halton sequence (method "halton") or of uniform random numbers ("random")."""
    if method == "halton":
        from scipy.stats import qmc  # slow to import

        uniform = qmc.Halton(d=len(search), scramble=True, rng=np.random.default_rng(seed)).random(budget)
    else:
        uniform = np.random.default_rng(seed).random((budget, len(search)))
    chosen: list[Point] = []
    for row in uniform:
        point: Point = {}
        for (key, space), share in zip(search.items(), row, strict=True):
            assert isinstance(space, Range)
            point[key] = _rounded(_between(space, float(share)))
        chosen.append(point)
    losses = yield chosen
    return chosen[int(np.argmin(losses))]


def coordinate_descent(
    search: Mapping[str, Space], start: Point, budget: int, *, threshold: float = 0.0, keys: Sequence[str] = ()
) -> Search:
    """Search one key at a time: try both neighbours and follow the direction that improves, until none does.

    A move must lower the loss by more than `threshold` nats, so that the search does not follow noise. When no
    neighbour improves, the distance between neighbours is halved, until the budget is spent: every arm gets the same
    number of trials.

    Args:
        search: ordered choices by key.
        start: the first point; may have keys that are not searched.
        budget: maximum number of points.
        keys: the keys to search; default: all of `search`.
    """
    moving = [key for key in (keys or search) if key in search]
    losses: dict[tuple[tuple[str, Value], ...], float] = {}

    def loss(point: Point) -> float:
        return losses[_identity(point)]

    def unknown(candidates: Sequence[Point]) -> list[Point]:
        fresh = [point for point in candidates if _identity(point) not in losses]
        return fresh[: budget - len(losses)]

    def note(tried: Sequence[Point], results: Sequence[float]) -> None:
        losses.update({_identity(point): result for point, result in zip(tried, results, strict=True)})

    best = dict(start)
    note([best], (yield [best]))
    level = 0
    while level <= _FINEST and len(losses) < budget:
        moved = False
        for key in moving:
            values = _ladder(search[key], level)
            sides = [_step(best, key, values, direction) for direction in (-1, 1)]
            candidates = [point for point in sides if point is not None]
            fresh = unknown(candidates)
            if fresh:
                note(fresh, (yield fresh))
            tried = [point for point in candidates if _identity(point) in losses]
            while tried and min(map(loss, tried)) < loss(best) - threshold:
                previous, best = best, min(tried, key=loss)
                moved = True
                direction = values.direction(previous[key], best[key])
                onward = _step(best, key, values, direction)
                fresh = unknown([onward]) if onward is not None else []
                if fresh:
                    note(fresh, (yield fresh))
                tried = [onward] if onward is not None and _identity(onward) in losses else []
        if not moved:
            level += 1
    return best


@dataclass(frozen=True)
class _Ladder:
    """The values of a key in order, with their neighbours at a given resolution."""

    space: Choices
    level: int  # number of times the distance between neighbours has been halved

    def next(self, value: Value, direction: int) -> Value | None:
        """Return the neighbour of a value, or None beyond the end."""
        values = self.space.values
        numeric = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)
        if self.level == 0 and value in values:
            index = values.index(value) + direction
            if 0 <= index < len(values):
                return values[index]
            return self._beyond(direction, value) if self.space.widen else None
        if not numeric or len(values) < 2:
            return None
        return self._between(float(value), direction)

    def direction(self, before: Value, after: Value) -> int:
        if before in self.space.values and after in self.space.values:
            return 1 if self.space.values.index(after) > self.space.values.index(before) else -1
        ascending = float(self.space.values[-1]) > float(self.space.values[0])
        return 1 if (float(after) > float(before)) == ascending else -1

    def _beyond(self, direction: int, value: Value) -> Value:
        ends = self.space.values[-2:] if direction > 0 else self.space.values[1::-1]
        return _rounded(float(value) * float(ends[1]) / float(ends[0]))

    def _between(self, value: float, direction: int) -> Value | None:
        """Move a fraction of the distance to the neighbouring value, in logarithms if all values are positive."""
        values = [float(one) for one in self.space.values]
        rising = direction if values[-1] > values[0] else -direction
        logarithmic = min(values) > 0 and self.space.widen
        place = [math.log(one) for one in values] if logarithmic else values
        at = math.log(value) if logarithmic else value
        ordered = sorted(place)
        inside = ordered[0] <= at <= ordered[-1]
        if not inside and not self.space.widen:
            return None
        gaps = np.diff(ordered)
        index = min(
            max(int(np.searchsorted(ordered, at, side="right" if rising > 0 else "left")) - 1, 0), len(gaps) - 1
        )
        target = at + rising * float(gaps[index]) / 2**self.level
        if not self.space.widen and not ordered[0] <= target <= ordered[-1]:
            return None
        number = _rounded(math.exp(target) if logarithmic else target)
        if all(isinstance(one, int) for one in self.space.values):
            number = round(float(number))
        return None if number == value else number


def _ladder(space: Space, level: int) -> _Ladder:
    if not isinstance(space, Choices):
        raise TypeError("a coordinate search needs values, not a range")
    return _Ladder(space, level)


def _step(point: Point, key: str, values: _Ladder, direction: int) -> Point | None:
    value = values.next(point[key], direction)
    return None if value is None else {**point, key: value}


def _identity(point: Point) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted(point.items()))


def _between(space: Range, share: float) -> float:
    if space.scale == "log":
        return space.low * (space.high / space.low) ** share
    return space.low + share * (space.high - space.low)


def _rounded(value: Value) -> Value:
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{_DIGITS}g}")
    return value
