"""Bytes that a rank sends, by strategy.

Ring algorithms send (W-1)/W of a buffer for a reduce-scatter or an all-gather, and twice that for an all-reduce. The ledger
sums these bytes and the planner predicts with them.
"""

from typing import NamedTuple

FLOAT32 = 4
BFLOAT16 = 2


class Traffic(NamedTuple):
    """Bytes that each rank sends."""

    per_micro_batch: int
    per_update: int  # once for each accumulation of gradients and the update or estimate made of it

    def total(self, micro_batches: int) -> int:
        return micro_batches * self.per_micro_batch + self.per_update


def _scattered(size: int, world_size: int) -> int:
    return (world_size - 1) * size // world_size


def all_reduce_bytes(size: int, world_size: int) -> int:
    return 2 * _scattered(size, world_size)


def ddp_traffic(parameters: int, world_size: int) -> Traffic:
    """One all-reduce of float32 gradients, in the last micro-batch."""
    return Traffic(0, all_reduce_bytes(FLOAT32 * parameters, world_size))


def fsdp_traffic(
    block_parameters: int,
    root_parameters: int,
    world_size: int,
    *,
    block_bytes: int,
    reshard_after_forward: bool,
) -> Traffic:
    """Weights gathered in each micro-batch, the blocks' again in the backward pass; float32 gradients reduced once.

    Args:
        root_parameters: embeddings and final norm, gathered in float32 once for forward and backward.
        block_bytes: bytes of a gathered weight of a block.
        reshard_after_forward: whether blocks free their gathered weights between forward and backward.
    """
    gathered = block_bytes * block_parameters * (2 if reshard_after_forward else 1) + FLOAT32 * root_parameters
    gradients = FLOAT32 * (block_parameters + root_parameters)
    return Traffic(_scattered(gathered, world_size), _scattered(gradients, world_size))


def zero_traffic(parameters: int, world_size: int, *, stage: int, weight_bytes: int) -> Traffic:
    """Stage 1 reduces gradients once and gathers weights after the update; stage 2 reduces gradients in each micro-batch;
    stage 3 also gathers weights in each forward and backward instead of after the update.

    Args:
        weight_bytes: bytes of a weight in the forward.
    """
    gradients = _scattered(FLOAT32 * parameters, world_size)
    weights = _scattered(weight_bytes * parameters, world_size)
    match stage:
        case 1:
            return Traffic(0, gradients + weights)
        case 2:
            return Traffic(gradients, weights)
        case _:
            return Traffic(gradients + 2 * weights, 0)
