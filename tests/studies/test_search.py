"""Searches find the optimum, never exceed their budget, and resume from a record as if never interrupted."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.search import (
    Point,
    Search,
    best_of,
    coordinate_descent,
    quasi_random,
    replay,
    start_point,
)
from studies.spec import Choices, Range, Space, points


def run(search: Search, loss: Callable[[Point], float]) -> tuple[Point, list[Point]]:
    """A search to its end, all losses known."""
    found = replay(search, loss)
    assert found.best is not None
    return found.best, list(found.asked)


def bowl(optimum: float, curvature: float = 1.0) -> Callable[[Point], float]:
    """Quadratic in the logarithm of the rate and in the momentum, which interact a little."""

    def loss(point: Point) -> float:
        rate, momentum = math.log(float(point["lr"]) / optimum), float(point["beta"]) - 0.9
        return 3.0 + curvature * rate**2 + 20 * momentum**2 + 0.5 * rate * momentum

    return loss


SPACE: dict[str, Space] = {
    "lr": Choices(values=(1e-3, 2e-3, 4e-3), widen=True),
    "beta": Choices(values=(0.7, 0.8, 0.9, 0.95)),
}


@settings(max_examples=40, deadline=None)
@given(exponent=st.floats(-4, 4), budget=st.integers(1, 40))
def test_coordinate_descent_never_exceeds_its_budget_and_never_asks_twice(exponent: float, budget: int) -> None:
    best, asked = run(coordinate_descent(SPACE, start_point(SPACE), budget), bowl(2e-3 * 2**exponent))
    assert len(asked) <= budget
    assert len({tuple(sorted(point.items())) for point in asked}) == len(asked)
    assert bowl(2e-3 * 2**exponent)(best) == min(map(bowl(2e-3 * 2**exponent), asked))


@settings(max_examples=40, deadline=None)
@given(exponent=st.floats(-4, 4))
def test_an_optimum_beyond_the_given_values_is_found_by_widening(exponent: float) -> None:
    optimum = 2e-3 * 2**exponent
    best, _ = run(coordinate_descent(SPACE, start_point(SPACE), 40), bowl(optimum))
    assert abs(math.log2(float(best["lr"]) / optimum)) < 0.3
    assert best["beta"] == 0.9


def test_without_widening_no_value_outside_the_ends_is_tried() -> None:
    space: dict[str, Space] = {"lr": Choices(values=(1e-3, 2e-3, 4e-3)), "beta": Choices(values=(0.8, 0.9))}
    _, asked = run(coordinate_descent(space, start_point(space), 40), bowl(1.0))
    assert all(1e-3 <= float(point["lr"]) <= 4e-3 and 0.8 <= float(point["beta"]) <= 0.9 for point in asked)


def test_the_budget_is_spent_in_full_so_that_every_arm_gets_the_same() -> None:
    for optimum in (5e-4, 2e-3, 3e-3):
        _, asked = run(coordinate_descent(SPACE, start_point(SPACE), 12), bowl(optimum))
        assert len(asked) == 12


def test_an_improvement_below_the_threshold_does_not_move_the_search() -> None:
    flat = bowl(2.2e-3, curvature=1e-4)
    best, _ = run(coordinate_descent(SPACE, start_point(SPACE), 10, threshold=0.01), flat)
    assert best == start_point(SPACE)


def test_a_budget_of_one_round_tries_the_neighbours_of_every_key() -> None:
    """Also if the first key's optimum is so far away that following it would take the whole budget."""
    space: dict[str, Space] = {**SPACE, "eps": Choices(values=(1e-12, 1e-7), start=1e-12)}
    _, asked = run(coordinate_descent(space, start_point(space), 6), bowl(1.0))  # 1 + 2 + 2 + 1
    assert {point["eps"] for point in asked} == {1e-12, 1e-7}
    assert {point["beta"] for point in asked} == {0.8, 0.9, 0.95}
    _, asked = run(coordinate_descent(space, start_point(space), 6, follow_at_once=True), bowl(1.0))
    assert {point["eps"] for point in asked} == {1e-12}


def test_a_last_single_trial_goes_to_either_side() -> None:
    def last_side(position: int) -> float:
        """Flat, so that nothing moves: one trial is left for the key at this position."""
        keys = {f"key{i}": Choices(values=(1.0, 2.0, 3.0)) for i in range(3)}
        _, asked = run(coordinate_descent(keys, start_point(keys), 2 + 2 * position), lambda _: 1.0)
        return float(asked[-1][f"key{position}"])

    assert {last_side(position) for position in range(3)} == {1.0, 3.0}


def test_a_diverged_start_is_left_behind() -> None:
    def loss(point: Point) -> float:
        return math.inf if float(point["lr"]) > 1.5e-3 else 3.0

    best, _ = run(coordinate_descent(SPACE, start_point(SPACE), 8), loss)
    assert best["lr"] == 1e-3


def test_retuning_changes_only_the_named_keys() -> None:
    start: Point = {"lr": 3e-3, "beta": 0.95, "weight_decay": 0.1}
    best, asked = run(coordinate_descent(SPACE, start, 4, keys=["lr"]), bowl(8e-3))
    assert {point["beta"] for point in asked} == {0.95}
    assert {point["weight_decay"] for point in asked} == {0.1}
    assert float(best["lr"]) > 3e-3, "from a start between the given values the search goes on"


@pytest.mark.parametrize("values", [("cosine", "wsd"), (True, False)])
def test_values_that_are_no_numbers_are_searched_in_their_order(values: tuple[str | bool, ...]) -> None:
    space: dict[str, Space] = {"what": Choices(values=values, start=values[0])}
    best, asked = run(coordinate_descent(space, start_point(space), 9), lambda p: float(p["what"] == values[0]))
    assert best == {"what": values[1]}
    assert len(asked) == 2


def test_whole_numbers_stay_whole() -> None:
    space: dict[str, Space] = {"k": Choices(values=(1, 10, 100), widen=True)}
    _, asked = run(coordinate_descent(space, start_point(space), 9), lambda p: abs(math.log(float(p["k"]) / 30)))
    assert all(float(point["k"]).is_integer() for point in asked)
    assert len(asked) > 4


def test_a_grid_asks_every_combination_at_once() -> None:
    assert len(replay(best_of(points(SPACE)), lambda point: None).asked) == 12
    best, _ = run(best_of(points(SPACE)), bowl(4e-3))
    assert best == {"lr": 4e-3, "beta": 0.9}


@pytest.mark.parametrize("method", ["halton", "random"])
def test_quasi_random_points_fill_the_ranges_and_are_reproducible(method: str) -> None:
    space = {"lr": Range(low=1e-4, high=1e-2), "beta": Range(low=0.7, high=0.95, scale="linear")}
    first, second = (replay(quasi_random(space, 64, method=method), lambda _: None).asked for _ in range(2))
    assert first == second
    assert all(1e-4 <= float(p["lr"]) <= 1e-2 and 0.7 <= float(p["beta"]) <= 0.95 for p in first)
    below = sum(float(point["lr"]) < 1e-3 for point in first)
    assert 20 <= below <= 44, "uniform in the logarithm"


@settings(max_examples=40, deadline=None)
@given(exponent=st.floats(-3, 3), known=st.integers(0, 12))
def test_an_interrupted_search_yields_the_same_next_points(exponent: float, known: int) -> None:
    loss = bowl(2e-3 * 2**exponent)
    best, asked = run(coordinate_descent(SPACE, start_point(SPACE), 12), loss)
    record = {tuple(sorted(point.items())): loss(point) for point in asked[:known]}
    again = replay(
        coordinate_descent(SPACE, start_point(SPACE), 12), lambda point: record.get(tuple(sorted(point.items())))
    )
    assert list(again.asked) == asked[: len(again.asked)]
    assert again.best == (best if known == 12 else None)
