"""Fits, with bands, of the loss against size and tokens, and of the speed-up against both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from analysis.powerlaw import PowerLaw, fit_power_law
from analysis.speedup import Endpoints, SpeedUp
from analysis.statistics import Interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScalingLaw:
    """A power law of the loss in tokens or parameters, with the uncertainty from seeds."""

    arm: str
    axis: str  # "tokens" or "parameters"
    values: Array  # (K,) of the axis, ascending
    losses: Array  # (n, K) nats, per seed
    law: PowerLaw
    level: float

    def band(self, at: ArrayLike) -> tuple[Array, Array, Array]:
        """Return (…) loss, lower and upper end of its pointwise confidence band at (…) tokens or parameters.

        The band propagates seed noise through the fit. It assumes a power law, which nothing checks beyond the data.
        """
        x = np.log(np.asarray(at, dtype=np.float64))
        value = self.law.value(x)
        seeds = len(self.losses)
        if seeds < 2:
            return value, np.full_like(value, -np.inf), np.full_like(value, np.inf)
        deviations = (self.losses - self.losses.mean(axis=0)) @ np.moveaxis(self.law.weights(x), -1, 0)
        error = deviations.std(axis=0, ddof=1) / math.sqrt(seeds)
        reach = float(special.stdtrit(seeds - 1, (1 + self.level) / 2)) * error
        return value, value - reach, value + reach


def scaling_law(
    arm: str, axis: str, values: Sequence[float], ends: Sequence[Endpoints], level: float = 0.95
) -> ScalingLaw | None:
    """Fit the law to final losses at ascending values of the axis; None for fewer than three points."""
    common = sorted(set.intersection(*(set(end.seeds) - set(end.diverged) for end in ends))) if ends else []
    if len(ends) < 3 or not common:
        return None
    losses = np.stack([end.at(common).losses for end in ends], axis=1)
    x = np.asarray(values, dtype=np.float64)
    return ScalingLaw(arm, axis, x, losses, fit_power_law(np.log(x), losses.mean(axis=0)), level)


@dataclass(frozen=True)
class Trend:
    """How the logarithm of an arm's speed-up changes with the logarithms of training tokens and of model size."""

    arm: str
    currency: str
    names: tuple[str, ...]  # "constant", then "tokens" and "parameters" if they vary
    coefficients: Array  # (P,)
    covariance: Array  # (P, P)
    centre: Array  # (P,) means, subtracted from the logarithms
    reach: Mapping[str, tuple[float, float]]  # range of the data
    points: int
    level: float
    freedom: float  # of Student's t if the covariance comes from the points' scatter, else infinite

    def slope(self, name: str) -> Interval | None:
        """Return the change of log speed-up per e-fold of "tokens" or "parameters"; None if these do not vary."""
        if name not in self.names:
            return None
        index = self.names.index(name)
        return self._interval(np.eye(len(self.names))[index])

    def at(self, *, tokens: float, parameters: float) -> Interval:
        """Return the predicted log speed-up with its band."""
        values = {"constant": 1.0, "tokens": math.log(tokens), "parameters": math.log(parameters)}
        return self._interval(np.array([values[name] for name in self.names]) - self.centre)

    def worth(self, *, tokens: float, parameters: float) -> str:
        """Describe how reliable a prediction is."""
        factors = []
        for name, value in (("tokens", tokens), ("parameters", parameters)):
            low, high = self.reach[name]
            factor = max(value / high, low / value)
            if factor > 1.001:
                known = "no information" if name not in self.names else f"data over a factor of {high / low:.3g}"
                factors.append(f"{factor:.3g} times beyond the {name} seen ({known})")
        if not factors:
            return f"Within the range of the {self.points} points that it is made of."
        return (
            f"An extrapolation {' and '.join(factors)} from {self.points} points: the band holds only if the trend is "
            "a straight line there, which nothing here can check. A reason to run the larger study, not a result."
        )

    def _interval(self, row: Array) -> Interval:
        estimate = float(row @ self.coefficients)
        error = math.sqrt(max(float(row @ self.covariance @ row), 0.0))
        known = math.isinf(self.freedom)
        quantile = special.ndtri((1 + self.level) / 2) if known else special.stdtrit(self.freedom, (1 + self.level) / 2)
        reach = float(quantile) * error
        return Interval(estimate, estimate - reach, estimate + reach, self.level, error, self.freedom)


def trend(results: Sequence[SpeedUp], tokens: Sequence[float], parameters: Sequence[float]) -> Trend | None:
    """Fit log speed-up to log tokens and log parameters by weighted least squares.

    Weights are the inverse variances of the estimates; if the points scatter more than these allow, the covariance is
    widened to match. Censored estimates are left out.

    Args:
        results: speed-ups of one arm in one currency.
        tokens: training tokens of each.
        parameters: model size of each.

    Returns:
        None with fewer than two usable points.
    """
    usable = [
        (one, math.log(d), math.log(n))
        for one, d, n in zip(results, tokens, parameters, strict=True)
        if one.estimate_censored is None and math.isfinite(one.estimate) and one.log_standard_error > 0
    ]
    if len(usable) < 2:
        return None
    y = np.array([math.log(one.estimate) for one, _, _ in usable])
    weight = np.array([1 / one.log_standard_error**2 for one, _, _ in usable])
    columns, names, centre = [np.ones(len(y))], ["constant"], [0.0]
    logs = {"tokens": np.array([d for _, d, _ in usable]), "parameters": np.array([n for _, _, n in usable])}
    for name, values in logs.items():
        candidate = np.column_stack([*columns, values - values.mean()])
        if np.linalg.matrix_rank(candidate, tol=1e-6) > len(columns):
            columns.append(values - values.mean())
            names.append(name)
            centre.append(float(values.mean()))
    design = np.column_stack(columns)
    covariance = np.asarray(np.linalg.inv(design.T @ (weight[:, None] * design)), dtype=np.float64)
    coefficients = covariance @ design.T @ (weight * y)
    degrees, freedom = len(y) - len(names), math.inf
    if degrees > 0:
        scatter = float(weight @ (y - design @ coefficients) ** 2) / degrees
        if scatter > 1:
            covariance, freedom = covariance * scatter, float(degrees)
    reach = {name: (math.exp(values.min()), math.exp(values.max())) for name, values in logs.items()}
    first = usable[0][0]
    return Trend(
        arm=first.arm,
        currency=first.currency,
        names=tuple(names),
        coefficients=coefficients,
        covariance=covariance,
        centre=np.array(centre),
        reach=reach,
        points=len(y),
        level=first.level,
        freedom=freedom,
    )
