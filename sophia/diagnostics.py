"""What the state of Sophia looks like, by kind of layer, and whether it is healthy.

Everything is computed on the device into one tensor of sums, which ranks that hold shards add up; only
`Diagnostics.read` waits for the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sophia.kernels import local
from sophia.optimizer import Sophia

# Bins of the histogram of h: half decades, the first and the last open-ended.
HISTOGRAM_DECADES = (-20, 4)
BINS_PER_DECADE = 2
HISTOGRAM_BINS = (HISTOGRAM_DECADES[1] - HISTOGRAM_DECADES[0]) * BINS_PER_DECADE

_SUMS = ("numel", "unclipped", "exp_avg_square", "hessian_square", "positive", "negative")

# Elements looked at together, which bounds the temporaries.
_CHUNK = 1 << 22


def histogram_edges() -> list[float]:
    """The HISTOGRAM_BINS + 1 edges of the histogram's bins, from 1e-20 to 1e4; what lies outside is in the end bins."""
    low, _ = HISTOGRAM_DECADES
    return [10.0 ** (low + index / BINS_PER_DECADE) for index in range(HISTOGRAM_BINS + 1)]


@dataclass(frozen=True)
class Diagnostics:
    """Sums over the coordinates of each kind of layer, on the device of the parameters.

    `sums[i]` belongs to `kinds[i]` and holds the number of coordinates, how many have |m| < γh, ‖m‖², ‖h‖², how
    many have h > 0, how many h < 0, then the histogram of log10 h over the positive ones.
    """

    kinds: tuple[str, ...]
    sums: Tensor  # (kinds, 6 + HISTOGRAM_BINS) float64
    hessian_age: int | None  # steps since the last estimate came in; None if none has, since construction or loading

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of ranks that hold shards of the state. Not for replicas, whose sums are the same."""
        dist.all_reduce(self.sums, group=group)

    def read(self) -> dict[str, dict[str, float | int | list[int] | None]]:
        """The record, by kind and for "all": waits for the device.

        unclipped_fraction, positive_fraction, negative_fraction: shares of the coordinates. momentum_norm,
        hessian_norm: Euclidean norms. hessian_age: in steps. hessian_histogram: counts, with the edges of
        `histogram_edges`.
        """
        rows = [*self.sums.tolist(), self.sums.sum(dim=0).tolist()]
        result: dict[str, dict[str, float | int | list[int] | None]] = {}
        for kind, row in zip([*self.kinds, "all"], rows, strict=True):
            numel, unclipped, exp_avg_square, hessian_square, positive, negative = row[: len(_SUMS)]
            result[kind] = {
                "numel": int(numel),
                "unclipped_fraction": unclipped / max(numel, 1),
                "positive_fraction": positive / max(numel, 1),
                "negative_fraction": negative / max(numel, 1),
                "momentum_norm": exp_avg_square**0.5,
                "hessian_norm": hessian_square**0.5,
                "hessian_age": self.hessian_age,
                "hessian_histogram": [int(count) for count in row[len(_SUMS) :]],
            }
        return result


@torch.no_grad()
def diagnostics(optimizer: Sophia, kinds: Mapping[str, Sequence[Tensor]] | None = None) -> Diagnostics:
    """Look at the local state of `optimizer`. Reads m and h a few times over: once per refresh, not once per step.

    Args:
        optimizer: after a step; parameters that have no state yet are left out.
        kinds: the parameters by kind of layer, such as {"embedding": […], "attention": […], "mlp": […], "norm": […]},
            each parameter once; by default one kind, "parameters".

    Raises:
        ValueError: a kind has a parameter that the optimizer does not, or a parameter is in two kinds or in none.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if kinds is None:
        kinds = {"parameters": [p for group in optimizer.param_groups for p in group["params"]]}
    seen = [id(p) for params in kinds.values() for p in params]
    if sorted(seen) != sorted(groups):
        raise ValueError(
            f"the kinds hold {len(seen)} parameters ({len(set(seen))} different), the optimizer {len(groups)}, "
            "expected each parameter of the optimizer in exactly one kind"
        )
    rows = [
        [_sums(optimizer, p, groups[id(p)]["gamma"]) for p in params if optimizer.state[p]] for params in kinds.values()
    ]
    device = next((row.device for kind in rows for row in kind), torch.device("cpu"))
    empty = torch.zeros(len(_SUMS) + HISTOGRAM_BINS, dtype=torch.float64, device=device)
    sums = torch.stack([torch.stack([row.to(device) for row in kind]).sum(dim=0) if kind else empty for kind in rows])
    return Diagnostics(tuple(kinds), sums, optimizer.hessian_age)


def _sums(optimizer: Sophia, p: Tensor, gamma: float | Tensor) -> Tensor:  # (6 + HISTOGRAM_BINS,) float64
    exp_avg, hessian = (local(optimizer.state[p][key]).reshape(-1) for key in ("exp_avg", "hessian"))
    total = torch.zeros(len(_SUMS) + HISTOGRAM_BINS, dtype=torch.float64, device=hessian.device)
    total[0] = hessian.numel()
    for m, h in zip(exp_avg.split(_CHUNK), hessian.split(_CHUNK), strict=True):
        positive = h > 0
        counts = (m.abs() < h * gamma).sum(), m.square().sum(), h.square().sum(), positive.sum(), (h < 0).sum()
        total[1 : len(_SUMS)] += torch.stack([count.double() for count in counts])
        # Bin 0 … HISTOGRAM_BINS - 1; what is not positive goes to one more, which is dropped.
        bins = ((h.log10() - HISTOGRAM_DECADES[0]) * BINS_PER_DECADE).floor().clamp(0, HISTOGRAM_BINS - 1)
        bins = torch.where(positive, bins, HISTOGRAM_BINS).float()
        total[len(_SUMS) :] += torch.histc(bins, HISTOGRAM_BINS + 1, -0.5, HISTOGRAM_BINS + 0.5)[:-1].double()
    return total


class ConsecutiveCosine:
    """The cosine between each curvature estimate and the one before: how much of an estimate is noise.

    Keeps one estimate in bfloat16, two bytes a parameter. For GNB give the squared gradient: the factor N drops out.

        cosine = ConsecutiveCosine()
        sums = cosine.observe([p.grad.square() for p in model.parameters()])     # before zero_grad, at each refresh
    """

    def __init__(self) -> None:
        self._previous: list[Tensor] | None = None

    @torch.no_grad()
    def observe(self, estimate: Sequence[Tensor]) -> Tensor | None:
        """Returns (parameters, 3) float64: for each parameter ĥ·ĥ', ‖ĥ‖² and ‖ĥ'‖², where ĥ' is the estimate
        before, and
        None at the first. Over shards or kinds add the rows up, then `cosine_of`."""
        previous, values = self._previous, [local(value) for value in estimate]
        self._previous = [value.bfloat16() for value in values]
        if previous is None:
            return None
        rows = []
        for new, old in zip(values, previous, strict=True):
            a, b = new.flatten().float(), old.flatten().float()
            rows.append(torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)]).double())
        return torch.stack(rows)


def cosine_of(sums: Tensor) -> Tensor:
    """(…) the cosine from (…, 3) sums of ĥ·ĥ', ‖ĥ‖² and ‖ĥ'‖²; 0 where one of them is zero."""
    dot, new, old = sums.unbind(-1)
    return dot / (new * old).sqrt().clamp_min(torch.finfo(sums.dtype).tiny)


class UnclippedAlarm:
    """Tells when Sophia has degenerated to sign momentum: no coordinate unclipped for longer than k steps.

    Args:
        hessian_interval: k.
    """

    def __init__(self, hessian_interval: int) -> None:
        if hessian_interval < 1:
            raise ValueError(f"hessian_interval = {hessian_interval}, expected an integer >= 1: the k of the optimizer")
        self.hessian_interval = hessian_interval
        self._zero_since: int | None = None
        self._told = False

    def state_dict(self) -> dict[str, int | bool | None]:
        """JSON values, for a run that is interrupted."""
        return {"zero_since": self._zero_since, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._zero_since, self._told = state["zero_since"], state["told"]

    def observe(self, step: int, unclipped_fraction: float) -> str | None:
        """The alarm, once for each time that the fraction falls to zero and stays there; otherwise None.

        Args:
            step: the training step that the fraction is of. Steps may be missing.
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
            f"step {step}: no coordinate has been unclipped for {steps} steps (hessian_interval "
            f"{self.hessian_interval}), so Sophia is running as sign momentum. Likely causes: update_hessian() is "
            "not called or every refresh is skipped; num_predictions counts sequences instead of tokens, or a mean "
            "is divided by the accumulation count twice; the estimator's gradient is zeroed or clipped before "
            "update_hessian(); gamma is too small."
        )
