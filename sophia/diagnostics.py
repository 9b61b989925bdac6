"""Health checks for Sophia's state: statistics of h and m, and an alarm when the optimizer degenerates to momentum-sign.

    sums = sum(curvature_sums(state["hessian"], state["exp_avg"]) for state in optimizer.state.values())
    curvature_summary(sums)["positive_fraction"]

The sums are additive over shards: reduce them over the ranks that hold the shards.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sophia.kernels import local

# Decades of h. Entries below 1e-12 or above 1e4 go to the outermost bins; zero and negative entries are not counted.
DECADES = tuple(range(-12, 5))

# Entries compared with all bins at a time.
_PIECE = 1 << 22


@torch.no_grad()
def curvature_sums(
    hessian: Tensor,  # (*) h; for a DTensor, this rank's shard is used
    exp_avg: Tensor,  # (*) m, likewise
) -> Tensor:  # (4 + bins,) float64 on the device of h
    """Return the number of entries, the number of positive entries of h, Σh², Σm², and positive entries per decade."""
    hessian, exp_avg = local(hessian), local(exp_avg)
    positive = hessian > 0
    decades = torch.log10(hessian).floor().clamp(DECADES[0] - 1, DECADES[-1]) - (DECADES[0] - 1)  # NaN if negative
    bins = len(DECADES) + 1
    histogram = _counts(decades.where(positive, bins).flatten(), bins + 1)[:-1]
    count = torch.full((), hessian.numel(), dtype=torch.float64, device=hessian.device)
    # In float32 the square of 1e-23 underflows to zero.
    hessian_norm, momentum_norm = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (hessian, exp_avg))
    totals = torch.stack((count, histogram.sum().double(), hessian_norm.square(), momentum_norm.square()))
    return torch.cat((totals, histogram.double()))


def _counts(
    numbers: Tensor,  # (n,) whole numbers in [0, bins)
    bins: int,
) -> Tensor:  # (bins,) int64: how often each occurs
    if numbers.device.type == "cpu":
        return torch.bincount(numbers.int(), minlength=bins)
    return _counts_by_comparison(numbers, bins)


def _counts_by_comparison(numbers: Tensor, bins: int) -> Tensor:
    """`_counts` for GPUs: bincount waits for the device, and in scatter_add_ all threads add to the same few addresses."""
    each = torch.arange(bins, dtype=numbers.dtype, device=numbers.device)[:, None]
    return torch.stack([(piece == each).sum(dim=1) for piece in torch.split(numbers, _PIECE)]).sum(dim=0)


def curvature_summary(sums: Tensor) -> dict[str, Any]:
    """Return the norms of h and m, the share of positive entries and the decade histogram of h. Synchronizes the device.

    Bin 0 of the histogram counts entries below 10^DECADES[0]; bin i + 1 starts at 10^DECADES[i].
    """
    count, positive, hessian_square, momentum_square, *histogram = sums.tolist()
    return {
        "hessian_norm": hessian_square**0.5,
        "momentum_norm": momentum_square**0.5,
        "positive_fraction": positive / count if count else 0.0,
        "histogram": [int(number) for number in histogram],
    }


class UnclippedAlarm:
    """Detects that Sophia has degenerated to momentum-sign: no coordinate was unclipped for more than k steps.

    Args:
        hessian_interval: k.
    """

    def __init__(self, hessian_interval: int) -> None:
        if hessian_interval is None or hessian_interval < 1:
            raise ValueError(
                f"hessian_interval = {hessian_interval}, expected an integer >= 1: the k of the optimizer; without curvature, "
                "no coordinate is ever unclipped"
            )
        self.hessian_interval = hessian_interval
        self._zero_since: int | None = None
        self._told = False

    def state_dict(self) -> dict[str, int | bool | None]:
        """Return the state as JSON values, to be saved with a checkpoint."""
        return {"zero_since": self._zero_since, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._zero_since, self._told = state["zero_since"], state["told"]

    def observe(self, step: int, unclipped_fraction: float) -> str | None:
        """Return the alarm once per period in which the fraction stays at zero, otherwise None.

        Args:
            step: the training step of this fraction. Steps may be skipped.
            unclipped_fraction: the share of coordinates with |m| < γh, over all ranks.
        """
        if unclipped_fraction > 0:
            self._zero_since, self._told = None, False
            return None
        if self._zero_since is None:
            self._zero_since = step
        steps = step - self._zero_since + 1
        if self._told or steps <= self.hessian_interval:
            return None
        self._told = True
        return (
            f"step {step}: every coordinate has been clipped for {steps} steps (hessian_interval "
            f"{self.hessian_interval}), so Sophia is running as momentum-sign. Likely causes: update_hessian() is "
            "not called or every refresh is skipped; num_predictions counts sequences instead of tokens, or a mean "
            "is divided by the accumulation count twice; the estimator's gradient is zeroed or clipped before "
            "update_hessian(); gamma is too small, or eps is above γh."
        )
