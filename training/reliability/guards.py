"""Guards on a run's numbers: loss spikes, and ranks whose weights differ."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.strategies.base import Strategy
from training.strategies.state import state_tensors

# The running mean averages about this many steps; no spike is reported before it has seen as many.
HORIZON = 50
# Lower bound of the deviation, as a share of the mean: at the end of a run the loss hardly moves.
LEAST_DEVIATION = 0.005


@dataclass
class LossSpikes:
    """Detects steps whose loss jumps above its running mean, once per jump.

    Mean and variance are exponential averages. Losses enter them clipped at the threshold, so that a loss that stays high
    becomes the new normal instead of an endless spike. All fields are JSON values, saved in checkpoints.

    Args:
        threshold: in standard deviations.
    """

    threshold: float
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    high: bool = False

    def observe(self, loss: float) -> dict[str, float] | None:
        """Return the event of a spike that starts with this loss (expected loss, distance in deviations), else None."""
        if not math.isfinite(loss):
            return None
        if self.seen == 0:
            self.mean = loss
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION * self.mean, 1e-6)
        distance = (loss - self.mean) / deviation
        known, mean = self.seen >= HORIZON, self.mean
        begins = known and distance > self.threshold and not self.high
        self.high = known and distance > (self.threshold / 2 if self.high else self.threshold)
        counted = min(loss, self.mean + self.threshold * deviation) if known else loss
        self.seen += 1
        share = max(1 / self.seen, 2 / (HORIZON + 1))
        difference = counted - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)
        return {"loss": loss, "expected": mean, "deviations": distance} if begins else None

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.variance, self.seen, self.high = (state[k] for k in ("mean", "variance", "seen", "high"))


class RanksDiffer(RuntimeError):
    """Ranks hold different values of a replicated tensor. The message names the tensors and ranks."""


def replicated_tensors(strategy: Strategy) -> Iterator[tuple[str, Tensor]]:
    """Yield what every rank holds in full, by name: weights, and optimizer state unless it is sharded."""
    parameters = strategy.parameters()
    if not strategy.shards_optimizer_state:
        yield from state_tensors(parameters, strategy.optimizers)
        return
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor) and parameter.numel() > 0:  # ZeRO 3 leaves sharded parameters empty
            yield f"model.{name}", parameter.detach()


def compare_ranks(strategy: Strategy) -> None:
    """Compare hashes of the replicated tensors across ranks: one read of the tensors, one small exchange.

    Raises:
        RanksDiffer: on every rank, naming the tensors and the ranks that differ from the majority.
    """
    if strategy.distributed.world_size == 1:
        return
    tensors = dict(replicated_tensors(strategy))
    if not tensors:
        return
    # Some optimizers count on the CPU.
    hashed = (torch.hash_tensor(tensor).view(torch.int64) for tensor in tensors.values())
    hashes = torch.stack([one.to(strategy.device, non_blocking=True) for one in hashed]).tolist()
    by_rank = strategy.distributed.gather_objects(hashes)
    found = []
    for place, name in enumerate(tensors):
        values = [of_rank[place] for of_rank in by_rank]
        majority = max(values, key=values.count)
        if odd := [str(rank) for rank, value in enumerate(values) if value != majority]:
            found.append(f"{name} on rank {', '.join(odd)}")
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise RanksDiffer(f"the ranks no longer hold the same values: {'; '.join(found[:4])}{more}")
