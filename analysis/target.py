"""Time to target: a run's cost when its validation loss first reached a given value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.runs import CURRENCIES, Currency, Curve


@dataclass(frozen=True)
class TimeToTarget:
    """The cost of one run, in one currency, when it first reached the target loss.

    A run that does not reach the target is censored, never dropped: `reached` is False and `spent` is its total cost, a
    lower bound.
    """

    currency: Currency
    target: float  # nats
    reached: bool
    spent: float

    def __str__(self) -> str:
        return f"{self.spent:.6g}" if self.reached else "not reached"


def time_to_target(evaluations: Curve, target: float, currency: Currency) -> TimeToTarget:
    """Return the first crossing of `target` (nats) by the validation loss.

    Between two evaluations, the loss is interpolated linearly in the logarithm of the cost (linearly in the cost after
    the evaluation before the first step, whose cost is zero).

    Raises:
        ValueError: no evaluations, or an unknown currency.
    """
    if len(evaluations) == 0:
        raise ValueError("the run has no evaluation and thus no time to target: set eval.interval")
    spent = evaluations.axis(currency)
    crossing = first_crossing(spent, evaluations["val_loss"], target)
    if crossing is None:
        return TimeToTarget(currency, target, reached=False, spent=float(spent[-1]))
    return TimeToTarget(currency, target, reached=True, spent=crossing)


def times_to_target(evaluations: Curve, target: float) -> dict[Currency, TimeToTarget]:
    """Return `time_to_target` in every currency."""
    return {currency: time_to_target(evaluations, target, currency) for currency in CURRENCIES}


def first_crossing(spent: NDArray[np.float64], loss: NDArray[np.float64], target: float) -> float | None:
    """Return where a falling curve first is at or below `target`, or None.

    Args:
        spent: (n,) not negative, ascending.
        loss: (n,) nats; NaN (a diverged evaluation) is never at the target.
        target: nats.
    """
    below = np.flatnonzero(loss <= target)
    if len(below) == 0:
        return None
    index = int(below[0])
    if index == 0 or not np.isfinite(loss[index - 1]):
        return float(spent[index])
    before, after = float(spent[index - 1]), float(spent[index])
    share = float((loss[index - 1] - target) / (loss[index - 1] - loss[index]))
    if before <= 0:
        return before + share * (after - before)
    return before * (after / before) ** share
