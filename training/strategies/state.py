"""Weights and optimizer state by parameter name, for strategies whose optimizers step the model's own parameters.

State is defined as in torch's `state_dict`: the entries of `optimizer.state` for a parameter, and what the optimizer itself
changes in its `param_groups`. Tensors, numbers, and lists, tuples and dictionaries of them are saved; an optimizer that keeps
anything else is refused. A container is saved as its members, `<key>/0`, `<key>/1`, `<key>/=<name>`, and a number that tells
its kind and length, `<key>/list`. Rules that mix coordinates depend on the memory layout of their matrices in the last bit:
the strides of a transposed tensor are saved too.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sophia.elementwise import COUNTS
from training.config import ConfigurationError
from training.strategies.base import SAVED_DTYPES, Number, NumberPiece, Piece, PieceReader, Strategy

# Keys of a group that the run sets, not the optimizer.
_SET_BY_THE_RUN = ("params", "names", "initial", "lr", "initial_lr")
# One small parameter for each kind of group that optimizers form.
_STAND_INS = {
    "token_embedding.weight": (4, 4),
    "blocks.0.attention.qkv.weight": (4, 4),
    "blocks.0.mlp.up.weight": (4, 4),
    "blocks.0.mlp_norm.weight": (4,),
}


def saved_state(
    parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, Tensor | Number]]:
    """Yield ("model.<name>", weight), ("optimizer.<name>.<key>", state) and ("group.<name>.<key>", number), in the same
    order on all ranks.

    Raises:
        ConfigurationError: an entry of the state cannot be saved.
    """
    for name, parameter in parameters.items():
        yield f"model.{name}", parameter.detach()
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            for key in state:
                check_savable(optimizer, key, state[key], parameter, sharded=isinstance(parameter, DTensor))
            for key, value in sorted(state.items()):
                for path, leaf in _leaves(_escaped(key), value):
                    yield f"optimizer.{name}.{path}", leaf
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            changed = changed_numbers(group)
            for name in group.get("names", ()):
                for key, number in changed.items():
                    yield f"group.{name}.{key}", number


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Tensor | Number]]:
    """Yield the tensors and numbers of an entry of a state by path, and what is needed to restore containers and strides."""
    if isinstance(value, Tensor):
        yield path, value.detach()
        whole = not isinstance(value, DTensor) and not value.is_contiguous()
        if whole and value.stride() == torch.empty_like(value, device="meta").stride():
            yield from ((f"{path}/stride/{axis}", stride) for axis, stride in enumerate(value.stride()))
    elif isinstance(value, dict):
        yield f"{path}/dict", len(value)
        for name, member in value.items():
            yield from _leaves(f"{path}/={_escaped(name)}", member)
    elif isinstance(value, (list, tuple)):
        yield f"{path}/{type(value).__name__}", len(value)
        for index, member in enumerate(value):
            yield from _leaves(f"{path}/{index}", member)
    else:
        yield path, value


def _restored(leaves: Mapping[str, Tensor | Number]) -> dict[str, Any]:
    """Return a state from the leaves of its entries, in their order."""
    inside: dict[str, dict[str, Tensor | Number]] = {}
    for path, leaf in leaves.items():
        name, _, rest = path.partition("/")
        inside.setdefault(name, {})[rest] = leaf
    return {_unescaped(name): _value(parts) for name, parts in inside.items()}


def _value(parts: Mapping[str, Any]) -> Any:
    """Return one value from its own leaves; "" is the path of the value itself."""
    if "" in parts:
        value = parts[""]
        if len(parts) == 1:
            return value
        strides = [parts[f"stride/{axis}"] for axis in range(value.dim())]
        return value.new_empty_strided(value.shape, strides).copy_(value)
    members = _restored({path: leaf for path, leaf in parts.items() if path not in ("list", "tuple", "dict")})
    if "dict" in parts:
        return {name.removeprefix("="): member for name, member in members.items()}
    listed = [members[str(index)] for index in range(len(members))]
    return listed if "list" in parts else tuple(listed)


def _escaped(key: str) -> str:
    return key.replace("%", "%25").replace("/", "%2F")


def _unescaped(key: str) -> str:
    return key.replace("%2F", "/").replace("%25", "%")


def state_tensors(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `saved_state`."""
    for name, value in saved_state(parameters, optimizers):
        if isinstance(value, Tensor):
            yield name, value


def numbers_of(group: Mapping[str, Any]) -> dict[str, Number]:
    """Return the numbers in a parameter group that the run does not set."""
    return {key: value for key, value in group.items() if key not in _SET_BY_THE_RUN and isinstance(value, Number)}


def changed_numbers(group: Mapping[str, Any]) -> dict[str, Number]:
    """Return the numbers that the optimizer itself has changed since it was built, such as a step count."""
    initial = group.get("initial")
    if initial is None:
        return {}
    return {key: value for key, value in numbers_of(group).items() if key not in initial or value != initial[key]}


def check_savable(optimizer: Optimizer, key: Any, value: Any, parameter: Tensor, *, sharded: bool) -> None:
    """Raise ConfigurationError if a checkpoint cannot store an entry of a parameter's state.

    Args:
        sharded: the parameter is one rank's part, so that a tensor of another shape has no known place in the whole.
    """
    where = f"{type(optimizer).__qualname__}: state[{key!r}]"
    remedy = "keep state in tensors, int, float, bool or None"
    if not isinstance(key, str):
        raise ConfigurationError(f"{where} cannot be saved: its key is of type {type(key).__name__}; use a string")
    if type(value) in (list, tuple, dict):
        if sharded:
            raise ConfigurationError(
                f"{where} cannot be saved under this strategy: it is of type {type(value).__name__}; choose strategy=ddp"
            )
        for name, member in value.items() if isinstance(value, dict) else ((key, member) for member in value):
            check_savable(optimizer, name, member, parameter, sharded=sharded)
        return
    if not isinstance(value, Tensor):
        if not isinstance(value, Number):
            raise ConfigurationError(f"{where} cannot be saved: it is of type {type(value).__name__}; {remedy}")
        return
    if type(value) not in (Tensor, nn.Parameter, DTensor) or value.layout != torch.strided:
        raise ConfigurationError(f"{where} cannot be saved: it is a {type(value).__name__} of {value.layout}; {remedy}")
    if value.dtype not in SAVED_DTYPES:
        raise ConfigurationError(
            f"{where} cannot be saved: it is a tensor of {value.dtype}; choose float32 or bfloat16"
        )
    whole = value.shape == parameter.shape and isinstance(value, DTensor) == isinstance(parameter, DTensor)
    if sharded and not whole and value.numel() != 1:
        raise ConfigurationError(
            f"{where} cannot be saved under this strategy: it has shape {tuple(value.shape)}, but its sharded parameter "
            f"{tuple(parameter.shape)}; choose strategy=ddp"
        )


def refuse_unsavable_state(
    build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]], strategy: Strategy
) -> None:
    """Step the run's optimizers once on stand-ins for the parameters, and check the state they keep.

    In a run, the first step may come after minutes of preparation and the first save after hours.

    Raises:
        ConfigurationError: a checkpoint cannot store the state; the message names class and key.
    """
    stand_ins = {name: nn.Parameter(torch.ones(shape, device=strategy.device)) for name, shape in _STAND_INS.items()}
    for parameter in stand_ins.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizers: list[Optimizer] = []
    before: list[list[dict[str, Any]]] = []
    # What fails here may work on the model's own parameters. The state is then checked at the first save.
    with warnings.catch_warnings(action="ignore"):
        try:
            optimizers = build_optimizers(stand_ins)
            before = [[_values(group) for group in optimizer.param_groups] for optimizer in optimizers]
            for optimizer in optimizers:
                optimizer.step()
        except Exception:
            pass
    for optimizer, groups_before in zip(optimizers, before, strict=True):
        for owner, state in optimizer.state.items():
            if not isinstance(owner, Tensor):
                raise ConfigurationError(
                    f"{type(optimizer).__qualname__}: state[{owner!r}] cannot be saved: it belongs to no parameter; keep "
                    "it in the parameters' states or in param_groups"
                )
            for key, value in state.items():
                check_savable(optimizer, key, value, owner, sharded=strategy.shards_optimizer_state)
        for group, values in zip(optimizer.param_groups, groups_before, strict=True):
            _check_group(optimizer, group, values, strategy)


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values, with copies of tensors and lists."""
    return {
        key: value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for key, value in group.items()
        if key not in _SET_BY_THE_RUN
    }


def _check_group(optimizer: Optimizer, group: Mapping[str, Any], before: Mapping[str, Any], strategy: Strategy) -> None:
    """Raise ConfigurationError if a step has changed a group in a way that a checkpoint cannot store."""
    for key, value in _values(group).items():
        if key in before and _equal(value, before[key]):
            continue
        where = f"{type(optimizer).__qualname__}: param_groups[…][{key!r}] changes in a step and"
        if not isinstance(value, Number):
            raise ConfigurationError(f"{where} is of type {type(value).__name__}; keep int, float, bool or None there")
        if strategy.steps_in_parts:
            raise ConfigurationError(
                f"{where} would change several times per step under strategy=deepspeed; choose ddp or fsdp"
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def assigned_pieces(
    state: Iterable[tuple[str, Tensor | Number]], rank: int, world_size: int
) -> Iterator[Piece | NumberPiece]:
    """Distribute replicated state so that all ranks write about the same number of bytes. Rank 0 yields the numbers."""
    written = [0] * world_size
    for name, value in state:
        if not isinstance(value, Tensor):
            if rank == 0:
                yield NumberPiece(name, value)
            continue
        writer = min(range(world_size), key=written.__getitem__)
        written[writer] += value.numel() * value.element_size()
        if writer == rank:
            yield Piece(name, tuple(value.shape), 0, value.reshape(-1))


def sharded_pieces(state: Iterable[tuple[str, Tensor | Number]], *, is_main: bool) -> Iterator[Piece | NumberPiece]:
    """Yield this rank's shards. Values that are not DTensors (step counts) are replicated; rank 0 yields them."""
    for name, value in state:
        if isinstance(value, DTensor):
            start, stop = shard_range(value)
            if start < stop:
                yield Piece(name, tuple(value.shape), start, value.to_local().reshape(-1))
        elif not is_main:
            continue
        elif isinstance(value, Tensor):
            yield Piece(name, tuple(value.shape), 0, value.reshape(-1))
        else:
            yield NumberPiece(name, value)


@torch.no_grad()
def load_state(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], reader: PieceReader) -> None:
    """Copy a checkpoint into parameters and optimizer state; sharded parameters read their own range only."""
    for name, parameter in parameters.items():
        _read_into(parameter, f"model.{name}", reader)
    names = {id(parameter): name for name, parameter in parameters.items()}
    numbers = reader.numbers()
    tensors, counts = saved_keys(parameters, sorted(reader.names())), saved_keys(parameters, sorted(numbers))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                leaves: dict[str, Tensor | Number] = {
                    key: _new_state(parameter, f"optimizer.{name}.{key}", key, group, reader)
                    for key in tensors.get(name, ())
                }
                leaves |= {key: numbers[f"optimizer.{name}.{key}"] for key in counts.get(name, ())}
                if leaves:
                    optimizer.state[parameter].update(_restored(leaves))
            for name in group.get("names", ())[:1]:  # the same for all of a group's parameters
                start = f"group.{name}."
                group.update({n.removeprefix(start): value for n, value in numbers.items() if n.startswith(start)})


def saved_keys(parameters: Collection[str], full_names: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys in names "optimizer.<parameter>.<key>", by parameter. Both parts may contain dots."""
    keys: dict[str, list[str]] = {}
    for full_name in full_names:
        kind, _, rest = full_name.partition(".")
        dots = [place for place, character in enumerate(rest) if character == "."]
        split = next((dot for dot in reversed(dots) if rest[:dot] in parameters), None)
        if kind == "optimizer" and split is not None:
            keys.setdefault(rest[:split], []).append(rest[split + 1 :])
    return keys


def _new_state(parameter: Tensor, name: str, key: str, group: Mapping[str, Any], reader: PieceReader) -> Tensor:
    """Read a state tensor to the device where the optimizer would have created it."""
    shape = torch.Size(reader.shape(name))
    if shape == parameter.shape:
        state = torch.zeros_like(parameter, dtype=reader.dtype(name))
        _read_into(state, name, reader)
        return state
    value = reader.read(name, 0, shape.numel()).reshape(shape)
    return value if counts_on_host(key, group) else value.to(parameter.device)


def counts_on_host(key: str, group: Mapping[str, Any]) -> bool:
    """Return whether a state is a count on the CPU: torch's `step`, unless fused or capturable kernels read it on the
    device, and the counts of this project's optimizers."""
    return key in COUNTS and not (key == "step" and (group.get("fused") or group.get("capturable")))


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
    """Return the range [start, stop) of the full row-major tensor's elements in this rank's dim-0 shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.numel() // tensor.shape[0] if tensor.dim() else 1
    start = offset[0] * row if tensor.dim() else 0
    count = int(torch.Size(local_shape).numel())
    return start, start + count
