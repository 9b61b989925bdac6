"""Where the bytes of a training step go: every storage that its operations make, by kind, and the peak of each phase.

Works on real and on fake tensors (`FakeTensorMode`), so that a step can be weighed that no machine here could run. It sees
what goes through torch's dispatcher and what `UntypedStorage.resize_` does (FSDP2 frees and fills gathered weights with
it); it does not see what kernels allocate inside, allocators' rounding, or CUDA's own context.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["weights", "gradients", "optimizer", "curvature", "activations", "head", "engine", "workspace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Memory = dict[Kind, int]  # bytes by kind

#: Operators of the engines: what they return are buffers of theirs (gathered weights, gradients on their way).
ENGINE_OPERATORS = ("c10d", "_c10d_functional", "fsdp")
CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)

#: What is read of fake tensors: no count is zero, nothing is amiss, labels are drawn just where there are targets.
_ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    torch.ops.aten._local_scalar_dense.default: lambda tensor: 0.0 if tensor.dtype.is_floating_point else 1,
    torch.ops.aten.equal.default: lambda tensor: True,
}


class _Block:
    """A storage that is alive."""

    __slots__ = ("kind", "reference", "size")

    def __init__(self, kind: Kind, size: int, reference: "weakref.ref[Any]") -> None:
        self.kind, self.size, self.reference = kind, size, reference


class MemoryTrace(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end.

    Inside of `phase(name, kind)` new storages are of that kind, until `label` says better: a peak is counted with the
    labels that its storages have in the end. `peaks` is by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, _Block] = {}
        self._total = 0
        self._phase = "preparation"
        self._kind: Kind = "engine"
        self._highest: dict[str, int] = {}
        self._at_peak: dict[str, list[_Block]] = {}
        self._paused = self._fused = False

    def __enter__(self) -> "MemoryTrace":
        self._resize = torch.UntypedStorage.resize_
        trace, resize = self, self._resize

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            trace._resized(storage)
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS and isinstance(args[0], torch._subclasses.FakeTensor):
            return _ANSWERS[func](args[0])
        result = func(*args, **(kwargs or {}))
        if not (self._paused or (self._fused and torch.Tag.pointwise in func.tags)):
            kind: Kind = self._kind
            if func.namespace in ENGINE_OPERATORS:
                kind = "engine"
            elif func in CASTS and self.kind_of(args[0]) in ("weights", "engine"):
                kind = "engine"  # weights in the precision of the products
            for tensor in _tensors(result):
                self._made(tensor, kind)
        return result

    @contextmanager
    def phase(self, name: str, kind: Kind) -> Iterator[None]:
        """New storages are of this kind, and the peak is that of the phase."""
        before = self._phase, self._kind
        self._phase, self._kind = name, kind
        self._note_peak()
        try:
            yield
        finally:
            self._phase, self._kind = before

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """New storages are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made meanwhile is not counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Elementwise results are not counted meanwhile: kernels keep them in registers. `count` takes what remains."""
        before, self._fused = self._fused, True
        try:
            yield
        finally:
            self._fused = before

    def count(self, results: Any) -> None:
        """Count storages that are not counted yet."""
        if not self._paused:
            for tensor in _tensors(results):
                self._made(tensor, self._kind)

    def label(self, tensor: Tensor, kind: Kind) -> None:
        """The storage under a tensor (under the shard of a DTensor) is of this kind, also in peaks that are past."""
        for part in _tensors(tensor):
            block = self._live.get(id(part.untyped_storage()))
            if block is not None:
                block.kind = kind
            else:
                self._made(part, kind)

    def kind_of(self, tensor: Any) -> Kind | None:
        """What the storage under a tensor is; None where it was made outside of the trace."""
        for part in _tensors(tensor):
            block = self._live.get(id(part.untyped_storage()))
            return None if block is None else block.kind
        return None

    @property
    def current_phase(self) -> str:
        return self._phase

    def now(self) -> Memory:
        return _by_kind(self._live.values())

    @property
    def peaks(self) -> dict[str, Memory]:
        """The largest memory of each phase, by kind."""
        return {phase: _by_kind(blocks) for phase, blocks in self._at_peak.items()}

    def _made(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._live:
            return
        self._live[key] = _Block(kind, size, weakref.ref(storage, self._ended(key)))
        self._total += size
        self._note_peak()

    def _ended(self, key: int) -> Callable[[Any], None]:
        def end(reference: Any) -> None:
            block = self._live.pop(key, None)
            if block is not None:
                self._total -= block.size

        return end

    def _resized(self, storage: torch.UntypedStorage) -> None:
        block = self._live.get(id(storage))
        if block is None:
            return
        size = storage.nbytes()
        self._total += size - block.size
        # A block at a past peak keeps its size: a new one takes its place.
        self._live[id(storage)] = _Block("engine", size, block.reference)
        self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._highest.get(self._phase, -1):
            self._highest[self._phase] = self._total
            self._at_peak[self._phase] = list(self._live.values())


def _by_kind(blocks: Any) -> Memory:
    memory: Memory = dict.fromkeys(KINDS, 0)
    for block in blocks:
        memory[block.kind] += block.size
    return memory


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors of an operation's result; of a DTensor the local one."""
    if isinstance(value, DTensor):
        yield value._local_tensor
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
