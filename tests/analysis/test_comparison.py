"""Paired contrasts, the curve's self-test, ratios and verdicts: against independent calculations and on the committed study
in which the first version of the analysis drew wrong conclusions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.comparison import (
    ArmDiverged,
    Baseline,
    Compared,
    Contrast,
    Endpoints,
    Ratio,
    compare,
    contrast,
    fit_baseline,
    paired_interval,
    ratio,
    smallest_detectable,
)
from analysis.results import Results, Verdict, analyse
from analysis.trials import load_study

TOKENS_PER_STEP = 1000.0
RECORDS = Path(__file__).parents[2] / "results"


def law(tokens: float) -> float:
    return 2.4 + (tokens / 1e6) ** -0.35


def cell(
    arm: str, horizon: int, losses: np.ndarray | list[float], *, cost: float = 1.0, seconds: float = math.nan
) -> Endpoints:
    values = np.asarray(losses, dtype=float)
    tokens = np.full(len(values), horizon * TOKENS_PER_STEP)
    seeds = tuple(range(len(values)))
    return Endpoints(arm, "tiny", horizon, seeds, values, tokens, cost * tokens, reference_seconds=seconds)


def baseline_cells(seeds: int = 4, scale: float = 0.002, key: int = 0, bend: float = 0.0) -> list[Endpoints]:
    rng = np.random.default_rng(key)
    return [
        cell("adamw", steps, law(steps * TOKENS_PER_STEP) + bend * (-1) ** i + rng.normal(0, scale, seeds))
        for i, steps in enumerate((1000, 2000, 4000, 8000))
    ]


def arm_cell(speed: float, seeds: int = 4, scale: float = 0.002, key: int = 1, steps: int = 4000) -> Endpoints:
    rng = np.random.default_rng(key)
    return cell("sophiag", steps, law(speed * steps * TOKENS_PER_STEP) + rng.normal(0, scale, seeds), cost=1.05)


@pytest.fixture(scope="module")
def cpu_scale() -> Results:
    return analyse(load_study([RECORDS / "cpu_scale"]))


# Contrasts.


def test_a_contrast_is_the_paired_t_test_of_an_independent_implementation() -> None:
    arm, baseline = arm_cell(1.1), baseline_cells()[2]
    found = contrast(arm, baseline, 0.99)
    assert isinstance(found, Contrast)
    assert found.interval is not None
    expected = stats.ttest_rel(arm.losses, baseline.losses)
    low, high = expected.confidence_interval(0.99)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))
    assert found.interval.estimate == pytest.approx(np.mean(arm.losses - baseline.losses))


def test_the_interval_uses_the_contrasts_own_seeds() -> None:
    """Variances differ 30-fold between horizons; the first version pooled them."""
    baseline, arm = baseline_cells(), arm_cell(1.1)
    noisy = [replace(end, losses=end.losses + np.linspace(-1, 1, 4) * (end.horizon != 4000)) for end in baseline]
    for cells in (baseline, noisy):
        (one,) = compare([arm], cells, fit_baseline(cells), 0.95)
        assert isinstance(one.same, Contrast)
        assert one.same.interval == paired_interval(arm.losses - baseline[2].losses, 0.95)


def test_pairs_are_made_by_seed_and_only_common_seeds_count() -> None:
    arm = replace(cell("a", 1000, [1.0, 2.0, 3.0]), seeds=(5, 1, 9))
    baseline = replace(cell("b", 1000, [0.5, 2.5]), seeds=(9, 5))
    found = contrast(arm, baseline, 0.95)
    assert isinstance(found, Contrast)
    assert found.seeds == (5, 9)
    np.testing.assert_allclose(found.differences, [-1.5, 2.5])


@pytest.mark.parametrize(("seeds", "arms"), [(2, 3), (3, 6), (5, 1)])
def test_a_difference_of_the_smallest_detectable_size_is_found_four_times_in_five(seeds: int, arms: int) -> None:
    level = 1 - 0.05 / arms
    effect = smallest_detectable(2.0, seeds, level)
    draws = np.random.default_rng(seeds).normal(effect, 2.0, (100_000, seeds))
    statistic = draws.mean(axis=1) / draws.std(axis=1, ddof=1) * math.sqrt(seeds)
    found = np.mean(np.abs(statistic) > stats.t.ppf((1 + level) / 2, seeds - 1))
    assert found == pytest.approx(0.8, abs=0.006)  # four standard errors


# The self-test.


def test_the_self_test_is_the_t_test_of_the_one_misfit_that_four_horizons_leave() -> None:
    cells = baseline_cells(seeds=6, scale=0.001, bend=0.0005)
    fitted = fit_baseline(cells)
    curve = fitted.curve
    assert curve is not None
    misfit = np.linalg.svd(curve._gradient(curve.log_tokens).T)[2][-1]  # orthogonal to all that the parameters can do
    expected = stats.ttest_1samp(fitted.losses @ misfit - curve.value(curve.log_tokens) @ misfit, 0.0).pvalue
    assert fitted.self_test.p == pytest.approx(expected, rel=0.02)


def test_the_self_test_finds_a_bend_and_passes_a_power_law() -> None:
    straight, bent = fit_baseline(baseline_cells()), fit_baseline(baseline_cells(bend=0.02))
    assert straight.self_test.passed
    assert list(straight.self_test.ratios.values()) == pytest.approx([1.0] * 4, abs=0.05)
    assert not bent.self_test.passed
    assert "does not recognise the baseline" in str(ratio(arm_cell(1.2), bent, 0.95))


@pytest.mark.slow
def test_the_self_test_rejects_at_its_stated_rate() -> None:
    rejected = np.mean([not fit_baseline(baseline_cells(seeds=3, key=key)).self_test.passed for key in range(300)])
    assert 0.01 < rejected < 0.10  # four standard errors around 0.05


def test_three_horizons_give_no_ratio() -> None:
    """A curve through three points recognises anything."""
    few = fit_baseline(baseline_cells()[1:])
    assert ratio(arm_cell(1.2), few, 0.95) == "the baseline has 3 horizons; a curve that can be tested needs 4"


@pytest.mark.slow
def test_no_ratio_is_given_where_adamw_does_not_come_out_as_fast_as_itself(cpu_scale: Results) -> None:
    """12.6M parameters, 16 to 128 steps: the first version called AdamW 0.84 times as fast as itself at 32 steps."""
    test = cpu_scale.baselines["gpt2_30m"].self_test
    assert not test.passed
    assert test.ratios[32] < 0.9
    assert test.p < 1e-3
    told = [one for one in cpu_scale.compared if one.endpoints.model == "gpt2_30m"]
    assert told
    assert all(isinstance(one.ratio, str) for one in told)
    assert cpu_scale.baselines["gpt2_mini"].self_test.passed


# Ratios.


@pytest.mark.parametrize("speed", [0.3, 0.8, 1.0, 1.2, 1.9])
def test_a_ratio_without_noise_is_the_truth(speed: float) -> None:
    found = ratio(arm_cell(speed, scale=0.0), fit_baseline(baseline_cells(scale=0.0)), 0.95)
    assert isinstance(found, Ratio)
    assert found.estimate == pytest.approx(speed, rel=1e-3)


@pytest.mark.parametrize(("speed", "text"), [(3.0, ">2.00 [2.00, >2.00]"), (0.1, "<0.25 [<0.25, 0.25]")])
def test_a_ratio_beyond_the_baselines_horizons_is_censored(speed: float, text: str) -> None:
    found = ratio(arm_cell(speed, scale=1e-6), fit_baseline(baseline_cells(scale=1e-6)), 0.95)
    assert isinstance(found, Ratio)
    assert found.text == text


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 10_000), speed=st.floats(0.6, 1.7), scale=st.sampled_from([0.002, 0.01, 0.03]))
def test_the_ratios_interval_agrees_with_the_direct_contrasts(key: int, speed: float, scale: float) -> None:
    """The first version tested 1× and 2× through the curve, and the two answers could differ."""
    cells, arm = baseline_cells(scale=scale, key=key), arm_cell(speed, scale=scale, key=key + 1)
    (one,) = compare([arm], cells, fit_baseline(cells), 0.95)
    if isinstance(one.ratio, str):
        return
    for threshold, direct in ((1.0, one.same), (2.0, one.half)):
        assert isinstance(direct, Contrast)
        inside = one.ratio.low <= threshold * (1 + 1e-9) and (
            threshold <= one.ratio.high * (1 + 1e-9) or one.ratio.high_censored
        )
        if direct.word == "lower":  # rejected from this side: the ratio is above the threshold
            assert one.ratio.low >= threshold * (1 - 1e-9)
        elif direct.word == "not told apart":
            assert inside


def test_a_ratio_in_another_currency_is_divided_by_the_price_of_a_token() -> None:
    cells = [replace(end, reference_seconds=2.0 * end.horizon) for end in baseline_cells()]
    arm = replace(arm_cell(1.2), reference_seconds=2.4 * 4000)
    (one,) = compare([arm], cells, fit_baseline(cells), 0.95)
    steps, compute, seconds = (one.ratio_in(c) for c in ("steps", "flops", "seconds"))  # type: ignore[arg-type]
    assert isinstance(steps, Ratio)
    assert isinstance(compute, Ratio)
    assert isinstance(seconds, Ratio)
    assert compute.estimate == pytest.approx(steps.estimate / 1.05)
    assert (seconds.low, seconds.high) == pytest.approx((steps.low / 1.2, steps.high / 1.2))


def test_wall_clock_rests_on_reference_times_at_the_horizon_and_not_on_the_runs_clocks(cpu_scale: Results) -> None:
    """The runs' clocks differ by 12 % for the same work; the first version's interval left out the reference time."""
    study = cpu_scale.study
    times = study.reference_times
    assert times is not None
    own, baseline = (times.seconds["gpt2_mini"][arm] for arm in ("sophiag", "adamw"))
    step = sum(baseline.values())
    price = (own["forward_backward"] + own["data"] + own["optimizer"] + own["curvature"] * 13 / 128) / step
    place = ("sophiag", "gpt2_mini", 128)
    one = next(c for c in cpu_scale.compared if (c.endpoints.arm, c.endpoints.model, c.endpoints.horizon) == place)
    assert one.prices["seconds"] == pytest.approx(price)
    without = [replace(end, reference_seconds=math.nan) for end in study.endpoints("adamw", "gpt2_mini")]
    (none,) = compare([one.endpoints], without, cpu_scale.baselines["gpt2_mini"], 0.95)
    assert none.ratio_in("seconds") == "no reference times"


# Verdicts.


def compared(
    difference: float,
    ratio_in_steps: Ratio | str = "no curve",
    price: float = 1.0,
    steps: int = 4000,
    half: float = 1.0,
) -> Compared:
    def at(mean: float, horizon: int) -> Contrast:
        values = mean + np.array([-0.001, 0.0, 0.001])
        return Contrast("sophiag", "tiny", steps, horizon, (0, 1, 2), values, paired_interval(values, 0.95))

    return Compared(
        arm_cell(1.0, steps=steps),
        at(difference, steps),
        at(half, 2 * steps),
        ratio_in_steps,
        {"steps": 1.0, "flops": price},
    )


@pytest.mark.parametrize(
    ("difference", "price", "steps_ratio", "steps", "compute"),
    [
        (-0.1, 1.05, "no curve", "faster", "no verdict"),  # it may not outweigh the price
        (-0.1, 1.05, Ratio(1.3, 1.2, 1.4, 0.95), "faster", "faster"),
        (-0.1, 1.30, Ratio(1.3, 1.2, 1.4, 0.95), "faster", "not told apart"),
        (-0.1, 1.50, Ratio(1.3, 1.2, 1.4, 0.95), "faster", "slower"),
        (+0.1, 1.05, "no curve", "slower", "slower"),
        (0.0, 1.05, "no curve", "not told apart", "no verdict"),
        (0.0, 1.0, "no curve", "not told apart", "not told apart"),
    ],
)
def test_a_verdict_in_compute_needs_a_ratio_that_outweighs_the_price(
    difference: float, price: float, steps_ratio: Ratio | str, steps: str, compute: str
) -> None:
    one = Verdict("sophiag", "tiny", compared(difference, steps_ratio, price), None, 20.0)
    assert (one.word_in("steps"), one.word_in("flops"), one.word_in("seconds")) == (steps, compute, "no verdict")


@pytest.mark.parametrize(
    ("steps", "tokens_per_parameter", "half", "claim"),
    [
        (1000, 10.0, -0.1, "seen"),
        (1000, 10.0, +0.1, "not seen at this scale"),
        (1000, 10.0, 0.0, "not seen at this scale"),
        (999, 10.0, -0.1, "not tested"),
        (1000, 9.9, -0.1, "not tested"),
        (1000, math.nan, -0.1, "not tested"),
    ],
)
def test_a_short_study_does_not_test_the_papers_claim_whatever_it_finds(
    steps: int, tokens_per_parameter: float, half: float, claim: str
) -> None:
    pair = compared(0.0, steps=steps, half=half)
    assert Verdict("sophiag", "tiny", pair, pair, tokens_per_parameter).claim == claim


def test_a_censored_ratio_that_cannot_outweigh_its_price_is_no_verdict() -> None:
    """At the baseline's longest horizon a faster arm's ratio is censored at 1, so any price above 1 would outweigh it."""
    censored = Ratio(1.0, 1.0, 1.0, 0.95, "above", high_censored=True)
    at = compared(-0.1, censored, price=1.05)
    assert Verdict("sophiag", "tiny", at, None, 20.0).word_in("flops") == "no verdict"
    paper = compared(-0.1, Ratio(2.0, 1.8, 2.0, 0.95, "above", high_censored=True), price=1.05, half=-0.05)
    told = Verdict("sophiag", "tiny", at, paper, 20.0)
    assert told.word_in("flops") == "faster"
    assert "it is >2.00 [1.80, >2.00] times as fast in steps" in told.sentence("adamw")


@pytest.mark.parametrize(("half", "end"), [(-0.1, "] nats."), (0.0, "] nats, not told apart from zero.")])
def test_the_claim_has_its_number_also_where_other_runs_diverged(half: float, end: str) -> None:
    paper = compared(0.0, steps=1000, half=half)
    lost = replace(paper, same=ArmDiverged("1 of 3 runs of Sophia-G diverged at 8,000 steps"))
    one = Verdict("sophiag", "tiny", lost, paper, 20.0)
    assert one.word == "no verdict"
    claim = "seen" if half < 0 else "not seen at this scale"
    said = f"The paper's 2×: {claim}: after 1,000 steps its loss differs from AdamW's after 2,000 by {half:+.3f} ["
    assert said in one.sentence("adamw")
    assert one.sentence("adamw").endswith(end)


def test_an_arm_that_diverges_has_not_reached_the_claim_and_a_baseline_that_diverges_leaves_it_untested() -> None:
    arm, reference = arm_cell(1.0), baseline_cells()
    diverged, healthy = replace(arm, losses=np.full(len(arm.seeds), np.nan)), reference[-1]
    for own, theirs, claim in (
        (diverged, healthy, "not seen at this scale"),
        (diverged, replace(healthy, losses=np.full(len(healthy.seeds), np.nan)), "not tested"),
        (arm, replace(healthy, losses=np.full(len(healthy.seeds), np.nan)), "not tested"),
    ):
        paper = replace(compared(0.0), half=contrast(own, theirs, 0.95))
        one = Verdict("sophiag", "tiny", paper, paper, 20.0)
        assert one.claim == claim
        assert "runs of" in one.sentence("adamw").split("The paper's 2×: ")[1]


def test_all_currencies_and_thresholds_are_one_comparison_and_the_family_is_the_arms(cpu_scale: Results) -> None:
    """The first version corrected over three currencies and two thresholds, beside intervals that were not corrected."""
    for model, arms in (("gpt2_mini", 6), ("gpt2_30m", 2)):
        told = [one for one in cpu_scale.compared if one.endpoints.model == model]
        levels = {
            c.interval.level for one in told for c in (one.same, one.half) if isinstance(c, Contrast) and c.interval
        }
        levels |= {one.ratio.level for one in told if isinstance(one.ratio, Ratio)}
        assert levels == {1 - 0.05 / arms}


def test_verdicts_of_the_first_study(cpu_scale: Results) -> None:
    """12.6M parameters: "undecided" stood beside a direct difference whose interval excluded zero."""
    words = {(one.arm, one.model): (one.word, one.claim) for one in cpu_scale.verdicts}
    assert words["sophiag", "gpt2_mini"] == ("slower", "not tested")
    assert words["sophiag", "gpt2_30m"] == ("slower", "not tested")
    assert words["muon", "gpt2_mini"] == ("faster", "not tested")
    sentence = cpu_scale.verdict("sophiag", "gpt2_mini").sentence("adamw")
    assert sentence.startswith(
        "Sophia-G on gpt2_mini (4.5M parameters) is slower than AdamW: after 256 steps its final loss differs by +0.122"
    )
    assert "99.2% interval" in sentence
    assert "times as fast in compute" in sentence
    assert sentence.endswith("The paper's 2×: not tested (128 steps are too short; 1,000 are the least).")
    for one in cpu_scale.verdicts:
        assert "supported" not in one.sentence("adamw")


def test_a_baseline_that_diverged_everywhere_is_refused_and_one_horizon_is_left_out() -> None:
    lost = [replace(end, losses=np.full(4, np.nan)) for end in baseline_cells()]
    with pytest.raises(ValueError, match="diverged at every horizon"):
        fit_baseline(lost)
    fitted: Baseline = fit_baseline([lost[0], *baseline_cells()[1:]])
    assert [end.horizon for end in fitted.endpoints] == [2000, 4000, 8000]
