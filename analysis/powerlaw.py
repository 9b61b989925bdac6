"""The final loss of fully decayed runs as a function of their length.

To first order the fitted value is linear in the observed losses; the weights propagate seed noise into an interval
(`analysis.comparison`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

Array = NDArray[np.float64]

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

    @property
    def residuals(self) -> Array:
        """(K,) observed minus fitted losses, nats."""
        return np.asarray(self.losses - self.value(self.log_tokens))

    def value(self, log_tokens: ArrayLike) -> Array:
        return np.asarray(self.floor + self.scale * self._decay(log_tokens))

    def inverse(self, loss: float) -> float:
        """Return the log tokens at which the curve reaches a loss; infinite at or below the floor."""
        above = (loss - self.floor) / self.scale if self.scale else 0.0
        return float(self.log_tokens.mean()) - math.log(above) / self.exponent if above > 0 else math.inf

    def weights(self, log_tokens: ArrayLike) -> Array:
        """Return (…, K) the derivative of the value at (…) log tokens by the K observed losses."""
        # Implicit function theorem at the least-squares optimum, Gauss-Newton form: g (JᵀJ)⁻¹ Jᵀ = g J⁺.
        return np.asarray(self._gradient(log_tokens) @ np.linalg.pinv(self._gradient(self.log_tokens)))

    def _distance(self, log_tokens: ArrayLike) -> Array:
        return np.asarray(log_tokens, dtype=np.float64) - self.log_tokens.mean()

    def _decay(self, log_tokens: ArrayLike) -> Array:
        return np.asarray(np.exp(-self.exponent * self._distance(log_tokens)))

    def _gradient(self, log_tokens: ArrayLike) -> Array:
        """Return (…, P) the derivative of the value by the parameters that are not at a bound."""
        decay = self._decay(log_tokens)
        columns = {
            "scale": decay,
            "floor": np.ones_like(decay),
            "exponent": -self.scale * self._distance(log_tokens) * decay,
        }
        return np.stack([column for name, column in columns.items() if name not in self.at_bound], axis=-1)


def fit_power_law(log_tokens: Array, losses: Array) -> PowerLaw:
    """Fit (K >= 3,) losses in nats by least squares; floor and scale have an exact solution at each exponent."""
    if len(log_tokens) < 3:
        raise ValueError(f"{len(log_tokens)} points do not determine three parameters: give at least three")
    distance = log_tokens - log_tokens.mean()

    def solve(log_exponent: ArrayLike) -> tuple[Array, Array, Array]:
        """Return (...) the squared error, the floor and the scale at (...) exponents."""
        decay = np.exp(-np.exp(np.asarray(log_exponent))[..., None] * distance)
        centred = decay - decay.mean(axis=-1, keepdims=True)
        scale = centred @ (losses - losses.mean()) / np.sum(centred**2, axis=-1)
        floor = losses.mean() - scale * decay.mean(axis=-1)
        scale = np.where(floor < 0, decay @ losses / np.sum(decay**2, axis=-1), scale)
        floor = np.maximum(floor, 0.0)
        return np.sum((losses - floor[..., None] - scale[..., None] * decay) ** 2, axis=-1), floor, scale

    grid = np.linspace(math.log(_EXPONENTS[0]), math.log(_EXPONENTS[1]), 64)
    best = int(np.argmin(solve(grid)[0]))
    bracket = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    found = optimize.minimize_scalar(lambda value: float(solve(value)[0]), bounds=bracket, method="bounded")
    log_exponent = float(found.x)
    floor, scale = map(float, solve(log_exponent)[1:])
    at_bound = ["floor"] if floor == 0.0 else []
    if not grid[0] + 1e-3 < log_exponent < grid[-1] - 1e-3:
        at_bound.append("exponent")
    return PowerLaw(log_tokens, losses, floor, scale, math.exp(log_exponent), tuple(at_bound))
