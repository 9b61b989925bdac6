"""Intervals, corrections and power against scipy, against simulation and against textbook values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis import statistics
from analysis.statistics import (
    holm,
    own_variance,
    paired_interval,
    paired_p,
    pooled_variance,
    power,
    seeds_to_decide,
    smallest_detectable_difference,
)

few = arrays(np.float64, st.integers(2, 8), elements=st.floats(-1, 1, width=32)).filter(lambda x: np.ptp(x) > 1e-3)


@given(few)
def test_interval_and_p_are_those_of_scipys_t_test(values: np.ndarray) -> None:
    expected = stats.ttest_1samp(values, 0.0)
    interval = paired_interval(values)
    low, high = expected.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert paired_p(values) == pytest.approx(expected.pvalue)


@given(few, st.floats(-1, 1))
def test_an_interval_excludes_a_value_just_where_the_test_rejects_it(values: np.ndarray, null: float) -> None:
    p = paired_p(values, null=null)
    if abs(p - 0.05) > 1e-6:
        interval = paired_interval(values)
        assert (not interval.low <= null <= interval.high) == (p < 0.05)


def test_one_seed_decides_nothing() -> None:
    interval = paired_interval([0.3])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert paired_p([0.3]) == 1.0


def test_the_pooled_variance_is_that_of_all_groups_about_their_own_means() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1.0, 5) for mean in (0, 3, -2)]
    pooled = pooled_variance(groups)
    assert pooled is not None
    residuals = np.concatenate([group - group.mean() for group in groups])
    assert pooled.value == pytest.approx(residuals @ residuals / 12)
    assert pooled.degrees_of_freedom == 12
    assert pooled.homogeneity_p == pytest.approx(stats.bartlett(*groups).pvalue)


def test_variances_that_differ_are_not_pooled() -> None:
    rng = np.random.default_rng(0)
    assert pooled_variance([rng.normal(0, 1, 8), rng.normal(0, 30, 8)]) is None


def test_groups_without_any_spread_are_alike() -> None:
    pooled = pooled_variance([[1.0, 1.0], [2.0, 2.0]])
    assert pooled is not None
    assert pooled.value == 0.0


def test_holm_gives_the_textbook_values_in_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == []


@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_holm_never_lowers_a_p_value_and_never_exceeds_bonferroni(p: np.ndarray) -> None:
    adjusted = holm(p)
    assert np.all(adjusted >= p)
    assert np.all(adjusted <= np.minimum(1.0, len(p) * p) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0)


def test_power_is_the_rejection_rate_of_a_simulation() -> None:
    rng = np.random.default_rng(1)
    for seeds, effect in ((3, 2.0), (5, 1.0), (5, 0.0)):
        samples = rng.normal(effect, 1.0, (40_000, seeds))
        t = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / math.sqrt(seeds))
        rate = np.mean(np.abs(t) > stats.t.ppf(0.975, seeds - 1))
        assert power(effect, 1.0, seeds) == pytest.approx(rate, abs=0.01)


@given(seeds=st.integers(2, 40), deviation=st.floats(1e-4, 10))
def test_the_smallest_detectable_difference_is_found_four_times_in_five(seeds: int, deviation: float) -> None:
    difference = smallest_detectable_difference(deviation, seeds)
    assert power(difference, deviation, seeds) == pytest.approx(0.8, abs=1e-4)


def test_pooled_degrees_of_freedom_let_a_study_see_more() -> None:
    assert smallest_detectable_difference(1.0, 3, freedom=6) < 0.6 * smallest_detectable_difference(1.0, 3)


@given(st.floats(0.1, 3))
def test_seeds_to_decide_is_the_smallest_number_with_the_power_asked_for(effect: float) -> None:
    seeds = seeds_to_decide(effect, 1.0)
    assert seeds is not None
    assert power(effect, 1.0, seeds) >= 0.8
    assert seeds == 2 or power(effect, 1.0, seeds - 1) < 0.8


def test_no_number_of_seeds_decides_about_no_effect() -> None:
    assert seeds_to_decide(0.0, 1.0) is None
    assert seeds_to_decide(1e-6, 1.0) is None


def test_a_diverged_run_cannot_slip_into_a_mean() -> None:
    for function in (own_variance, paired_interval, statistics.paired_p):
        with pytest.raises(ValueError, match="diverged"):
            function([0.1, float("nan")])
