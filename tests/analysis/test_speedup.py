"""Speed-ups: intervals cover the truth at the stated rate, a small case agrees with a calculation by hand, edge cases."""

import functools
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis.results import analyse
from analysis.runs import Currency
from analysis.speedup import (
    CLAIM_CURRENCIES,
    Claim,
    Endpoints,
    SpeedUp,
    correct,
    end_of_runs,
    fit_baseline,
    headline,
    speed_ups,
)
from analysis.statistics import Interval, seeds_to_decide
from analysis.trials import load_study
from tests.analysis.synthetic import noise, power_law, write_run

TOKENS_PER_STEP = 1000.0


def law(tokens: float) -> float:
    return 2.4 + 1.0 * (tokens / 1e6) ** -0.35


def cell(
    arm: str,
    horizon: int,
    losses: list[float] | np.ndarray,
    *,
    cost: float = 1.0,
    seconds: np.ndarray | None = None,
    seeds: tuple[int, ...] | None = None,
) -> Endpoints:
    """Ends of runs with the given losses; `cost` multiplies FLOPs and seconds."""
    values = np.asarray(losses, dtype=float)
    tokens = np.full(len(values), horizon * TOKENS_PER_STEP)
    return Endpoints(
        arm=arm,
        model="tiny",
        horizon=horizon,
        seeds=seeds or tuple(range(len(values))),
        losses=values,
        tokens=tokens,
        flops=6e6 * tokens * cost,
        seconds=1e-3 * tokens * cost if seconds is None else seconds,
    )


def simulated(
    truth: float, seeds: int, rng: np.random.Generator, *, overhead: float = 0.05, clock: float = 0.01
) -> tuple[list[Endpoints], list[Endpoints]]:
    """Baseline at four horizons, arm at three; noise of GPT-2's size, partly shared by paired runs."""
    shared = rng.normal(0, 0.002, seeds)

    def ends(arm: str, horizon: int, speedup: float, cost: float) -> Endpoints:
        losses = law(horizon * TOKENS_PER_STEP * speedup) + shared + rng.normal(0, 0.002, seeds)
        seconds = 1e-3 * horizon * TOKENS_PER_STEP * cost * np.exp(rng.normal(0, clock, seeds))
        return cell(arm, horizon, losses, cost=cost, seconds=seconds)

    baseline = [ends("adamw", horizon, 1.0, 1.0) for horizon in (1000, 2000, 4000, 8000)]
    return baseline, [ends("sophiag", horizon, truth, 1 + overhead) for horizon in (2000, 4000, 8000)]


def covers(result: SpeedUp, truth: float) -> bool:
    above = result.low <= truth or (result.low_censored and truth <= result.high)
    below = result.high >= truth or (result.high_censored and truth >= result.low)
    return above and below


REPETITIONS = 250
# Four standard errors of a rate of 5 % over so many repetitions: a false alarm in ten thousand.
MARGIN = 4 * math.sqrt(0.05 * 0.95 / REPETITIONS)


@functools.cache
def studies(truth: float, seeds: int, overhead: float, currencies: tuple[Currency, ...]) -> list[list[list[SpeedUp]]]:
    """Of so many simulated studies the speed-ups in each currency, at each horizon."""
    rng = np.random.default_rng([seeds, round(10 * truth), round(100 * overhead)])
    found = []
    for _ in range(REPETITIONS):
        baseline_ends, arm = simulated(truth, seeds, rng, overhead=overhead)
        baseline = fit_baseline(baseline_ends)
        found.append([list(speed_ups(arm, baseline, currency)) for currency in currencies])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("truth", "overhead", "currencies"),
    [
        (1.0, 0.0, CLAIM_CURRENCIES),
        (1.2, 0.0, ("steps",)),
        (2.0, 0.0, ("steps",)),
        (1.05, 0.05, ("flops", "seconds")),
        (1.05 * 1.2, 0.05, ("seconds",)),  # in FLOPs, without noise of their own, as in steps
        (1.05 * 2.0, 0.05, ("seconds",)),
    ],
)
def test_intervals_cover_a_known_truth_at_their_stated_rate(
    truth: float, overhead: float, currencies: tuple[Currency, ...], seeds: int
) -> None:
    """At each horizon; and no claim is supported against the truth.

    Where a step of the arm costs 5 % more, its speed-up in steps must be that much higher for the same in compute or on
    the clock, whose noise comes on top.
    """
    expected = truth / (1 + overhead)
    covered: Counter[tuple[Currency, int]] = Counter()
    supported: Counter[tuple[Currency, int, float]] = Counter()
    for study in studies(truth, seeds, overhead, currencies):
        for result in itertools.chain(*study):
            covered[result.currency, result.horizon] += covers(result, expected)
            for claim in result.claims:
                if expected <= claim.threshold:
                    supported[result.currency, result.horizon, claim.threshold] += claim.verdict == "supported"
    assert len(covered) == 3 * len(currencies)
    for where, count in covered.items():
        assert count / REPETITIONS >= 0.95 - MARGIN, where
    for currency in currencies:
        total = sum(count for (of, _), count in covered.items() if of == currency)
        assert total / (3 * REPETITIONS) >= 0.95 - MARGIN / 2
    assert supported
    for claimed, count in supported.items():
        assert count / REPETITIONS <= 0.025 + MARGIN, claimed


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_without_any_speed_up_a_report_says_supported_no_more_often_than_stated(seeds: int) -> None:
    """All claims on a model together, as a report corrects them: three currencies, both thresholds."""
    wrong = 0
    for study in studies(1.0, seeds, 0.0, CLAIM_CURRENCIES):
        chosen = [claim for results in study for claim in headline(results).claims]
        wrong += any(claim.verdict == "supported" for claim in correct(chosen))
    assert wrong / REPETITIONS <= 0.05 + MARGIN


def test_a_speed_up_of_one_fifth_is_found() -> None:
    """Intervals that cover everything would be worth nothing: at 1.2 the width is a few percent."""
    baseline, arm = simulated(1.2, 5, np.random.default_rng(1))
    results = speed_ups(arm, fit_baseline(baseline), "steps")
    chosen = headline(results)
    assert chosen.horizon == 4000  # at 8000 the baseline has no run of twice the length
    assert chosen.claim(1.0).verdict == "supported"
    assert chosen.claim(2.0).verdict == "not supported"
    assert math.log(chosen.high / chosen.low) < 0.1


def test_estimates_from_records_agree_with_a_computation_by_hand(tmp_path: Path) -> None:
    """Two horizons, three seeds, from files; the hand uses the raw JSON, pandas and a printed t table."""
    seeds = (1, 2, 3)
    for seed in seeds:
        for steps in (100, 200):
            loss = power_law(steps * 1024) + noise(seed, steps, scale=0.01)
            write_run(tmp_path / f"a-{steps}-{seed}", seed=seed, steps=steps, final=loss)
        loss = power_law(100 * 1024, speedup=1.4) + noise(9, seed, scale=0.01)
        write_run(tmp_path / f"s-{seed}", optimizer="sophiag", seed=seed, steps=100, final=loss, curvature_share=0.05)
    study = load_study([tmp_path])
    baseline = study.endpoints("adamw", "tiny")
    (in_steps,) = speed_ups(study.endpoints("sophiag", "tiny"), fit_baseline(baseline), "steps")
    (in_flops,) = speed_ups(study.endpoints("sophiag", "tiny"), fit_baseline(baseline), "flops")
    (in_seconds,) = speed_ups(study.endpoints("sophiag", "tiny"), fit_baseline(baseline), "seconds")
    (ends,) = end_of_runs(study.endpoints("sophiag", "tiny"), baseline)

    rows = []
    for run in sorted(tmp_path.iterdir()):
        last = pd.read_json(run / "metrics.jsonl", lines=True).query("kind == 'eval'").iloc[-1]
        rows.append((run.name[0], int(last.step), int(run.name[-1]), last.val_loss, last.flops))
    frame = pd.DataFrame(rows, columns=["arm", "steps", "seed", "loss", "flops"]).set_index(["arm", "steps", "seed"])
    short, long, arm = (frame.loc[key].loss for key in (("a", 100), ("a", 200), ("s", 100)))
    # Loss falls linearly in log steps from 100 to 200; the arm's mean loss is reached at:
    share = (short.mean() - arm.mean()) / (short.mean() - long.mean())
    by_hand = 100 * 2**share / 100
    assert in_steps.estimate == pytest.approx(by_hand, rel=1e-3)
    assert in_flops.estimate == pytest.approx(by_hand / 1.05, rel=1e-3)
    assert in_seconds.estimate == pytest.approx(by_hand / 1.05, rel=1e-3)
    difference = arm - long
    error = difference.std(ddof=1) / math.sqrt(3)
    assert ends.difference.estimate == pytest.approx(difference.mean())
    assert ends.difference.high == pytest.approx(difference.mean() + 4.302653 * error)  # t(0.975; 2)
    # The interval's ends are where the paired t statistic of three contrasts is 4.303.
    assert 1.0 < in_steps.low < in_steps.high < 2.0
    for bound, sign in ((in_steps.low, -1), (in_steps.high, 1)):
        weight = math.log(bound) / math.log(2)
        contrast = arm - ((1 - weight) * short + weight * long)
        t = contrast.mean() / (contrast.std(ddof=1) / math.sqrt(3))
        assert sign * t == pytest.approx(4.302653, rel=1e-2)


def test_with_four_horizons_the_speed_up_is_that_of_an_independent_fit() -> None:
    baseline, arm = simulated(1.3, 3, np.random.default_rng(5))
    results = speed_ups(arm, fit_baseline(baseline), "tokens")

    def curve(tokens: float, floor: float, scale: float, exponent: float) -> float:
        return floor + scale * (tokens / 1e6) ** -exponent

    tokens = [end.tokens[0] for end in baseline]
    parameters, _ = optimize.curve_fit(curve, tokens, [end.losses.mean() for end in baseline], p0=(2, 1, 0.3))
    for result, end in zip(results[:2], arm[:2], strict=True):
        equivalent = optimize.brentq(lambda t: curve(t, *parameters) - end.losses.mean(), 1e6, 8e6)  # noqa: B023
        assert result.estimate == pytest.approx(equivalent / end.tokens[0], rel=2e-3)
        assert result.method == "power law"


def test_an_interval_narrower_than_the_grid_has_the_ends_that_the_test_itself_gives() -> None:
    baseline, arm = simulated(1.234, 5, np.random.default_rng(21))
    scaled = [
        [
            Endpoints(**{**end.__dict__, "losses": end.losses.mean() + (end.losses - end.losses.mean()) / 50})
            for end in ends
        ]
        for ends in (baseline, arm)
    ]
    fitted = fit_baseline(scaled[0])
    (result,) = speed_ups(scaled[1][1:2], fitted, "steps")
    assert math.log(result.high / result.low) < 0.01
    for bound in (result.low, result.high):
        (again,) = speed_ups(scaled[1][1:2], fitted, "steps", thresholds=(bound,))
        assert again.claim(bound).p == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("spread", [(0.03, 0.03), (0.03, 0.2), (0.2, 0.03)])
def test_an_interval_holds_every_speed_up_that_the_test_does_not_reject(spread: tuple[float, float]) -> None:
    """Also where one horizon is noisier than the other, so that the test rejects nearby and not farther out."""
    rng = np.random.default_rng(31)
    ratios = tuple(np.geomspace(0.52, 1.98, 15))
    kept = 0
    for _ in range(100):
        baseline = fit_baseline(
            [cell("adamw", h, law(h * 1000) + rng.normal(0, s, 3)) for h, s in zip((1000, 4000), spread, strict=True)]
        )
        arm = [cell("sophiag", 2000, law(rng.uniform(0.9e6, 1.5e6)) + rng.normal(0, 0.01, 3))]
        (result,) = speed_ups(arm, baseline, "steps", thresholds=ratios)
        for claim in result.claims:
            if claim.p > 0.055:
                kept += 1
                assert result.low <= claim.threshold <= result.high
    assert kept > 100


def test_a_loss_below_the_baselines_range_is_censored_and_never_extrapolated() -> None:
    baseline = fit_baseline([cell("adamw", h, [law(h * 1000)] * 3 + np.arange(3) * 1e-3) for h in (1000, 2000)])
    (result,) = speed_ups([cell("sophiag", 2000, np.array([2.0, 2.001, 2.002]))], baseline, "steps")
    assert result.estimate_censored == "above"
    assert result.estimate == pytest.approx(1.0)
    assert result.high_censored
    assert result.text.startswith(">1.00")
    assert result.claim(1.0).verdict == "supported"
    assert not result.claim(2.0).testable
    assert result.claim(2.0).verdict == "undecided"


def test_a_claim_beyond_the_range_can_be_refuted_but_not_supported() -> None:
    baseline = fit_baseline([cell("adamw", h, law(h * 1000) + np.arange(3) * 1e-3) for h in (1000, 2000)])
    slower = cell("sophiag", 2000, law(1.9e6) + np.array([0, 1.1e-3, 1.9e-3]))
    (result,) = speed_ups([slower], baseline, "steps")
    assert result.claim(2.0).verdict == "not supported"


def test_curvature_costs_flops_and_seconds_but_no_steps() -> None:
    baseline = fit_baseline([cell("adamw", h, law(h * 1000) + np.arange(3) * 1e-4) for h in (1000, 2000, 4000, 8000)])
    arm = [cell("sophiag", 4000, law(4e6) + np.arange(3) * 1e-4, cost=1.05)]
    ratio = {currency: speed_ups(arm, baseline, currency)[0].estimate for currency in ("steps", "flops", "seconds")}
    assert ratio["steps"] == pytest.approx(1.0, rel=1e-3)
    assert ratio["flops"] == pytest.approx(1 / 1.05, rel=1e-3)
    assert ratio["seconds"] == pytest.approx(1 / 1.05, rel=1e-3)


def test_a_shift_shared_by_paired_runs_changes_neither_estimate_nor_interval() -> None:
    """Pairing by seed: what initial weights and data order do to both arms alike does not count as noise."""
    baseline, arm = simulated(1.2, 3, np.random.default_rng(2), clock=0.0)
    shift = np.array([-0.05, 0.0, 0.05])
    moved = [[Endpoints(**{**end.__dict__, "losses": end.losses + shift}) for end in ends] for ends in (baseline, arm)]
    plain = speed_ups(arm, fit_baseline(baseline), "steps")[1]
    shifted = speed_ups(moved[1], fit_baseline(moved[0]), "steps")[1]
    assert (shifted.estimate, shifted.low, shifted.high) == pytest.approx(
        (plain.estimate, plain.low, plain.high), rel=1e-6
    )


def test_pairs_go_by_seed_whatever_the_order_of_the_runs() -> None:
    baseline, arm = simulated(1.2, 5, np.random.default_rng(3))
    order = [3, 0, 4, 2, 1]
    shuffled = [end.at([end.seeds[i] for i in order]) for end in arm]
    straight = speed_ups(arm, fit_baseline(baseline), "seconds")
    again = speed_ups(shuffled, fit_baseline(baseline), "seconds")
    assert [one.text for one in straight] == [one.text for one in again]


def test_a_diverged_reported_run_leaves_its_cell_undecided_with_the_reason() -> None:
    baseline, _ = simulated(1.2, 3, np.random.default_rng(4))
    broken = [cell("sophiag", 4000, [3.0, float("nan"), 3.0])]
    (result,) = speed_ups(broken, fit_baseline(baseline), "steps")
    assert math.isnan(result.estimate)
    assert result.text == "1 of 3 runs diverged"
    assert {claim.verdict for claim in result.claims} == {"undecided"}
    assert end_of_runs(broken, baseline) == []


def test_a_diverged_run_does_not_hand_the_verdict_to_another_horizon() -> None:
    baseline, arm = simulated(1.2, 3, np.random.default_rng(4))
    fitted = fit_baseline(baseline)
    sound = headline(speed_ups(arm, fitted, "steps"))
    broken = [end if end.horizon != sound.horizon else cell("sophiag", end.horizon, [3.0, np.nan, 3.0]) for end in arm]
    chosen = headline(speed_ups(broken, fitted, "steps"))
    assert chosen.horizon == sound.horizon
    assert chosen.text == "1 of 3 runs diverged"


def test_one_seed_gives_an_estimate_but_no_interval_and_no_verdict() -> None:
    baseline, arm = simulated(1.2, 1, np.random.default_rng(6))
    result = speed_ups(arm, fit_baseline(baseline), "steps")[1]
    assert result.low_censored
    assert result.high_censored
    assert {claim.verdict for claim in result.claims} == {"undecided"}


def test_an_undecided_claim_says_how_many_seeds_would_decide() -> None:
    rng = np.random.default_rng(8)
    baseline = fit_baseline([cell("adamw", h, law(h * 1000) + rng.normal(0, 0.02, 3)) for h in (2000, 4000)])
    (result,) = speed_ups([cell("lion", 2000, law(2.1e6) + rng.normal(0, 0.02, 3))], baseline, "steps")
    claim = result.claim(1.0)
    assert claim.verdict == "undecided"
    assert claim.seeds_to_decide is not None
    assert claim.seeds_to_decide > 3
    assert result.smallest_detectable > 0.01


def test_correction_for_many_claims_takes_back_what_chance_alone_explains() -> None:
    claim = Claim(
        threshold=1.0,
        verdict="supported",
        p=0.03,
        adjusted_p=0.03,
        direction="above",
        seeds_to_decide=None,
        testable=True,
    )
    assert [one.verdict for one in correct([claim])] == ["supported"]
    assert [one.verdict for one in correct([claim, claim])] == ["undecided", "undecided"]


def test_seeds_that_would_decide_are_counted_for_the_corrected_test() -> None:
    """0.03 among two is undecided: as many seeds are named as a test at half the error rate needs."""
    difference = Interval(estimate=-0.01, low=-0.02, high=0.0, level=0.95, standard_error=0.003, degrees_of_freedom=4)
    claim = Claim(1.0, "supported", 0.03, 0.03, "above", None, True, difference, standard_deviation=0.007)
    first, second = correct([claim, claim])
    assert first.verdict == "undecided"
    assert first.seeds_to_decide == seeds_to_decide(0.01, 0.007, level=0.975)
    assert second.seeds_to_decide == seeds_to_decide(0.01, 0.007, level=0.95)
    assert first.seeds_to_decide is not None
    assert second.seeds_to_decide is not None
    assert first.seeds_to_decide > second.seeds_to_decide
    assert [one.seeds_to_decide for one in correct([claim])] == [None], "decided"


def test_a_baseline_horizon_with_a_diverged_run_is_left_out_as_a_whole() -> None:
    """Leaving out the seed alone would keep the lucky ones."""
    ends = [cell("adamw", h, law(h * 1000) + np.arange(3) * 1e-3) for h in (1000, 2000, 4000)]
    broken = [*ends[:2], cell("adamw", 4000, [2.9, float("nan"), 2.91])]
    baseline = fit_baseline(broken)
    assert [end.horizon for end in baseline.endpoints] == [1000, 2000]
    assert baseline.seeds == (0, 1, 2)
    (result,) = speed_ups([cell("sophiag", 2000, law(3e6) + np.array([0, 1.1e-3, 1.9e-3]))], baseline, "steps")
    assert result.estimate_censored == "above", "what lies beyond the horizons that are left is not extrapolated"
    with pytest.raises(ValueError, match="diverged at every horizon"):
        fit_baseline(broken[2:])


def test_the_end_of_runs_rule_pools_the_seed_variance_over_horizons() -> None:
    rng = np.random.default_rng(11)
    baseline = [cell("adamw", h, law(h * 1000) + rng.normal(0, 0.002, 3)) for h in (2000, 4000, 8000)]
    arm = [cell("sophiag", h, law(h * 2000) + rng.normal(0, 0.002, 3)) for h in (1000, 2000, 4000)]
    results = end_of_runs(arm, baseline)
    assert [one.baseline_horizon for one in results] == [2000, 4000, 8000]
    assert {one.variance.pooled_over for one in results} == {3}
    assert {one.difference.degrees_of_freedom for one in results} == {6.0}
    assert all(one.ratio == 2 for one in results)


def test_a_baseline_whose_horizons_share_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="no seed of the baseline"):
        fit_baseline([cell("adamw", 1000, [3.0], seeds=(1,)), cell("adamw", 2000, [2.9], seeds=(2,))])


def test_losses_off_a_power_law_are_reported_as_a_bad_fit() -> None:
    wave = np.array([0.05, -0.05, 0.05, -0.05])
    rng = np.random.default_rng(0)
    ends = [
        cell("adamw", h, law(h * 1000) + wave[i] + rng.normal(0, 1e-3, 5))
        for i, h in enumerate((1000, 2000, 4000, 8000))
    ]
    assert fit_baseline(ends).lack_of_fit_p < 1e-3
    good = [cell("adamw", h, law(h * 1000) + rng.normal(0, 1e-3, 5)) for h in (1000, 2000, 4000, 8000)]
    assert fit_baseline(good).lack_of_fit_p > 0.01


def test_in_seconds_a_single_horizon_is_tested_by_its_losses(tmp_path: Path) -> None:
    """The baseline's curve has no slope there, which is no reason to call a finite loss diverged."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", seed=seed, final=4.6 + noise(seed, scale=0.01), train_lines=False)
        seconds = 0.05 + 0.002 * seed
        options = {"final": 4.5 + noise(seed, 1, scale=0.01), "seconds_per_step": seconds}
        write_run(tmp_path / f"l{seed}", optimizer="lion", seed=seed, train_lines=False, **options)
    results = analyse(load_study([tmp_path]))
    by_currency = {one.currency: one for one in results.speed_ups}
    assert by_currency["seconds"].estimate_censored == by_currency["steps"].estimate_censored == "above"
    assert not any(math.isnan(one.claim.p) for one in results.headlines)
