"""Weights and optimizer state by parameter name, for strategies whose optimizers step the model's own parameters."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from training.strategies.base import Piece, PieceReader


def state_tensors(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """("model.<name>", weight) and ("optimizer.<name>.<state>", state), in one order on all ranks."""
    for name, parameter in parameters.items():
        yield f"model.{name}", parameter.detach()
        for optimizer in optimizers:
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    yield f"optimizer.{name}.{key}", value.detach()


def assigned_pieces(tensors: Iterator[tuple[str, Tensor]], rank: int, world_size: int) -> Iterator[Piece]:
    """Whole tensors that every rank holds, dealt out so that the ranks write about the same number of bytes."""
    written = [0] * world_size
    for name, tensor in tensors:
        writer = min(range(world_size), key=written.__getitem__)
        written[writer] += tensor.numel() * tensor.element_size()
        if writer == rank:
            yield Piece(name, tuple(tensor.shape), 0, tensor.reshape(-1))


def sharded_pieces(tensors: Iterator[tuple[str, Tensor]], *, is_main: bool) -> Iterator[Piece]:
    """This rank's shards; what is no DTensor (step counts) every rank holds, and rank 0 writes."""
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            start, stop = shard_range(tensor)
            if start < stop:
                yield Piece(name, tuple(tensor.shape), start, tensor.to_local().reshape(-1))
        elif is_main:
            yield Piece(name, tuple(tensor.shape), 0, tensor.reshape(-1))


@torch.no_grad()
def load_state(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], reader: PieceReader) -> None:
    """Copy a checkpoint into parameters and optimizer state; sharded parameters read their own range only."""
    for name, parameter in parameters.items():
        _read_into(parameter, f"model.{name}", reader)
    names = {id(parameter): name for name, parameter in parameters.items()}
    saved = sorted(reader.names())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"optimizer.{names[id(parameter)]}."
                for full_name in saved:
                    if full_name.startswith(prefix):
                        key = full_name.removeprefix(prefix)
                        optimizer.state[parameter][key] = _new_state(parameter, full_name, reader)
        # torch places `step` where its kernels want it (on the device for fused ones) when a state dict is loaded.
        if type(optimizer).__module__.startswith("torch."):
            optimizer.load_state_dict(optimizer.state_dict())


def _new_state(parameter: Tensor, name: str, reader: PieceReader) -> Tensor:
    if reader.shape(name) != tuple(parameter.shape):
        return reader.read(name, 0, 1).reshape(reader.shape(name))  # the step count
    state = torch.zeros_like(parameter, dtype=reader.dtype(name))
    _read_into(state, name, reader)
    return state


def _read_into(tensor: Tensor, name: str, reader: PieceReader) -> None:
    if reader.shape(name) != tuple(tensor.shape):
        raise ValueError(f"{name} has shape {reader.shape(name)} in the checkpoint, {tuple(tensor.shape)} here")
    if isinstance(tensor, DTensor):
        start, stop = shard_range(tensor)
        local = tensor.to_local()
        local.copy_(reader.read(name, start, stop).reshape(local.shape))
    else:
        tensor.copy_(reader.read(name, 0, tensor.numel()).reshape(tensor.shape))


def shard_range(tensor: DTensor) -> tuple[int, int]:
    """The elements [start, stop) of the full row-major tensor that this rank's dim-0 shard holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.numel() // tensor.shape[0] if tensor.dim() else 1
    start = offset[0] * row if tensor.dim() else 0
    count = int(torch.Size(local_shape).numel())
    return start, start + count
