"""Scaling fits recover known laws and qualify extrapolations."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.scaling import scaling_law, trend
from analysis.speedup import Endpoints, SpeedUp, fit_baseline, speed_ups

SIZES = (1e6, 4e6, 16e6, 64e6)


def ends(losses: np.ndarray) -> Endpoints:
    n = len(losses)
    one = np.ones(n)
    return Endpoints("adamw", "tiny", 100, tuple(range(n)), losses, 1e6 * one, one, one)


def test_loss_against_size_is_recovered_with_a_band_that_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        cells = [ends(2 + 1.5 * (size / 1e6) ** -0.3 + rng.normal(0, 0.003, 5)) for size in SIZES]
        law = scaling_law("adamw", "parameters", SIZES, cells)
        assert law is not None
        _, low, high = law.band([8e6])
        inside += bool(low[0] <= 2 + 1.5 * 8**-0.3 <= high[0])
    assert inside / 200 > 0.9


def test_a_band_widens_beyond_the_data() -> None:
    rng = np.random.default_rng(1)
    cells = [ends(2 + 1.5 * (size / 1e6) ** -0.3 + rng.normal(0, 0.003, 5)) for size in SIZES]
    law = scaling_law("adamw", "parameters", SIZES, cells)
    assert law is not None
    _, low, high = law.band([16e6, 64e8])
    assert high[1] - low[1] > 3 * (high[0] - low[0])


def test_two_sizes_are_no_law() -> None:
    assert (
        scaling_law("adamw", "parameters", SIZES[:2], [ends(np.array([3.0, 3.1])), ends(np.array([2.9, 3.0]))]) is None
    )


def a_speed_up(ratio: float, error: float = 0.01) -> SpeedUp:
    baseline = fit_baseline(
        [
            replace(ends(3.0 - i + np.array([0, 1e-3])), horizon=100 * 2**i, tokens=np.full(2, 1e6 * 2**i))
            for i in range(2)
        ]
    )
    (result,) = speed_ups([replace(ends(np.array([2.5, 2.501])), arm="lion")], baseline, "steps")
    return replace(result, estimate=ratio, estimate_censored=None, log_standard_error=error)


def test_a_ratio_that_falls_with_size_is_seen_and_extrapolated_with_a_warning() -> None:
    results = [a_speed_up(2.0 * (size / 1e6) ** -0.1) for size in SIZES]
    found = trend(results, [1e8] * 4, SIZES)
    assert found is not None
    assert found.names == ("constant", "parameters")
    slope = found.slope("parameters")
    assert slope is not None
    assert slope.estimate == pytest.approx(-0.1)
    assert not slope.low <= 0 <= slope.high
    assert found.slope("tokens") is None
    assert math.exp(found.at(tokens=1e8, parameters=1e9).estimate) == pytest.approx(2.0 * 1000**-0.1)
    assert "extrapolation 15.6 times beyond the parameters" in found.worth(tokens=1e8, parameters=1e9)
    assert found.worth(tokens=1e8, parameters=5e6).startswith("Within the range")


def test_censored_estimates_are_bounds_and_do_not_enter_a_trend() -> None:
    results = [a_speed_up(1.2), replace(a_speed_up(1.3), estimate_censored="above")]
    assert trend(results, [1e8, 2e8], [1e6, 1e6]) is None


def test_points_that_scatter_more_than_their_errors_widen_the_trends_interval_by_students_t() -> None:
    ratios = (1.3, 1.1, 1.35, 1.05)
    results = [a_speed_up(ratio, error=0.001) for ratio in ratios]
    found = trend(results, [1e8] * 4, SIZES)
    assert found is not None
    expected = stats.linregress(np.log(SIZES), np.log(ratios))
    slope = found.slope("parameters")
    assert slope is not None
    assert slope.estimate == pytest.approx(expected.slope)
    assert slope.high - slope.estimate == pytest.approx(stats.t.ppf(0.975, 2) * expected.stderr)
