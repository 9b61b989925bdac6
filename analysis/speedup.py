"""Speed-up of an arm over the baseline, with an interval and a verdict, in every currency.

**End of runs**, the paper's rule: the paired loss difference between the arm decayed over T/2 steps and the baseline
decayed over T.

**D-equivalent speed-up** (Wen et al. 2025): the baseline's final losses over its horizons give a curve L(D); an arm that
ends at loss L after D tokens has the speed-up D_baseline(L) / D. In FLOPs or seconds it is multiplied by the ratio of the
two arms' costs per token, including curvature passes.

**Interval.** The speed-up of an arm is ρ if its loss equals the baseline's at ρ times the cost. For each ρ this is a
paired t test of one linear contrast per seed,

    e_s(ρ) = L_arm,s − Σ_k w_k(ρ) · L_baseline,s(T_k),

where w are the weights of the observed losses in the baseline's curve at that point. The interval is the set of ρ that the
test does not reject. At ρ = 1 and ρ = 2 this is the end-of-runs rule, smoothed by the curve. A ρ outside the baseline's
range of horizons cannot be tested: that end of the interval is censored, not extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis import statistics
from analysis.powerlaw import LossCurve, PowerLaw, fit_loss_curve
from analysis.runs import Currency, Origin
from analysis.statistics import Interval, Variance

Array = NDArray[np.float64]
Verdict = Literal["supported", "not supported", "undecided"]
Censored = Literal["above", "below"]

THRESHOLDS = (1.0, 2.0)  # faster at all; the paper's claim
CLAIM_CURRENCIES: tuple[Currency, ...] = ("steps", "flops", "seconds")
_GRID = 121
_HOMOGENEITY = 0.05  # p of Bartlett's test below which variances are not pooled
_ROUNDING = 1e-9  # relative noise below this is rounding
_TOLERANCE = 1e-9  # relative; a threshold on a horizon is inside the range


@dataclass(frozen=True)
class Endpoints:
    """Final losses and costs of the runs of one arm at one horizon, one run per seed. Arrays have shape (n,)."""

    arm: str
    model: str
    horizon: int  # steps
    seeds: tuple[int, ...]
    losses: Array  # final validation loss, nats; NaN for a run that diverged
    tokens: Array
    flops: Array
    seconds: Array
    runs: tuple[Origin, ...] = ()

    @property
    def diverged(self) -> tuple[int, ...]:
        """Seeds of runs without a final loss."""
        return tuple(seed for seed, loss in zip(self.seeds, self.losses, strict=True) if not np.isfinite(loss))

    def cost(self, currency: Currency) -> Array:
        """Return (n,) the total cost of each run."""
        if currency == "steps":
            return np.full(len(self.seeds), float(self.horizon))
        values: Array = getattr(self, currency)
        return values

    def at(self, seeds: Sequence[int]) -> Endpoints:
        """Return the endpoints at these seeds, in this order."""
        index = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            losses=self.losses[index],
            tokens=self.tokens[index],
            flops=self.flops[index],
            seconds=self.seconds[index],
            runs=tuple(self.runs[i] for i in index) if self.runs else (),
        )


@dataclass(frozen=True)
class Claim:
    """Whether the speed-up exceeds a threshold."""

    threshold: float
    verdict: Verdict
    p: float  # two-sided, of the test at the threshold, or at the end of the range if the threshold is outside
    adjusted_p: float  # Holm, over the family of claims reported together
    direction: Literal["above", "below", "none"]  # of the estimated speed-up relative to the threshold
    # For an undecided claim: seeds with which the observed effect would be found with 80 % power after the same
    # correction. None: more than 1000, or unknown.
    seeds_to_decide: int | None
    testable: bool  # False if the threshold is outside the baseline's range
    difference: Interval | None = (
        None  # arm minus baseline at threshold times the cost (or at the end of the range), nats
    )
    standard_deviation: float = math.nan  # of one seed's difference, nats

    @property
    def text(self) -> str:
        """Return the claim in words."""
        return (
            "faster at all (ratio > 1)" if self.threshold == 1 else f"{self.threshold:g}× (ratio ≥ {self.threshold:g})"
        )


@dataclass(frozen=True)
class SpeedUp:
    """D-equivalent speed-up of one arm at one horizon in one currency.

    Without an estimate, `estimate` is NaN and `reason` tells why. A censored estimate or end of the interval has the value
    at the end of the testable range; the true value is beyond it.
    """

    arm: str
    model: str
    horizon: int
    currency: Currency
    seeds: int
    estimate: float
    estimate_censored: Censored | None
    low: float
    low_censored: bool
    high: float
    high_censored: bool
    level: float
    log_standard_error: float  # of the logarithm of the estimate; NaN without an estimate
    range: tuple[float, float]  # testable speed-ups at this horizon
    method: str
    smallest_detectable: float  # loss difference in nats that this many seeds find with 80 % power
    smallest_detectable_ratio: float  # the same as a speed-up (1.03: 3 % faster)
    claims: tuple[Claim, ...]
    reason: str = ""
    runs: tuple[Origin, ...] = ()

    def claim(self, threshold: float) -> Claim:
        return next(claim for claim in self.claims if claim.threshold == threshold)

    @property
    def text(self) -> str:
        """ "1.21 [1.08, 1.37]", with > and < if censored."""
        if math.isnan(self.estimate):
            return self.reason or "undecided"
        mark = {"above": ">", "below": "<", None: ""}[self.estimate_censored]
        low = f"{'<' if self.low_censored else ''}{self.low:.2f}"
        high = f"{'>' if self.high_censored else ''}{self.high:.2f}"
        return f"{mark}{self.estimate:.2f} [{low}, {high}]"


@dataclass(frozen=True)
class EndOfRuns:
    """The paper's rule at one pair of horizons: the arm at T/ratio against the baseline at T."""

    arm: str
    model: str
    baseline_horizon: int
    arm_horizon: int
    difference: Interval  # arm minus baseline, nats; <= 0 if T/ratio steps suffice
    variance: Variance
    p: float
    adjusted_p: float
    smallest_detectable: float  # nats
    seeds: tuple[int, ...]
    verdict: Verdict
    runs: tuple[Origin, ...] = ()

    @property
    def ratio(self) -> float:
        return self.baseline_horizon / self.arm_horizon


@dataclass(frozen=True)
class Baseline:
    """The baseline's final losses over its horizons, and the curve through their means."""

    endpoints: tuple[Endpoints, ...]  # ascending in horizon, all at the same seeds
    curve: LossCurve
    losses: Array = field(repr=False)  # (n, K) per seed and horizon

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.endpoints[0].seeds

    @property
    def range(self) -> tuple[float, float]:
        """Log of the training tokens of the shortest and the longest horizon."""
        return float(self.curve.log_tokens[0]), float(self.curve.log_tokens[-1])

    def cost_per_token(self, currency: Currency) -> Array:
        """Return (n,) the cost per token of each seed, averaged over horizons, where it is the same, to reduce noise."""
        return np.mean([end.cost(currency) / end.tokens for end in self.endpoints], axis=0)

    @property
    def lack_of_fit_p(self) -> float:
        """p of an F test of the power law's misfit against seed noise; NaN for interpolation, which has no misfit."""
        seeds, horizons = self.losses.shape
        if not isinstance(self.curve, PowerLaw) or seeds < 2:
            return float("nan")
        freedom = horizons - 3 + len(self.curve.at_bound)
        noise = float(self.losses.var(axis=0, ddof=1).mean())
        misfit = seeds * float(np.sum(self.curve.residuals**2)) / max(freedom, 1)
        if noise == 0:
            return float("nan")
        return float(special.fdtrc(max(freedom, 1), horizons * (seeds - 1), misfit / noise))


def fit_baseline(endpoints: Sequence[Endpoints]) -> Baseline:
    """Fit the baseline's curve to its horizons, at their common seeds.

    A horizon with a diverged run is left out entirely: leaving out only the seed would bias the curve to lucky seeds.

    Raises:
        ValueError: no horizon, or no seed common to all horizons.
    """
    if not endpoints:
        raise ValueError("the baseline has no finished run: run it first")
    ordered = sorted((end for end in endpoints if not end.diverged), key=lambda end: end.horizon)
    if not ordered:
        raise ValueError("the baseline diverged at every horizon: find hyper-parameters that train")
    common = _common_seeds(ordered)
    if not common:
        listing = "; ".join(f"{end.horizon} steps: {list(end.seeds)}" for end in ordered)
        raise ValueError(f"no seed of the baseline has a final loss at every horizon ({listing}): use the same seeds")
    ordered = [end.at(common) for end in ordered]
    losses = np.stack([end.losses for end in ordered], axis=1)
    tokens = [float(end.tokens.mean()) for end in ordered]
    return Baseline(tuple(ordered), fit_loss_curve(tokens, losses.mean(axis=0)), losses)


def speed_ups(
    arm: Sequence[Endpoints],
    baseline: Baseline,
    currency: Currency,
    *,
    level: float = 0.95,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[SpeedUp]:
    """Return the D-equivalent speed-up of one arm on one model, one result per horizon of the arm.

    All horizons are needed together because their seed variance is pooled if it is homogeneous.
    """
    ordered = sorted(arm, key=lambda end: end.horizon)
    paired = [_Paired.make(end, baseline, currency) for end in ordered]
    usable = [one for one in paired if isinstance(one, _Paired)]
    results = []
    for end, one in zip(ordered, paired, strict=True):
        if isinstance(one, str):
            results.append(_without_estimate(end, currency, level, thresholds, baseline, one))
        else:
            results.append(_speed_up(one, usable, baseline, currency, level, thresholds))
    return results


def end_of_runs(
    arm: Sequence[Endpoints], baseline: Sequence[Endpoints], *, ratio: float = 2.0, level: float = 0.95
) -> list[EndOfRuns]:
    """Apply the paper's rule at each baseline horizon T for which the arm has runs of T/ratio steps.

    "supported" means that the arm ends significantly lower, "not supported" significantly higher. The p-values are
    corrected (Holm) over the returned horizons.
    """
    arms = {end.horizon: end for end in arm}
    pairs: list[tuple[Endpoints, Endpoints]] = []
    for end in sorted(baseline, key=lambda one: one.horizon):
        counterpart = arms.get(round(end.horizon / ratio))
        if counterpart is None or end.horizon != round(counterpart.horizon * ratio):
            continue
        common = _common_seeds([counterpart, end])
        complete = not counterpart.diverged and not end.diverged
        if common and complete:
            pairs.append((counterpart.at(common), end.at(common)))
    differences = [short.losses - long.losses for short, long in pairs]
    pooled = statistics.pooled_variance(differences)
    results = []
    for (short, long), values in zip(pairs, differences, strict=True):
        variance = pooled or statistics.own_variance(values)
        results.append(
            EndOfRuns(
                arm=short.arm,
                model=short.model,
                baseline_horizon=long.horizon,
                arm_horizon=short.horizon,
                difference=statistics.paired_interval(values, level=level, variance=variance),
                variance=variance,
                p=statistics.paired_p(values, variance=variance),
                adjusted_p=math.nan,
                smallest_detectable=statistics.smallest_detectable_difference(
                    math.sqrt(variance.value), len(values), level=level, freedom=variance.degrees_of_freedom
                ),
                seeds=short.seeds,
                verdict="undecided",
                runs=(*short.runs, *long.runs),
            )
        )
    return correct_ends(results, level)


def correct_ends(ends: Sequence[EndOfRuns], level: float = 0.95) -> list[EndOfRuns]:
    """Return the comparisons with p-values corrected over all of them (Holm), and verdicts to match."""
    adjusted = statistics.holm([end.p for end in ends])
    return [
        replace(
            end,
            adjusted_p=float(p),
            verdict=_verdict(float(p), level, "above" if end.difference.estimate < 0 else "below"),
        )
        for end, p in zip(ends, adjusted, strict=True)
    ]


def headline(results: Sequence[SpeedUp]) -> SpeedUp:
    """Choose the horizon to report for one arm on one model in one currency.

    It is the longest one at which all thresholds are testable, or else the one whose range is closest to them (it can
    still refute a claim). The choice depends only on the design, not on the losses.
    """
    if not results:
        raise ValueError("no speed-up: the arm has no finished horizon")

    def missed(one: SpeedUp) -> float:
        low, high = one.range
        if math.isnan(low):
            return math.inf
        beyond = (max(math.log(low / c.threshold), math.log(c.threshold / high)) for c in one.claims if not c.testable)
        return sum(beyond)

    return min(results, key=lambda one: (missed(one), -one.horizon))


def correct(claims: Sequence[Claim], level: float = 0.95) -> list[Claim]:
    """Return the claims with p-values corrected over all of them (Holm), and verdicts and seeds to match."""
    p_values = np.array([claim.p for claim in claims])
    adjusted = statistics.holm(p_values)
    # Holm requires p <= (1 - level) / (m - r) of the claim of rank r (from 0).
    ranks = np.argsort(np.argsort(p_values, kind="stable"), kind="stable")
    corrected = []
    for claim, p, rank in zip(claims, adjusted, ranks, strict=True):
        verdict = _verdict(float(p), level, claim.direction)
        seeds = None
        if verdict == "undecided" and claim.testable and claim.difference is not None:
            asked = 1 - (1 - level) / (len(claims) - int(rank))
            seeds = statistics.seeds_to_decide(claim.difference.estimate, claim.standard_deviation, level=asked)
        corrected.append(replace(claim, adjusted_p=float(p), verdict=verdict, seeds_to_decide=seeds))
    return corrected


@dataclass(frozen=True)
class _Paired:
    """One horizon of an arm and the baseline at the same seeds."""

    endpoints: Endpoints
    baseline_losses: Array  # (n, K)
    log_tokens: Array  # (n,) of the arm's runs
    log_cost_ratio: Array  # (n,) log of baseline cost per token over the arm's; its noise is timing noise
    range: tuple[float, float]  # log speed-ups inside the baseline's range

    @classmethod
    def make(cls, end: Endpoints, baseline: Baseline, currency: Currency) -> _Paired | str:
        """Return the pairing, or the reason why there is none."""
        if end.diverged:
            return f"{len(end.diverged)} of {len(end.seeds)} runs diverged"
        common = [seed for seed in baseline.seeds if seed in end.seeds]
        if not common:
            return "no seed in common with the baseline"
        index = [baseline.seeds.index(seed) for seed in common]
        chosen = end.at(common)
        ratio = baseline.cost_per_token(currency)[index] / (chosen.cost(currency) / chosen.tokens)
        if not np.all(np.isfinite(ratio)) or np.any(ratio <= 0):
            return f"no {currency} recorded"
        log_tokens, log_ratio = np.log(chosen.tokens), np.log(ratio)
        offset = float(np.mean(log_ratio - log_tokens))
        shortest, longest = baseline.range
        return cls(chosen, baseline.losses[index], log_tokens, log_ratio, (shortest + offset, longest + offset))

    def baseline_log_tokens(self, log_ratio: Array) -> Array:
        """Return (m,) log of the tokens that the baseline trains on for `exp(log_ratio)` times the arm's cost."""
        at: Array = log_ratio + float(np.mean(self.log_tokens - self.log_cost_ratio))
        return at

    def contains(self, log_ratio: Array) -> NDArray[np.bool_]:
        low, high = self.range
        return (log_ratio >= low - _TOLERANCE) & (log_ratio <= high + _TOLERANCE)

    def contrasts(self, log_ratio: Array, baseline: Baseline) -> tuple[Array, Array]:
        """Return arm minus baseline at `exp(log_ratio)` times the cost.

        Args:
            log_ratio: (m,) speed-ups to test.

        Returns:
            (n, m) e_s(ρ) in nats, and (m, K) the weights of the baseline's horizons.
        """
        at = self.baseline_log_tokens(log_ratio)
        weights = baseline.curve.weights(at)
        deviation = self.baseline_losses - baseline.losses.mean(axis=0)
        equivalent = baseline.curve.value(at) + deviation @ weights.T
        return self.endpoints.losses[:, None] - equivalent, weights


@dataclass(frozen=True)
class _Test:
    """The paired t test at (m,) speed-ups."""

    mean: Array  # nats
    standard_deviation: Array  # of one seed's contrast
    standard_error: Array
    freedom: Array

    @property
    def statistic(self) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.mean == 0, 0.0, self.mean / self.standard_error)

    @property
    def p(self) -> Array:
        p = 2 * special.stdtr(np.maximum(self.freedom, 1), -np.abs(self.statistic))
        return np.where(self.freedom > 0, p, 1.0)

    def critical(self, level: float) -> Array:
        values = special.stdtrit(np.maximum(self.freedom, 1), (1 + level) / 2)
        return np.where(self.freedom > 0, values, np.inf)


def _test(one: _Paired, together: Sequence[_Paired], baseline: Baseline, log_ratio: Array) -> _Test:
    """Test the horizon `one` at (m,) log speed-ups, with its variance pooled over the arm's horizons.

    A horizon is pooled at the speed-ups at which it is itself testable, if Bartlett's test does not reject it.
    """
    contrasts, weights = one.contrasts(log_ratio, baseline)
    n, points = contrasts.shape
    if n < 2:
        unknown = np.full(points, np.nan)
        return _Test(contrasts.mean(axis=0), unknown, unknown, np.zeros(points))
    others = [other for other in together if other is not one and len(other.endpoints.seeds) > 1]
    members = [(contrasts, weights), *(other.contrasts(log_ratio, baseline) for other in others)]
    counts = np.array([len(e) - 1.0 for e, _ in members])
    variance, freedom = _pooled(
        variance=np.stack([e.var(axis=0, ddof=1) for e, _ in members]),
        freedom=counts,
        weights=np.stack([w for _, w in members]),
        present=np.stack([np.ones(points, dtype=bool), *(other.contains(log_ratio) for other in others)]),
    )
    # Timing noise: a relative error of the cost ratio moves the point on the baseline's curve, and the loss by the slope.
    # The relative noise is equal at all horizons, but not in nats, so the two variances are pooled separately.
    horizons = baseline.losses.shape[1]
    clock_variance, clock_freedom = _pooled(
        variance=np.array([[float(m.log_cost_ratio.var(ddof=1))] for m in (one, *others)]),
        freedom=counts,
        weights=np.full((len(members), 1, horizons), 1 / horizons),
        present=np.ones((len(members), 1), dtype=bool),
    )
    # A single horizon has no slope: the test there compares the final losses, without timing noise.
    slope = np.nan_to_num(baseline.curve.slope(one.baseline_log_tokens(log_ratio)), nan=0.0)
    clock = np.where(clock_variance > _ROUNDING**2, clock_variance, 0.0) * slope**2
    both = variance + clock
    with np.errstate(divide="ignore", invalid="ignore"):
        welch = np.where(clock > 0, both**2 / (variance**2 / freedom + clock**2 / clock_freedom), freedom)
    deviation = np.sqrt(both)
    return _Test(contrasts.mean(axis=0), deviation, deviation / math.sqrt(n), welch)


def _pooled(
    variance: Array,  # (J, m) of each horizon's values; the first horizon is the tested one
    freedom: Array,  # (J,)
    weights: Array,  # (J, m, K) of the baseline's runs in the values; the arm's own run has weight 1
    present: NDArray[np.bool_],  # (J, m) whether the horizon is pooled
) -> tuple[Array, Array]:  # (m,) variance of the first horizon's values, and its degrees of freedom
    """Return the first horizon's variance, pooled over the arm's horizons if Bartlett's test does not reject it.

    Horizons weigh the baseline's runs differently, so variances are divided by their scale 1 + Σw² for the comparison.
    They share some of these runs, so the pooled variance has fewer degrees of freedom than their sum (Satterthwaite's
    approximation, with the correlation implied by the weights).
    """
    scale = 1 + np.sum(weights**2, axis=2)
    variance = variance / scale
    nu = freedom[:, None] * present
    total = nu.sum(axis=0)
    pooled = np.sum(nu * variance, axis=0) / total
    groups = present.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(present, np.log(variance), 0.0)
        statistic = total * np.log(pooled) - np.sum(nu * logs, axis=0)
        reciprocal = np.sum(present / freedom[:, None], axis=0)
        correction = 1 + (reciprocal - 1 / total) / (3 * np.maximum(groups - 1, 1))
        p = special.chdtrc(np.maximum(groups - 1, 1), statistic / correction)
    homogeneous = (groups > 1) & ((p >= _HOMOGENEITY) | (pooled == 0))
    covariance = np.einsum("imk,jmk->ijm", weights, weights)
    correlation = covariance / np.sqrt(scale[:, None] * scale[None, :])
    correlation[np.diag_indices(len(freedom))] = 1.0
    shared = np.minimum(nu[:, None], nu[None, :])
    effective = total**2 / np.sum(correlation**2 * shared, axis=(0, 1))
    return np.where(homogeneous, pooled, variance[0]) * scale[0], np.where(homogeneous, effective, freedom[0])


def _speed_up(
    one: _Paired,
    together: Sequence[_Paired],
    baseline: Baseline,
    currency: Currency,
    level: float,
    thresholds: Sequence[float],
) -> SpeedUp:
    low_end, high_end = one.range
    tested = np.clip(np.log(np.asarray(thresholds, dtype=np.float64)), low_end, high_end)
    grid = np.unique(np.concatenate([np.linspace(low_end, high_end, _GRID), tested]))
    test = _test(one, together, baseline, grid)
    found = _invert(grid, test, level)
    cell = (high_end - low_end) / (_GRID - 1)
    if 0 < found.high - found.low < 30 * cell:
        # A narrow interval: repeat between its neighbours on a finer grid.
        fine = np.linspace(max(found.low - cell, low_end), min(found.high + cell, high_end), _GRID)
        refined = _invert(fine, _test(one, together, baseline, fine), level)
        if (refined.low_censored, refined.high_censored) == (found.low_censored, found.high_censored):
            found = refined
    nearest = int(np.argmin(np.abs(grid - found.estimate)))
    claims = tuple(
        _claim(one, threshold, test, int(np.searchsorted(grid, at)), level)
        for threshold, at in zip(thresholds, tested, strict=True)
    )
    n = len(one.endpoints.seeds)
    detectable = statistics.smallest_detectable_difference(
        float(test.standard_deviation[nearest]), n, level=level, freedom=float(test.freedom[nearest])
    )
    slope = abs(float(baseline.curve.slope(one.baseline_log_tokens(np.array([found.estimate]))[0])))
    return SpeedUp(
        arm=one.endpoints.arm,
        model=one.endpoints.model,
        horizon=one.endpoints.horizon,
        currency=currency,
        seeds=n,
        estimate=math.exp(found.estimate),
        estimate_censored=found.censored,
        low=math.exp(found.low),
        low_censored=found.low_censored,
        high=math.exp(found.high),
        high_censored=found.high_censored,
        level=level,
        log_standard_error=float(test.standard_error[nearest]) / slope if slope > 0 else math.nan,
        range=(math.exp(low_end), math.exp(high_end)),
        method=baseline.curve.method,
        smallest_detectable=detectable,
        smallest_detectable_ratio=math.exp(detectable / slope) if slope > 0 and detectable / slope < 50 else math.inf,
        claims=claims,
        runs=(*one.endpoints.runs, *(run for end in baseline.endpoints for run in end.at(one.endpoints.seeds).runs)),
    )


@dataclass(frozen=True)
class _Inverted:
    """Estimate and interval of a log speed-up."""

    estimate: float
    censored: Censored | None
    low: float
    low_censored: bool
    high: float
    high_censored: bool


def _invert(grid: Array, test: _Test, level: float) -> _Inverted:
    """Return the interval of speed-ups that the test does not reject, and the zero of its mean contrast."""
    estimate, censored = _estimate(grid, test.mean)
    nearest = int(np.argmin(np.abs(grid - estimate)))
    low, low_censored = _walk(grid, test, level, nearest, -1)
    high, high_censored = _walk(grid, test, level, nearest, +1)
    return _Inverted(estimate, censored, min(low, estimate), low_censored, max(high, estimate), high_censored)


def _estimate(grid: Array, mean: Array) -> tuple[float, Censored | None]:
    """Return the zero of the mean contrast, which rises with the ratio because the baseline's loss falls with its cost."""
    if mean[-1] < 0:
        return float(grid[-1]), "above"
    if mean[0] > 0:
        return float(grid[0]), "below"
    if len(grid) == 1:
        return float(grid[0]), None
    index = int(np.flatnonzero(mean >= 0)[0])
    if index == 0:
        return float(grid[0]), None
    share = mean[index - 1] / (mean[index - 1] - mean[index])
    return float(grid[index - 1] + share * (grid[index] - grid[index - 1])), None


def _walk(grid: Array, test: _Test, level: float, start: int, direction: Literal[-1, 1]) -> tuple[float, bool]:
    """Return the outermost speed-up on one side of the estimate that the test does not reject, and whether it is censored.

    The search goes inward from the far end: if horizons differ in noise, a test can reject close to the estimate but not
    farther out, and the interval must include both. The statistic is nearly linear in the log ratio, so the end is
    interpolated between two grid points.
    """
    excess = direction * test.statistic - test.critical(level)  # above zero if rejected on this side
    # Stop on the other side of the estimate, which may be between two grid points.
    last = min(max(start - direction, 0), len(grid) - 1)
    farthest = len(grid) - 1 if direction > 0 else 0
    index = farthest
    while excess[index] > 0:
        if index == last:
            return float(grid[index]), False
        index -= direction
    if index == farthest:
        return float(grid[index]), True
    inside, outside = excess[index], excess[index + direction]
    share = 1.0 if math.isinf(outside) or math.isinf(inside) else inside / (inside - outside)
    return float(grid[index] + share * (grid[index + direction] - grid[index])), False


def _claim(one: _Paired, threshold: float, test: _Test, index: int, level: float) -> Claim:
    """Return the claim from the test at its threshold, or at the nearest end of the range."""
    target = math.log(threshold)
    testable = bool(one.contains(np.array([target]))[0])
    mean, p = float(test.mean[index]), float(test.p[index])
    direction: Literal["above", "below", "none"] = "above" if mean < 0 else "below" if mean > 0 else "none"
    # At the end of the range, only a result that points away from the threshold is informative.
    if not testable and direction == ("above" if target > one.range[1] else "below"):
        direction, p = "none", 1.0
    verdict = _verdict(p, level, direction)
    deviation = float(test.standard_deviation[index])
    seeds = statistics.seeds_to_decide(mean, deviation, level=level) if testable and verdict == "undecided" else None
    error, freedom = float(test.standard_error[index]), float(test.freedom[index])
    reach = float(test.critical(level)[index]) * error if freedom > 0 else math.inf
    difference = Interval(mean, mean - reach, mean + reach, level, error, freedom)
    return Claim(threshold, verdict, p, p, direction, seeds, testable, difference, deviation)


def _verdict(p: float, level: float, direction: str) -> Verdict:
    if p >= 1 - level or direction == "none":
        return "undecided"
    return "supported" if direction == "above" else "not supported"


def _without_estimate(
    end: Endpoints, currency: Currency, level: float, thresholds: Sequence[float], baseline: Baseline, reason: str
) -> SpeedUp:
    nan = float("nan")
    # The range that would be testable with finished runs: the design chooses the horizon, not the outcome.
    ratio = float(np.mean(baseline.cost_per_token(currency)) / np.mean(end.cost(currency) / end.tokens))
    reach = np.exp(baseline.range) * ratio / end.tokens.mean() if math.isfinite(ratio) and ratio > 0 else (nan, nan)
    low, high = float(reach[0]), float(reach[1])
    claims = tuple(
        Claim(
            threshold=threshold,
            verdict="undecided",
            p=1.0,
            adjusted_p=1.0,
            direction="none",
            seeds_to_decide=None,
            testable=low * (1 - _TOLERANCE) <= threshold <= high * (1 + _TOLERANCE),
        )
        for threshold in thresholds
    )
    return SpeedUp(
        arm=end.arm,
        model=end.model,
        horizon=end.horizon,
        currency=currency,
        seeds=len(end.seeds),
        estimate=nan,
        estimate_censored=None,
        low=0.0,
        low_censored=True,
        high=math.inf,
        high_censored=True,
        level=level,
        log_standard_error=nan,
        range=(low, high),
        method=baseline.curve.method,
        smallest_detectable=math.inf,
        smallest_detectable_ratio=math.inf,
        claims=claims,
        reason=reason,
        runs=end.runs,
    )


def _common_seeds(endpoints: Sequence[Endpoints]) -> list[int]:
    """Return the seeds with a final loss in all cells, ascending."""
    sets = [set(end.seeds) - set(end.diverged) for end in endpoints]
    return sorted(set.intersection(*sets))
