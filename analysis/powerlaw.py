"""The final loss of fully decayed runs as a function of their length: a fitted power law, or interpolation.

To first order both are linear in the observed losses. Their weights in the value at a point propagate seed noise into an
interval (`analysis.speedup`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

Array = NDArray[np.float64]

FIT_MINIMUM = 4  # horizons; three parameters fit any three points exactly
_EXPONENTS = (1e-2, 5.0)


@dataclass(frozen=True)
class PowerLaw:
    """L(D) = floor + scale · (D / D0)^(-exponent), least squares on the losses; D0 is the geometric mean of D.

    The floor is not negative and the exponent is between 0.01 and 5; `at_bound` names a parameter at such a bound.
    """

    log_tokens: Array  # (K,)
    losses: Array  # (K,) nats
    floor: float
    scale: float
    exponent: float
    at_bound: tuple[str, ...] = ()
    method: str = "power law"

    @property
    def residuals(self) -> Array:
        """(K,) observed minus fitted losses, nats."""
        residuals: Array = self.losses - self.value(self.log_tokens)
        return residuals

    def value(self, log_tokens: ArrayLike) -> Array:
        return np.asarray(self.floor + self.scale * self._decay(log_tokens))

    def slope(self, log_tokens: ArrayLike) -> Array:
        return np.asarray(-self.exponent * self.scale * self._decay(log_tokens))

    def weights(self, log_tokens: ArrayLike) -> Array:
        # Implicit function theorem at the least-squares optimum, Gauss-Newton form: g (JᵀJ)⁻¹ Jᵀ = g J⁺.
        return self._gradient(log_tokens) @ self._pseudo_inverse

    @cached_property
    def _pseudo_inverse(self) -> Array:
        """(P, K) J⁺ of the runs."""
        return np.asarray(np.linalg.pinv(self._gradient(self.log_tokens)))

    def _decay(self, log_tokens: ArrayLike) -> Array:
        distance = np.asarray(log_tokens, dtype=np.float64) - self.log_tokens.mean()
        return np.asarray(np.exp(-self.exponent * distance))

    def _gradient(self, log_tokens: ArrayLike) -> Array:
        """Return (…, P) the derivative of the value by the parameters that are not at a bound."""
        decay = self._decay(log_tokens)
        distance = np.asarray(log_tokens, dtype=np.float64) - self.log_tokens.mean()
        columns = [decay]
        if "floor" not in self.at_bound:
            columns.append(np.ones_like(decay))
        if "exponent" not in self.at_bound:
            columns.append(-self.scale * distance * decay)
        return np.stack(columns, axis=-1)


@dataclass(frozen=True)
class Interpolation:
    """Straight lines between the runs on the logarithmic axis.

    The true curve is convex, so the line is above it and favours the other arms between two horizons. At the horizons
    it is exact.
    """

    log_tokens: Array  # (K,)
    losses: Array  # (K,) nats
    method: str = "interpolation"

    def value(self, log_tokens: ArrayLike) -> Array:
        return self.weights(log_tokens) @ self.losses

    def slope(self, log_tokens: ArrayLike) -> Array:
        if len(self.losses) < 2:
            return np.full(np.shape(log_tokens), np.nan)
        slopes = np.diff(self.losses) / np.diff(self.log_tokens)
        return np.asarray(slopes[self._segment(log_tokens)])

    def weights(self, log_tokens: ArrayLike) -> Array:
        x = np.asarray(log_tokens, dtype=np.float64)
        if len(self.losses) < 2:
            return np.ones((*x.shape, 1))
        left = self._segment(x)
        start, end = self.log_tokens[left], self.log_tokens[left + 1]
        share = ((x - start) / (end - start))[..., None]
        unit = np.eye(len(self.losses))
        return np.asarray((1 - share) * unit[left] + share * unit[left + 1])

    def _segment(self, log_tokens: ArrayLike) -> NDArray[np.intp]:
        segment = np.searchsorted(self.log_tokens, np.asarray(log_tokens), side="right") - 1
        return np.asarray(np.clip(segment, 0, len(self.losses) - 2))


# Both have, at (…) logarithms of training tokens: value (…) in nats, slope (…) in nats per e-fold, and weights (…,
# K), the derivative of the value by the K observed losses.
LossCurve = PowerLaw | Interpolation


def fit_loss_curve(tokens: ArrayLike, losses: ArrayLike) -> LossCurve:
    """Fit a power law to at least four lengths, or interpolate between fewer (Wen et al. 2025).

    Args:
        tokens: (K,) training tokens of each horizon, ascending, distinct.
        losses: (K,) mean final validation losses, nats.
    """
    x, y = np.log(np.asarray(tokens, dtype=np.float64)), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0 or np.any(np.diff(x) <= 0):
        raise ValueError(f"expected ascending token counts with one loss each, got {tokens!r} and {losses!r}")
    if len(x) < FIT_MINIMUM:
        return Interpolation(x, y)
    return fit_power_law(x, y)


def fit_power_law(log_tokens: Array, losses: Array) -> PowerLaw:
    """Fit three parameters by least squares; floor and scale have an exact solution at each exponent.

    Args:
        log_tokens: (K,) at least three.
        losses: (K,) nats.
    """
    if len(log_tokens) < 3:
        raise ValueError(f"{len(log_tokens)} points do not determine three parameters: give at least three")
    distance = log_tokens - log_tokens.mean()

    def solve(log_exponent: float) -> tuple[float, float, float]:
        decay = np.exp(-math.exp(log_exponent) * distance)
        centred = decay - decay.mean()
        scale = float(centred @ (losses - losses.mean()) / (centred @ centred))
        floor = float(losses.mean() - scale * decay.mean())
        if floor < 0:
            floor, scale = 0.0, float(decay @ losses / (decay @ decay))
        return float(np.sum((losses - floor - scale * decay) ** 2)), floor, scale

    grid = np.linspace(math.log(_EXPONENTS[0]), math.log(_EXPONENTS[1]), 64)
    coarse = [solve(value)[0] for value in grid]
    best = int(np.argmin(coarse))
    bracket = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    found = optimize.minimize_scalar(lambda value: solve(value)[0], bounds=bracket, method="bounded")
    log_exponent = float(found.x)
    _, floor, scale = solve(log_exponent)
    at_bound = tuple(
        name
        for name, reached in (
            ("floor", floor == 0.0),
            ("exponent", not grid[0] + 1e-3 < log_exponent < grid[-1] - 1e-3),
        )
        if reached
    )
    return PowerLaw(log_tokens, losses, floor, scale, math.exp(log_exponent), at_bound)
