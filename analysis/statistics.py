"""Intervals, tests and power for a few paired seeds.

Everything here is Student's t on paired differences. With 3 or 5 seeds, 95 % bootstrap intervals covered only 75 % and
84 % in a simulation, paired t intervals 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

# Gauss-Legendre nodes and weights on (0, 1).
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(96)
_NODES, _NODE_WEIGHTS = (_NODES + 1) / 2, _NODE_WEIGHTS / 2


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval, in the unit of the values (nats for losses)."""

    estimate: float
    low: float
    high: float
    level: float
    standard_error: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class Variance:
    """The variance of one difference (not of the mean), and what it was estimated from."""

    value: float
    degrees_of_freedom: float
    pooled_over: int  # groups; 1 = the group's own variance
    homogeneity_p: float  # Bartlett's test over the groups; NaN with fewer than two groups

    @property
    def standard_deviation(self) -> float:
        return math.sqrt(self.value)


def own_variance(differences: ArrayLike) -> Variance:
    """Return the sample variance; NaN, with no degrees of freedom, for fewer than two differences."""
    values = _vector(differences)
    if len(values) < 2:
        return Variance(float("nan"), 0.0, 1, float("nan"))
    return Variance(float(values.var(ddof=1)), len(values) - 1.0, 1, float("nan"))


def pooled_variance(groups: Sequence[ArrayLike], *, significance: float = 0.05) -> Variance | None:
    """Pool the variance of several groups of differences (a group is a horizon), unless Bartlett's test rejects it.

    Args:
        groups: (n_i,) differences each; groups of fewer than two are ignored.
        significance: at a smaller p of Bartlett's test, the groups' variances differ.

    Returns:
        The pooled variance with Σ(n_i - 1) degrees of freedom, or None if the groups' variances differ.
    """
    usable = [values for values in map(_vector, groups) if len(values) >= 2]
    if len(usable) < 2:
        return own_variance(usable[0]) if usable else own_variance([])
    variances = np.array([values.var(ddof=1) for values in usable])
    freedom = np.array([len(values) - 1.0 for values in usable])
    p = bartlett_p(variances, freedom)
    if p < significance:
        return None
    return Variance(float(variances @ freedom / freedom.sum()), float(freedom.sum()), len(usable), p)


def bartlett_p(variances: ArrayLike, freedom: ArrayLike) -> float:
    """Return p of Bartlett's test that normal samples with these variances and degrees of freedom share one variance.

    Groups with zero variance agree with each other, but not with a group of nonzero variance.
    """
    s2, nu = _vector(variances), _vector(freedom)
    if np.all(s2 == 0):
        return 1.0
    if np.any(s2 == 0):
        return 0.0
    total = nu.sum()
    pooled = s2 @ nu / total
    statistic = total * math.log(pooled) - float(nu @ np.log(s2))
    correction = 1 + (float(np.sum(1 / nu)) - 1 / total) / (3 * (len(s2) - 1))
    return float(stats.chi2.sf(statistic / correction, len(s2) - 1))


def paired_interval(differences: ArrayLike, *, level: float = 0.95, variance: Variance | None = None) -> Interval:
    """Return Student's t interval for the mean of paired differences.

    Args:
        differences: (n,) one per seed, arm minus baseline with the same initial weights and the same data.
        level: confidence level, 0 < level < 1.
        variance: a pooled variance; default: the differences' own. If it is NaN, the interval is infinite.
    """
    values = _vector(differences)
    if len(values) == 0:
        raise ValueError("no differences: an interval needs at least one pair of runs")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1, such as 0.95")
    variance = variance or own_variance(values)
    mean = float(values.mean())
    if variance.degrees_of_freedom <= 0:
        return Interval(mean, -math.inf, math.inf, level, math.inf, 0.0)
    error = math.sqrt(variance.value / len(values))
    reach = float(stats.t.ppf((1 + level) / 2, variance.degrees_of_freedom)) * error
    return Interval(mean, mean - reach, mean + reach, level, error, variance.degrees_of_freedom)


def paired_p(differences: ArrayLike, *, null: float = 0.0, variance: Variance | None = None) -> float:
    """Return the two-sided p of Student's t test that the mean of paired differences is `null`; 1 without a variance."""
    interval = paired_interval(differences, variance=variance)
    if interval.degrees_of_freedom <= 0:
        return 1.0
    distance = abs(interval.estimate - null)
    if interval.standard_error == 0:
        return 1.0 if distance == 0 else 0.0
    return float(2 * stats.t.sf(distance / interval.standard_error, interval.degrees_of_freedom))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return (m,) Holm's adjusted p-values in the given order; compare each with the family's error rate."""
    p = _vector(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped) if len(p) else stepped
    return adjusted


def power(effect: float, standard_deviation: float, seeds: int, *, level: float = 0.95, freedom: float = 0.0) -> float:
    """Return the probability that a paired t test finds a true mean difference of `effect`.

    Args:
        effect: true mean of the differences, in their unit.
        standard_deviation: of one difference.
        seeds: number of pairs.
        freedom: degrees of freedom of the variance; default: seeds - 1 (more if it is pooled).
    """
    nu = freedom or seeds - 1
    if nu <= 0:
        return 0.0
    if standard_deviation == 0:
        return 1.0 if effect else 0.0
    return _power_of(nu, level)(abs(effect) * math.sqrt(seeds) / standard_deviation)


def _power_of(freedom: float, level: float) -> Callable[[float], float]:
    """Return P(|T| > critical) of a noncentral t as a function of its shift.

    Averages the normal probability over quantiles of the chi distribution, because scipy's noncentral t returns NaN at
    shifts and degrees of freedom that occur here.
    """
    critical = float(special.stdtrit(freedom, (1 + level) / 2))
    spread = critical * np.sqrt(2 * special.gammaincinv(freedom / 2, _NODES) / freedom)
    return lambda shift: float(_NODE_WEIGHTS @ (special.ndtr(shift - spread) + special.ndtr(-shift - spread)))


def smallest_detectable_difference(
    standard_deviation: float, seeds: int, *, level: float = 0.95, target: float = 0.8, freedom: float = 0.0
) -> float:
    """Return the true difference that a paired t test finds with probability `target`; infinite for a single seed."""
    if (freedom or seeds - 1) <= 0 or not math.isfinite(standard_deviation):
        return math.inf
    if standard_deviation == 0:
        return 0.0
    power_at = _power_of(freedom or seeds - 1, level)
    upper = 4.0
    while power_at(upper) < target:
        upper *= 2
    shift = optimize.brentq(lambda value: power_at(value) - target, 0.0, upper, rtol=1e-6)
    return float(shift) * standard_deviation / math.sqrt(seeds)


def seeds_to_decide(
    effect: float, standard_deviation: float, *, level: float = 0.95, target: float = 0.8, limit: int = 1000
) -> int | None:
    """Return the fewest seeds with which a paired t test finds a difference of `effect` with probability `target`.

    None if more than `limit` are needed: the difference is zero or too small to matter.
    """
    if not (math.isfinite(effect) and math.isfinite(standard_deviation)):
        return None

    def enough(seeds: int) -> bool:
        return power(effect, standard_deviation, seeds, level=level) >= target

    if effect == 0 or not enough(limit):
        return None
    low, high = 1, limit  # one seed is never enough, `limit` is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"expected a vector of values, got shape {vector.shape}")
    if not np.all(np.isfinite(vector)):
        raise ValueError("a value is not finite: a diverged run has no final loss; leave its cell undecided")
    return vector
