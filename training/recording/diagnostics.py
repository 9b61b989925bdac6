"""Curvature statistics in a run's record: norms, share of positive entries and log-scale histogram, by kind of parameter.

All of them are sums over elements and additive over shards: one reduction per refresh.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sophia.diagnostics import DECADES, curvature_summary, curvature_sums
from training.strategies.base import Strategy


def curvature_sums_by_kind(strategy: Strategy) -> Tensor:
    """(kinds, sums) float64 on the device: `curvature_sums` of each kind of parameter, over all ranks."""
    sharded = strategy.shards_optimizer_state
    model = strategy.model
    sums = torch.zeros(len(model.kinds), 4 + len(DECADES) + 1, dtype=torch.float64, device=strategy.device)
    for name, hessian, momentum in strategy.curvature_state():
        sharded |= isinstance(hessian, DTensor)
        sums[model.kinds.index(model.parameter_kind(name))] += curvature_sums(hessian, momentum)
    if sharded:
        strategy.distributed.all_reduce(sums)
    return sums


def describe_curvature(
    sums: Tensor,  # (kinds, sums) float64 on the CPU
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Return norms of h and m, share of positive entries and decade histogram of h, in total and by kind of parameter.

    Empty if the optimizer keeps no `hessian` and `exp_avg`.
    """
    if not sums[:, 0].any():
        return {}
    by_kind = {kind: curvature_summary(row) for kind, row in zip(kinds, sums, strict=True) if row[0]}
    return {**curvature_summary(sums.sum(dim=0)), "decades": list(DECADES), "by_kind": by_kind}
