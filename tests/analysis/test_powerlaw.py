"""The baseline's loss curve: exact on exact data, its weights the true derivatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from analysis.powerlaw import fit_power_law

HORIZONS = np.array([1e6, 2e6, 4e6, 8e6])


@given(floor=st.floats(0.5, 4), scale=st.floats(0.2, 3), exponent=st.floats(0.1, 1.0))
def test_an_exact_power_law_is_recovered(floor: float, scale: float, exponent: float) -> None:
    losses = floor + scale * (HORIZONS / 1e6) ** -exponent
    fitted = fit_power_law(np.log(HORIZONS), losses)
    assert fitted.floor == pytest.approx(floor, abs=2e-3)
    assert fitted.exponent == pytest.approx(exponent, rel=5e-3)
    between = np.log(3.1e6)
    assert float(fitted.value(between)) == pytest.approx(floor + scale * 3.1**-exponent, abs=1e-6)


def test_the_fit_is_the_least_squares_optimum_of_an_independent_solver() -> None:
    losses = np.array([4.213, 3.871, 3.655, 3.490])

    def law(x: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return floor + scale * np.exp(-exponent * (x - np.log(3e6)))

    x = np.log(HORIZONS)
    parameters, _ = optimize.curve_fit(law, x, losses, p0=(3.0, 0.5, 0.4))
    np.testing.assert_allclose(fit_power_law(x, losses).value(x), law(x, *parameters), atol=1e-7)


def test_weights_are_the_derivatives_of_the_refitted_curve() -> None:
    """Seed noise enters the interval through these weights."""
    x = np.log(HORIZONS)
    at = np.log([1.5e6, 5e6])
    # The weights are Gauss-Newton's, exact where the residuals vanish: start from losses that lie on a power law.
    y = fit_power_law(x, np.array([4.213, 3.871, 3.655, 3.490])).value(x)
    h = 1e-5
    numeric = np.stack(
        [(fit_power_law(x, y + h * e).value(at) - fit_power_law(x, y - h * e).value(at)) / (2 * h) for e in np.eye(4)],
        axis=-1,
    )
    weights = fit_power_law(x, y).weights(at)
    np.testing.assert_allclose(weights, numeric, atol=2e-3)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-9)


@given(floor=st.floats(0.0, 4), exponent=st.floats(0.1, 1.0), loss=st.floats(0.1, 5))
def test_inverse_undoes_value_and_is_infinite_below_the_floor(floor: float, exponent: float, loss: float) -> None:
    curve = fit_power_law(np.log(HORIZONS), floor + (HORIZONS / 1e6) ** -exponent)
    if loss > curve.floor + 1e-6:
        assert float(curve.value(curve.inverse(loss))) == pytest.approx(loss)
    elif loss < curve.floor:
        assert curve.inverse(loss) == np.inf


def test_a_curve_that_does_not_flatten_keeps_a_floor_that_is_not_negative() -> None:
    fitted = fit_power_law(np.log(HORIZONS), np.array([4.0, 3.0, 2.0, 1.0]))
    assert fitted.floor == 0.0
    assert "floor" in fitted.at_bound
