"""Hyper-parameter searches, written as generators.

A search yields a batch of points that may run in parallel, is sent their losses, and returns the best point. It keeps no
other state, so a killed study replays the search from its records and continues at the same point.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studies.spec import Choices, Range, Space, Value, rounded

Point = dict[str, Value]
# Yields points to try, is sent their losses (nats; infinite for a diverged run), returns the best point.
Search = Generator[list[Point], list[float], Point]

# After two halvings, the distance between neighbouring values is within the noise of a seed.
_FINEST = 2


@dataclass(frozen=True)
class Replay:
    """The state of a search, given the recorded losses."""

    asked: tuple[Point, ...]  # every distinct point so far, in order
    best: Point | None  # the result; None while losses are missing


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
                return Replay(tuple(asked), None)
            batch = search.send(known)
    except StopIteration as stop:
        return Replay(tuple(asked), stop.value)


def start_point(search: Mapping[str, Space]) -> Point:
    """Return the default starting point of a search."""
    return {key: space.first for key, space in search.items()}


def settled(point: Point) -> Search:
    """A search that returns a known point without trials."""
    yield from ()
    return point


def best_of(candidates: Sequence[Point]) -> Search:
    """Try the given points in one batch; of equal losses, the first counts."""
    losses = yield list(candidates)
    return candidates[int(np.argmin(losses))]


def quasi_random(search: Mapping[str, Range], budget: int, *, method: str) -> Search:
    """Try the start point, then points of a scrambled Halton sequence (method "halton") or uniform ones ("random")."""
    rng = np.random.default_rng(0)
    if method == "halton":
        from scipy.stats import qmc  # slow to import

        uniform = qmc.Halton(d=len(search), scramble=True, rng=rng).random(budget)[: budget - 1]
    else:
        uniform = rng.random((budget - 1, len(search)))
    candidates = [start_point(search)]
    for row in uniform.tolist():
        candidates.append({key: space.at(share) for (key, space), share in zip(search.items(), row, strict=True)})
    return best_of(candidates)


def coordinate_descent(
    search: Mapping[str, Space],
    start: Point,
    budget: int,
    *,
    threshold: float = 0.0,
    keys: Sequence[str] = (),
    follow_at_once: bool = False,
) -> Search:
    """Search one key at a time: a round tries both neighbours of each key, then follows the moves that improved.

    A move must lower the loss by more than `threshold` nats. When no neighbour improves, the distance between neighbours
    is halved, until the budget is spent: every arm gets the same number of trials.

    Args:
        search: spaces by key; of a range, the neighbours are quarters of it.
        start: the first point; may have keys that are not searched.
        budget: maximum number of points.
        keys: the keys to search; default: all of `search`.
        follow_at_once: follow a move before the next key is tried. A long way may then leave nothing for later keys.
    """
    spaces = {key: search[key].ladder for key in (keys or search) if key in search}
    best = dict(start)
    losses: dict[tuple[Value, ...], float] = {}

    def loss(point: Point) -> float:
        return losses[tuple(point.values())]

    def tried(points: Sequence[Point]) -> Generator[list[Point], list[float], list[Point]]:
        """Try points as far as the budget allows; return those with a loss."""
        fresh = [point for point in points if tuple(point.values()) not in losses][: budget - len(losses)]
        if fresh:
            losses.update(zip((tuple(point.values()) for point in fresh), (yield fresh), strict=True))
        return [point for point in points if tuple(point.values()) in losses]

    def moved(key: str, directions: Sequence[int]) -> Generator[list[Point], list[float], int]:
        """Move `best` to the better neighbour and return the direction; 0 if none is better."""
        nonlocal best
        sides = {one: _neighbour(spaces[key], best[key], one, level) for one in directions}
        known = yield from tried([{**best, key: value} for value in sides.values() if value is not None])
        better = [point for point in known if loss(point) < loss(best) - threshold]
        if not better:
            return 0
        best = min(better, key=loss)
        return next(direction for direction, value in sides.items() if value == best[key])

    yield from tried([best])
    groups = [[key] for key in spaces] if follow_at_once else [list(spaces)]
    level = turn = 0
    while level <= _FINEST and len(losses) < budget:
        any_move = False
        for group in groups:
            moves: dict[str, int] = {}
            for position, key in enumerate(group):
                # If one trial is left for two neighbours, it must not always go to the lower one.
                upper_first = (position + turn) % 2 and not follow_at_once
                moves[key] = yield from moved(key, (1, -1) if upper_first else (-1, 1))
            any_move |= any(moves.values())
            for key, direction in moves.items():
                while direction:
                    direction = yield from moved(key, [direction])
        turn += 1
        level += not any_move
    return best


def _neighbour(choices: Choices, value: Value, direction: int, level: int) -> Value | None:
    """Return the next listed value in a direction, or one 2^-level of the way to it; None beyond an end."""
    values = choices.values
    if level == 0 and value in values and 0 <= (index := values.index(value) + direction) < len(values):
        return values[index]
    numbers = [float(one) for one in values if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(values) < 2 or len(numbers) < len(values):
        return None
    place, back = (math.log, math.exp) if choices.widen else (float, float)
    places, at = sorted(map(place, numbers)), place(float(value))
    if numbers[-1] < numbers[0]:
        direction = -direction
    index = (bisect_right if direction > 0 else bisect_left)(places, at) - 1
    index = min(max(index, 0), len(places) - 2)
    target = at + direction * (places[index + 1] - places[index]) / 2**level
    if not choices.widen and not places[0] <= target <= places[-1]:
        return None
    found: Value = rounded(back(target))
    if all(isinstance(one, int) for one in values):
        found = round(back(target))
    return None if found == value else found
