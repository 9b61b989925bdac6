"""A CUDA device without a GPU: its tensors have shapes, dtypes and devices, but no values.

torch's FakeTensorMode runs the code and raises for an operation on two devices. `Watch` raises for what else only a GPU
would show: the host waiting for the device, float64 of the size of weights or activations, tensors computed on the CPU,
and operators without a CUDA kernel or, under deterministic algorithms, without a deterministic one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE, META = torch.device("cuda", 0), torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]
PRODUCT = tuple(str(ROOT / package) + "/" for package in ("sophia", "models", "data", "training"))
DEVICE_TYPES = {"cuda": 1, "meta": 14}  # c10/core/DeviceType.h
#: Statistics of a few kinds of parameters may be float64, tensors of more elements may not.
FEW = 256

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
SIZED_BY_VALUES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default)
#: Where a copy to the CPU is asynchronous, since its event is waited for before it is read.
AWAITED = ("training/loop.py Reporter._queue",)
#: What torch refuses on CUDA under deterministic algorithms, of floating-point tensors.
NEVER_DETERMINISTIC = (aten.cumsum.default, aten.histc.default, aten.kthvalue.default, aten.put_.default)
ARRIVING = (aten.lift_fresh.default, aten._pin_memory.default, aten.detach.default)


class Fault(Exception):
    """What would be wrong or slow on a GPU, and where."""


def place() -> str:
    """Return file and function of the innermost frame of the product."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PRODUCT):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "outside of the product"
    function = frame.f_code.co_qualname.partition(".<locals>")[0]
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)} {function}"


class Devices(TorchDispatchMode):
    """Has torch's C++ code take the fake device for meta: a torch without CUDA has neither guard nor streams for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked from C++ alone
            device = func(*args)
            return META if device == DEVICE else device
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": DEVICE}
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Raises Fault for what a GPU would not do well.

    Args:
        waits: where the host may wait for the device, as `place()` has it, with the value that is read there.
    """

    def __init__(self, waits: Mapping[str, float]) -> None:
        super().__init__()
        self._waits = waits
        self._pinned: list[Tensor] = []
        self.waited: set[str] = set()

    def wait(self, how: str) -> float:
        here = place()
        if here not in self._waits:
            raise Fault(f"{here}: {how} waits for the device")
        self.waited.add(here)
        return self._waits[here]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            return self._read(func, args)
        on_device = any(t.device == DEVICE for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        if on_device and func in SIZED_BY_VALUES:
            self.wait(str(func))
        if func is aten._to_copy.default:
            self._copy(args[0], kwargs.get("device", args[0].device), kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._copy(args[1], args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if func is aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        result = func(*args, **kwargs)
        if on_device and func in NEVER_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise Fault(f"{place()}: {func} has no deterministic kernel")
        if on_device and not runs_on_cuda(func):
            raise Fault(f"{place()}: {func} has no CUDA kernel")
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._check(func, tensor)
        return result

    def _read(self, func: Any, args: Any) -> Any:
        if all(tensor.device.type == "cpu" for tensor in args):  # what it waited for was the copy
            try:
                return func(*args)  # of a constant
            except DataDependentOutputException:
                value = self.wait(str(func)) if place() in self._waits else 1.0
        else:
            value = self.wait(str(func))
        dtype = args[0].dtype
        return float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)

    def _copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if (source.device.type == "cpu") == (target.type == "cpu"):
            return
        if not non_blocking:
            self.wait(f"a copy from {source.device} to {target}")
        elif target.type == "cpu":
            if place() not in AWAITED:
                raise Fault(f"{place()}: a copy to the CPU may be read before it has arrived")
        elif source.device.type == "cpu" and source.numel() > 1 and not any(source is t for t in self._pinned):
            self.wait("a copy from memory that is not pinned")

    def _check(self, func: Any, tensor: Tensor) -> None:
        if tensor.device == DEVICE and tensor.dtype == torch.float64 and tensor.numel() > FEW:
            raise Fault(f"{place()}: {func} makes a float64 tensor of shape {tuple(tensor.shape)}")
        arrives = func in ARRIVING or func is aten._to_copy.default
        if tensor.device.type == "cpu" and tensor.numel() > 1 and not arrives and place() not in self._waits:
            raise Fault(f"{place()}: {func} computes on the CPU, a tensor of shape {tuple(tensor.shape)}")


@cache
def _native_functions() -> str:
    return (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()


@cache
def runs_on_cuda(func: Any) -> bool:
    """Return whether torch has a CUDA kernel for an operator, or code for every device."""
    name = func._schema.name.removeprefix("aten::")
    if func._schema.overload_name:
        name = f"{name}.{func._schema.overload_name}"
    _, _, found = _native_functions().partition(f"\n- func: {name}(")
    entry = found.partition("\n- func: ")[0]
    if "structured_delegate: " in entry:
        name = entry.partition("structured_delegate: ")[2].splitlines()[0].strip()
        _, _, found = _native_functions().partition(f"\n- func: {name}(")
        entry = found.partition("\n- func: ")[0]
    _, _, kernels = entry.partition("\n  dispatch:\n")
    return not kernels or "CUDA" in kernels or "Composite" in kernels


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make tensors on CUDA, and autocast for it, work without a GPU; they have no values."""
    available = mock.patch(
        "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", return_value=False
    )
    bf16 = mock.patch("torch.cuda.is_bf16_supported", return_value=True)
    generators = mock.patch("torch.random.fork_rng", return_value=nullcontext())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _device_guard(), available, bf16, generators, fake, Devices():
        yield


@contextmanager
def _device_guard() -> Iterator[None]:
    """Lend CUDA the device guard of meta, which does nothing, if this torch has none for CUDA."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (DEVICE_TYPES[META.type] + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    cuda, before = DEVICE_TYPES[DEVICE.type], guards[DEVICE_TYPES[DEVICE.type]]
    guards[cuda] = before or guards[DEVICE_TYPES[META.type]]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def watched(waits: Mapping[str, float]) -> Iterator[Watch]:
    """Raise Fault for what a GPU would not do well. Events pass at once, and waiting for one counts as a wait."""

    class Event:
        def __init__(self, *, enable_timing: bool = False) -> None: ...

        def record(self) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return 1.0

        def synchronize(self) -> None:
            watch.wait("an event")

    watch = Watch(waits)
    with mock.patch("torch.cuda.Event", Event), watch:
        yield watch
