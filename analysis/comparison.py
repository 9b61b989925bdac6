"""Compare an arm with the baseline: final losses paired by seed, and the ratio of what both spend for one loss.

**Contrasts.** Runs of one seed start from the same weights and see the same data, so final losses are compared as
differences within a seed, with Student's t on the contrast's own seeds. Variances differ between arms and horizons by
factors of 20 to 800 (docs/report.md); none is pooled. All intervals on a model have one level, 1 - (1 - `level`) / m for m
arms (Bonferroni), and a verdict says whether that interval excludes zero: the two cannot contradict each other.

**Ratios.** An arm that ends at loss L after D tokens is D'/D times as fast, if the baseline needs D' tokens for L. Between the
baseline's horizons its loss is a power law plus the interpolated deviations of the observed means from it, so that at a
horizon the curve is the observed mean, and the interval agrees with the direct contrast there. The interval holds the ratios
ρ that the contrast between the arm and the curve at ρD does not reject, with an allowance between horizons for what the curve
misses (see `SelfTest`). Ratios outside the baseline's horizons are censored, not extrapolated.

**The self-test.** The curve has to recognise the baseline: each horizon, left out of the fit, must come out at 1.00. Where it
does not, or where fewer than four horizons leave nothing to test, there are no ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from analysis.colours import label
from analysis.powerlaw import PowerLaw, fit_power_law
from analysis.runs import Currency, Origin

Array = NDArray[np.float64]
Difference = Literal["lower", "higher", "not told apart"]

HORIZONS_NEEDED = 4  # a power law has three parameters
PAPER_RATIO = 2  # the paper's claim
_SELF_TEST_LEVEL = 0.05
_ROUNDING = 1e-6  # nats, of the fit
_GRID = 241
_POWER = 0.8


@dataclass(frozen=True)
class Endpoints:
    """Final losses and costs of the runs of one arm at one horizon, one run per seed. Arrays have shape (n,)."""

    arm: str
    model: str
    horizon: int  # steps
    seeds: tuple[int, ...]
    losses: Array  # final validation loss, nats; NaN for a run that diverged
    tokens: Array  # of a run to its horizon, also where it diverged earlier
    flops: Array
    runs: tuple[Origin, ...] = ()
    reference_seconds: float = math.nan  # of a run, by reference times; NaN without them
    bits_per_byte: float = math.nan  # mean final validation loss in another unit; NaN if a record lacks it

    @property
    def diverged(self) -> tuple[int, ...]:
        """Seeds of runs without a final loss."""
        return tuple(seed for seed, loss in zip(self.seeds, self.losses, strict=True) if not np.isfinite(loss))

    @property
    def mean(self) -> float:
        """Mean final loss, nats; NaN if a run diverged."""
        return float(self.losses.mean())

    @property
    def standard_deviation(self) -> float:
        """Of the final loss over seeds, nats; NaN for one seed or if a run diverged."""
        return float(self.losses.std(ddof=1)) if len(self.losses) > 1 else math.nan

    def at(self, seeds: Sequence[int]) -> Endpoints:
        """Return the endpoints at these seeds, in this order."""
        index = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            losses=self.losses[index],
            tokens=self.tokens[index],
            flops=self.flops[index],
            runs=tuple(self.runs[i] for i in index) if self.runs else (),
        )


@dataclass(frozen=True)
class Interval:
    """A mean difference with its two-sided confidence interval, nats."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def text(self) -> str:
        """ "+0.188 [+0.166, +0.211]"."""
        low, high = (f"{end:+.4f}" if 5e-5 <= abs(end) < 5e-4 else f"{end:+.3f}" for end in (self.low, self.high))
        return f"{self.estimate:+.3f} [{low}, {high}]"


def paired_interval(differences: Sequence[float] | Array, level: float) -> Interval | None:
    """Return Student's t interval of the mean of (n,) differences in nats, one per seed; None for fewer than two."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach, level)


@dataclass(frozen=True)
class Contrast:
    """Final losses of an arm minus the baseline's, paired by seed, each decayed over a schedule of its own."""

    arm: str
    model: str
    horizon: int  # the arm's, steps
    baseline_horizon: int
    seeds: tuple[int, ...]
    differences: Array = field(repr=False)  # (n,) nats
    interval: Interval | None  # None for one seed
    runs: tuple[Origin, ...] = field(repr=False, default=())

    @property
    def word(self) -> Difference:
        """Whether the arm ends lower or higher than the baseline."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return "not told apart"
        return "lower" if self.interval.estimate < 0 else "higher"

    @property
    def smallest_detectable(self) -> float:
        """The true difference that so many seeds find four times in five, nats; infinite for one seed."""
        if self.interval is None:
            return math.inf
        return smallest_detectable(float(self.differences.std(ddof=1)), len(self.seeds), self.interval.level)


def smallest_detectable(standard_deviation: float, seeds: int, level: float) -> float:
    """Return the true mean difference that a paired t test finds with 80 % power, in the unit of the deviation."""
    critical = stats.t.ppf((1 + level) / 2, seeds - 1)

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, seeds - 1, shift)) - _POWER

    upper = 2 * float(critical)
    while lacking(upper) < 0:
        upper *= 2
    return float(optimize.brentq(lacking, 0.0, upper)) * standard_deviation / math.sqrt(seeds)


class ArmDiverged(str):
    """Why there is no contrast: runs of the arm diverged, and none of the baseline's."""


def contrast(arm: Endpoints, baseline: Endpoints, level: float) -> Contrast | str:
    """Return the paired contrast of two cells, or the reason why there is none."""
    for end, reason in ((baseline, str), (arm, ArmDiverged)):
        if end.diverged:
            lost = f"{len(end.diverged)} of {len(end.seeds)} runs of {label(end.arm)}"
            return reason(f"{lost} diverged at {end.horizon:,} steps")
    common = sorted({*arm.seeds} & {*baseline.seeds})
    if not common:
        return "no seed in common with the baseline"
    ours, theirs = arm.at(common), baseline.at(common)
    differences = ours.losses - theirs.losses
    return Contrast(
        arm=arm.arm,
        model=arm.model,
        horizon=arm.horizon,
        baseline_horizon=baseline.horizon,
        seeds=tuple(common),
        differences=differences,
        interval=paired_interval(differences, level),
        runs=(*ours.runs, *theirs.runs),
    )


@dataclass(frozen=True)
class SelfTest:
    """Whether the curve recognises the baseline's own runs.

    Each horizon in turn is predicted from the others, seed by seed. One joint test asks whether all the mean errors are zero:
    the ANOVA-type statistic n·r̄ᵀr̄ / tr S with Box's degrees of freedom (Brunner, Dette & Munk 1997), which needs neither equal
    variances nor more seeds than horizons.
    """

    passed: bool
    p: float  # NaN if the test cannot be made
    ratios: Mapping[int, float]  # by horizon: how many times as fast as itself; 1.00 is right
    reason: str  # why there are no ratios; empty if passed
    error: float = math.nan  # nats, the largest mean error of an inner horizon


@dataclass(frozen=True)
class Baseline:
    """The baseline's final losses over its horizons, at the seeds that all horizons have."""

    endpoints: tuple[Endpoints, ...]  # ascending in horizon
    self_test: SelfTest
    curve: PowerLaw | None = None  # None with too few horizons

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.endpoints[0].seeds

    @property
    def log_tokens(self) -> Array:
        """(K,) of the horizons."""
        return np.log([end.tokens.mean() for end in self.endpoints])

    @property
    def losses(self) -> Array:
        """(n, K) by seed and horizon, nats."""
        return np.stack([end.losses for end in self.endpoints], axis=1)


def fit_baseline(endpoints: Sequence[Endpoints]) -> Baseline:
    """Fit the baseline's curve and test it on the baseline itself.

    A horizon with a diverged run is left out entirely: leaving out only the seed would bias the curve to lucky seeds.
    Raises ValueError if none is left.
    """
    ordered = sorted((end for end in endpoints if not end.diverged), key=lambda end: end.horizon)
    if not ordered:
        raise ValueError("the baseline diverged at every horizon: find hyper-parameters that train")
    common = sorted(set.intersection(*({*end.seeds} for end in ordered)))
    reason = ""
    if len(ordered) < HORIZONS_NEEDED:
        count = f"{len(ordered)} horizon{'s' if len(ordered) > 1 else ''}"
        reason = f"the baseline has {count}; a curve that can be tested needs {HORIZONS_NEEDED}"
    elif len(common) < 2:
        reason = "the baseline's horizons have fewer than two seeds in common"
    baseline = Baseline(tuple(ordered), SelfTest(False, math.nan, {}, reason))
    if reason:
        return baseline
    baseline = replace(baseline, endpoints=tuple(end.at(common) for end in ordered))
    curve = fit_power_law(baseline.log_tokens, baseline.losses.mean(axis=0))
    return replace(baseline, self_test=_self_test(baseline), curve=curve)


def _self_test(baseline: Baseline) -> SelfTest:
    x, losses = baseline.log_tokens, baseline.losses
    n, count = losses.shape
    means = losses.mean(axis=0)
    errors, ratios = np.empty_like(losses), {}
    for k in range(count):
        others = np.arange(count) != k
        curve = fit_power_law(x[others], means[others])
        (value,), (weights,) = _through_means(curve, x[k : k + 1])
        errors[:, k] = losses[:, k] - (value + (losses[:, others] - means[others]) @ weights)
        correction = value - float(curve.value(x[k]))
        ratios[baseline.endpoints[k].horizon] = math.exp(curve.inverse(means[k] - correction) - x[k])
    mean, covariance = errors.mean(axis=0), np.cov(errors, rowvar=False)
    trace = float(np.trace(covariance))
    inner = float(np.max(np.abs(mean[1:-1])))
    if float(np.max(np.abs(mean))) < _ROUNDING:
        p = 1.0
    elif trace == 0:
        p = 0.0
    else:
        freedom = trace**2 / float(np.sum(covariance**2))
        p = float(stats.f.sf(n * float(mean @ mean) / trace, freedom, freedom * (n - 1)))
    shown = ", ".join(f"{ratio:.2f} at {horizon:,}" for horizon, ratio in ratios.items())
    reason = "" if p >= _SELF_TEST_LEVEL else (
        f"the curve does not recognise the baseline: it finds it {shown} steps times as fast as itself (p = {p:.2g})"
    )  # fmt: skip
    return SelfTest(p >= _SELF_TEST_LEVEL, p, ratios, reason, inner)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline an arm is, in one currency.

    A censored end has the value at the end of the testable range; the true value is beyond it.
    """

    estimate: float
    low: float
    high: float
    level: float
    censored: Literal["below", "above"] | None = None  # of the estimate
    low_censored: bool = False
    high_censored: bool = False

    def per(self, price: float) -> Ratio:
        """Return the ratio in a currency in which a token of the arm costs `price` times the baseline's."""
        return replace(self, estimate=self.estimate / price, low=self.low / price, high=self.high / price)

    def covers(self, value: float) -> bool:
        return (self.low_censored or self.low <= value) and (self.high_censored or value <= self.high)

    @property
    def text(self) -> str:
        """ "0.79 [0.76, 0.82]", with > and < where censored."""
        mark = {"above": ">", "below": "<", None: ""}[self.censored]
        low, high = "<" if self.low_censored else "", ">" if self.high_censored else ""
        return f"{mark}{self.estimate:.2f} [{low}{self.low:.2f}, {high}{self.high:.2f}]"


def ratio(arm: Endpoints, baseline: Baseline, level: float) -> Ratio | str:
    """Return the ratio in tokens (and steps) of an arm at one horizon, or the reason why there is none."""
    if baseline.curve is None or not baseline.self_test.passed:
        return baseline.self_test.reason
    if arm.diverged:
        return f"{len(arm.diverged)} of {len(arm.seeds)} runs diverged"
    common = [seed for seed in baseline.seeds if seed in arm.seeds]
    if len(common) < 2:
        return "fewer than two seeds in common with the baseline"
    own = arm.at(common)
    losses = baseline.losses[[baseline.seeds.index(seed) for seed in common]]
    x = baseline.log_tokens
    at = np.unique(np.concatenate([np.linspace(x[0], x[-1], _GRID), x]))
    value, weights = _through_means(baseline.curve, at)
    differences = own.losses[:, None] - (value + (losses - baseline.losses.mean(axis=0)) @ weights.T)  # (n, m)
    mean = differences.mean(axis=0)
    error = differences.std(axis=0, ddof=1) / math.sqrt(len(common))
    reach = float(stats.t.ppf((1 + level) / 2, len(common) - 1)) * error + _allowance(baseline, at)
    start = math.log(float(own.tokens.mean()))
    # The mean rises with the ratio, since the baseline's loss falls with its tokens.
    censored: Literal["below", "above"] | None = "above" if mean[-1] < 0 else "below" if mean[0] > 0 else None
    estimate = float(at[-1]) if censored == "above" else _first(at, mean)[0]
    low, low_censored = _first(at, mean + reach)
    high, high_censored = _first(-at[::-1], (reach - mean)[::-1])
    return Ratio(
        math.exp(estimate - start),
        math.exp(min(low, estimate) - start),
        math.exp(max(-high, estimate) - start),
        level,
        censored,
        low_censored,
        high_censored,
    )


def _through_means(curve: PowerLaw, at: Array) -> tuple[Array, Array]:
    """Return the loss at (m,) log tokens on the curve through the observed means, and the (m, K) weights of these in it.

    The deviations of the means from the power law are interpolated; beyond the outer ones they are constant.
    """
    unit = np.eye(len(curve.log_tokens))
    between = np.stack([np.interp(at, curve.log_tokens, row) for row in unit], axis=1)  # (m, K), of interpolation
    value = curve.value(at) + between @ curve.residuals
    return value, curve.weights(at) + between @ (unit - curve.weights(curve.log_tokens))


def _allowance(baseline: Baseline, at: Array) -> Array:
    """Return (m,) what the curve may miss between horizons, nats: the self-test's error, zero at the horizons.

    A horizon left out doubles the gap around it; the error of an interpolated smooth function grows with the square of
    the gap, so a quarter of that error is expected in the middle of a gap.
    """
    x = baseline.log_tokens
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    share = (at - x[left]) / (x[left + 1] - x[left])
    return np.asarray(baseline.self_test.error * share * (1 - share))


def _first(at: Array, excess: Array) -> tuple[float, bool]:
    """Return the first point of (m,) `at` where (m,) `excess` reaches zero, and whether it does so from the beginning.

    Where it never does, the last point.
    """
    kept = np.flatnonzero(excess >= 0)
    index = int(kept[0]) if len(kept) else len(at) - 1
    if index == 0 or not len(kept):
        return float(at[index]), index == 0
    share = excess[index - 1] / (excess[index - 1] - excess[index])
    return float(at[index - 1] + share * (at[index] - at[index - 1])), False


@dataclass(frozen=True)
class Compared:
    """One arm at one horizon of one model against the baseline."""

    endpoints: Endpoints
    same: Contrast | str  # against the baseline at the same horizon, or why not
    half: Contrast | str  # against the baseline at twice the steps, the paper's rule
    ratio: Ratio | str  # in steps
    prices: Mapping[Currency, float]  # of a token of the arm over one of the baseline: flops, seconds (reference times)

    def ratio_in(self, currency: Currency) -> Ratio | str:
        """Return the ratio in a currency, or why there is none."""
        if isinstance(self.ratio, str):
            return self.ratio
        price = self.prices.get(currency)
        return "no reference times" if price is None else self.ratio.per(price)


def compare(
    cells: Sequence[Endpoints], baseline: Sequence[Endpoints], fitted: Baseline, level: float
) -> list[Compared]:
    """Compare an arm's cells on one model with the baseline's, ascending in horizon, by intervals of the given level."""
    reference = {end.horizon: end for end in baseline}
    found = []
    for end in sorted(cells, key=lambda one: one.horizon):
        same, half = (
            contrast(end, reference[steps], level)
            if steps in reference
            else f"the baseline has no runs of {steps:,} steps"
            for steps in (end.horizon, PAPER_RATIO * end.horizon)
        )
        prices = _prices(end, reference.get(end.horizon))
        found.append(Compared(end, same, half, ratio(end, fitted, level), prices))
    return found


def _prices(arm: Endpoints, baseline: Endpoints | None) -> dict[Currency, float]:
    """Return the costs of a token of the arm over the baseline's, at one horizon."""
    if baseline is None:
        return {}
    ours, theirs = (
        {"flops": float(np.mean(end.flops / end.tokens)), "seconds": end.reference_seconds / float(np.mean(end.tokens))}
        for end in (arm, baseline)
    )
    prices: dict[Currency, float] = {"steps": 1.0, "tokens": 1.0}
    for currency in ("flops", "seconds"):
        if 0 < ours[currency] < math.inf and 0 < theirs[currency] < math.inf:
            prices[currency] = ours[currency] / theirs[currency]
    return prices
