"""Time to target: the first crossing, interpolated on the log axis, censored if there is none."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.runs import Curve
from analysis.target import first_crossing, time_to_target, times_to_target


def curve(steps: list[float], losses: list[float]) -> Curve:
    spent = np.array(steps, dtype=float)
    return Curve(spent, 100 * spent, 7e9 * spent, 0.5 * spent, {"val_loss": np.array(losses, dtype=float)})


def test_between_evaluations_the_loss_is_linear_in_the_logarithm() -> None:
    found = time_to_target(curve([0, 100, 400], [9.0, 5.0, 4.0]), 4.5, "steps")
    assert found.reached
    assert found.spent == pytest.approx(200.0)


@given(
    scale=st.floats(0.5, 3), exponent=st.floats(0.05, 1.5), share=st.floats(0.05, 0.95), factor=st.floats(1.001, 1.3)
)
def test_the_crossing_is_exact_for_a_curve_linear_in_log_steps(
    scale: float, exponent: float, share: float, factor: float
) -> None:
    spent = 10.0 * factor ** np.arange(30)
    loss = 5 - scale * exponent * np.log(spent)
    target = loss[-1] + share * (loss[0] - loss[-1])
    assert first_crossing(spent, loss, target) == pytest.approx(math.exp((5 - target) / (scale * exponent)), rel=1e-6)


def test_the_first_crossing_counts_even_if_the_loss_rises_again() -> None:
    found = time_to_target(curve([1, 2, 3, 4], [5.0, 3.9, 4.5, 3.0]), 4.0, "steps")
    assert 1 < found.spent < 2


def test_a_target_that_is_not_reached_is_censored_at_all_that_was_spent() -> None:
    found = time_to_target(curve([0, 10, 20], [9.0, 5.0, 4.0]), 3.9, "flops")
    assert not found.reached
    assert found.spent == 20 * 7e9
    assert str(found) == "not reached"


def test_an_evaluation_that_is_not_finite_neither_reaches_nor_interpolates() -> None:
    found = time_to_target(curve([1, 2, 3], [5.0, math.nan, 3.0]), 4.0, "steps")
    assert found.spent == 3


def test_a_loss_at_the_target_from_the_start_costs_nothing() -> None:
    assert time_to_target(curve([0, 10], [3.0, 2.0]), 4.0, "steps").spent == 0


def test_before_the_first_step_the_interpolation_is_linear() -> None:
    assert time_to_target(curve([0, 10], [10.0, 0.0]), 7.5, "steps").spent == pytest.approx(2.5)


def test_currencies_that_are_proportional_cross_at_the_same_point() -> None:
    found = times_to_target(curve([0, 100, 400], [9.0, 5.0, 4.0]), 4.3)
    assert found["tokens"].spent == pytest.approx(100 * found["steps"].spent)
    assert found["flops"].spent == pytest.approx(7e9 * found["steps"].spent)
    assert found["seconds"].spent == pytest.approx(0.5 * found["steps"].spent)


def test_a_run_without_evaluations_is_an_error() -> None:
    with pytest.raises(ValueError, match="no evaluation"):
        time_to_target(curve([], []), 4.0, "steps")
