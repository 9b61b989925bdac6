"""What a run records about its curvature: norms, the share of positive entries, a log-scale histogram, by kind of parameter.

All numbers are sums over elements, so that shards add up: one reduction, one wait, at refreshes only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models import parameter_kind
from training.strategies.base import Strategy

KINDS = ("embedding", "attention", "mlp", "norm")
# Decades of h: below 1e-12 and above 1e4 fall into the outermost bins; zero and negative entries into none.
DECADES = tuple(range(-12, 5))


@torch.no_grad()
def describe_curvature(strategy: Strategy) -> dict[str, Any]:
    """Norms of h and m, share of positive entries and decade histogram of h, in all and by kind of parameter."""
    sharded = False
    sums = torch.zeros(len(KINDS), 4 + len(DECADES) + 1, dtype=torch.float64, device=strategy.device)
    for name, hessian, momentum in strategy.curvature_state():
        if isinstance(hessian, DTensor):
            sharded = True
            hessian, momentum = hessian.to_local(), momentum.to_local()  # type: ignore[attr-defined]
        sums[KINDS.index(parameter_kind(name))] += _sums(hessian, momentum)
    if sharded or strategy.shards_optimizer_state:
        strategy.distributed.all_reduce(sums)
    rows = sums.tolist()
    described = _described([sum(column) for column in zip(*rows, strict=True)])
    described["decades"] = list(DECADES)
    described["by_kind"] = {kind: _described(row) for kind, row in zip(KINDS, rows, strict=True) if row[0]}
    return described


def _sums(hessian: Tensor, momentum: Tensor) -> Tensor:
    """(4 + bins,) count, positive entries, Σh², Σm², and the number of positive entries in each decade."""
    positive = hessian > 0
    exponents = torch.log10(hessian.where(positive, 1.0)).floor().clamp(DECADES[0] - 1, DECADES[-1]) - (DECADES[0] - 1)
    histogram = torch.zeros(len(DECADES) + 1, dtype=torch.float64, device=hessian.device)
    histogram.scatter_add_(0, exponents.long().flatten(), positive.double().flatten())
    count = torch.tensor(float(hessian.numel()), dtype=torch.float64, device=hessian.device)
    totals = torch.stack(
        (count, positive.sum().double(), hessian.double().square().sum(), momentum.double().square().sum())
    )
    return torch.cat((totals, histogram))


def _described(row: list[float]) -> dict[str, Any]:
    count, positive, hessian_square, momentum_square, *histogram = row
    return {
        "hessian_norm": hessian_square**0.5,
        "momentum_norm": momentum_square**0.5,
        "positive_fraction": positive / count if count else 0.0,
        "histogram": [int(number) for number in histogram],
    }
