"""Time to target: what a run had spent when its validation loss first reached a given value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.runs import CURRENCIES, Currency, Curve


@dataclass(frozen=True)
class TimeToTarget:
    """What one run had spent, in one currency, when it first reached the target loss.

    A run that does not reach the target is censored: `reached` is False and `spent` is all that it spent, a lower
    bound. It is never dropped.
    """

    currency: Currency
    target: float  # nats
    reached: bool
    spent: float

    def __str__(self) -> str:
        return f"{self.spent:.6g}" if self.reached else "not reached"


def time_to_target(evaluations: Curve, target: float, currency: Currency) -> TimeToTarget:
    """First crossing of `target` (nats) by the validation loss.

    Between the evaluations on either side the loss is taken as linear in the logarithm of what was spent (linear in
    what was spent where the earlier one is the evaluation before the first step, at zero).

    Raises:
        ValueError: no evaluations, or an unknown currency.
    """
    if len(evaluations) == 0:
        raise ValueError("the run has no evaluation, so no time to target: set eval.interval")
    spent = evaluations.axis(currency)
    crossing = first_crossing(spent, evaluations["val_loss"], target)
    if crossing is None:
        return TimeToTarget(currency, target, reached=False, spent=float(spent[-1]))
    return TimeToTarget(currency, target, reached=True, spent=crossing)


def times_to_target(evaluations: Curve, target: float) -> dict[Currency, TimeToTarget]:
    """`time_to_target` in every currency."""
    return {currency: time_to_target(evaluations, target, currency) for currency in CURRENCIES}


def first_crossing(spent: NDArray[np.float64], loss: NDArray[np.float64], target: float) -> float | None:
    """Where a falling curve first is at or below `target`, or None.

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
