"""How an update rule of `sophia.rules` is carried out over many tensors.

A rule is written once and carried out in one of three forms, which agree to the last bit where the hardware rounds each
operation (a GPU compiler may fuse a multiplication into an addition):

- compiled: `torch.compile` makes one kernel of it, a single pass over memory whose size is symbolic, so one
compilation serves
  every shape;
- foreach: each operation over all tensors at once, for accelerators without a compiler;
- eager: each operation over one tensor, in pieces that stay in the cache, for small models and CPUs without a compiler.

In the compiled and the eager form small tensors are joined, so that a hundred norms cost one call.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Rule = Callable[..., Tensor | None]


class Form(NamedTuple):
    """Which form carries a rule out, named as in torch.optim. None chooses by device and size; both False is the
    eager form."""

    foreach: bool | None = None
    compile: bool | None = None


AUTOMATIC = Form()

# Tensors of fewer elements are joined: below this size a call costs more than copying there and back.
JOINED_BELOW = 1 << 16
# From this many elements on a step is worth the seconds that compiling takes.
COMPILED_FROM = 1 << 20
# Elements of a piece in the eager form: its temporaries stay in the second-level cache.
EAGER_PIECE = 1 << 17

_compiled: dict[tuple[object, ...], Callable[..., Tensor | None]] = {}
_compiler_failed = False


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives on this rank; any other tensor as it is. Only under no_grad: no gradient
    flows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def apply(
    rule: Rule,
    tensors: Sequence[Sequence[Tensor]],  # for each tensor argument of the rule, one local tensor per parameter
    scalars: Sequence[float | Tensor | None],  # the rule's other arguments
    form: Form = AUTOMATIC,
) -> list[Tensor]:  # what the rule returned, for each call of it
    """Carry out `rule` on each parameter's tensors, in place."""
    rows = [row for row in zip(*tensors, strict=True) if row[0].numel() > 0]
    results: list[Tensor | None] = []
    for group in _by_signature(rows):
        chosen = _choose(form, group)
        if chosen.foreach:
            results.append(rule(*(TensorList(column) for column in zip(*group, strict=True)), *scalars))
            continue
        for arguments, write_back in _flat_calls(rule, group):
            if chosen.compile and arguments[0].dim() == 1 and arguments[0].numel() > 1:
                results.append(_call_compiled(rule, arguments, scalars))
            else:
                results += _call_in_pieces(rule, arguments, scalars)
            write_back()
    return [result for result in results if result is not None]


def _choose(form: Form, group: Sequence[Sequence[Tensor]]) -> Form:
    device = group[0][0].device.type
    foreach, compile = form
    if compile is None:
        large = sum(row[0].numel() for row in group) >= COMPILED_FROM
        compile = not foreach and large and not _compiler_failed and device in ("cpu", "cuda", "xpu")
    if foreach is None:
        foreach = not compile and device != "cpu"
    return Form(foreach, compile)


def _by_signature(rows: Sequence[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Rows whose tensors agree in device and dtypes."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, ...]]] = {}
    for row in rows:
        groups.setdefault((row[0].device, *(t.dtype for t in row)), []).append(row)
    return list(groups.values())


def _flat_calls(rule: Rule, rows: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """Arguments for each call of the rule, and what to do after it: large tensors as flat views, small ones joined."""
    small = []
    for row in rows:
        flat = _flat(row)
        if flat is None:
            yield list(row), _nothing
        elif flat[0].numel() >= JOINED_BELOW:
            yield flat, _nothing
        else:
            small.append(flat)
    if len(small) == 1:
        yield small[0], _nothing
    elif small:
        columns = [list(column) for column in zip(*small, strict=True)]
        joined = [torch.cat(column) for column in columns]
        sizes = [t.numel() for t in columns[0]]

        def write_back() -> None:
            for index in rule.updated:  # type: ignore[attr-defined]
                torch._foreach_copy_(columns[index], list(joined[index].split(sizes)))

        yield joined, write_back


def _nothing() -> None:
    pass


def _flat(row: Sequence[Tensor]) -> list[Tensor] | None:
    """One-dimensional views that walk through memory in one order; None if the tensors' layouts differ or have
    holes."""
    if all(t.is_contiguous() for t in row):
        return [t.view(-1) for t in row]
    order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
    permuted = [t.permute(order) for t in row]
    return [t.view(-1) for t in permuted] if all(t.is_contiguous() for t in permuted) else None


def _call_in_pieces(rule: Rule, arguments: Sequence[Tensor], scalars: Sequence[Any]) -> list[Tensor | None]:
    if arguments[0].dim() != 1 or arguments[0].device.type != "cpu":
        return [rule(*arguments, *scalars)]
    pieces = zip(*(t.split(EAGER_PIECE) for t in arguments), strict=True)
    return [rule(*piece, *scalars) for piece in pieces]


def _call_compiled(rule: Rule, arguments: Sequence[Tensor], scalars: Sequence[float | Tensor | None]) -> Tensor | None:
    """Falls back to the eager form, for good and with one warning, if there is no working compiler."""
    global _compiler_failed
    if _compiler_failed:
        return _total(_call_in_pieces(rule, arguments, scalars))
    large = arguments[0].numel() >= JOINED_BELOW  # the compiler lays out loops and threads for the size it meets first
    traits = (arguments[0].device, *(t.dtype for t in arguments), *(scalar is None for scalar in scalars), large)
    compiled = _compiled.get((rule, *traits))
    if compiled is not None:
        return compiled(*arguments, *map(_as_tensor, scalars))
    compiled = _compile(rule)
    try:
        result = compiled(*arguments, *map(_as_tensor, scalars))
    except Exception as error:
        # Compilation fails before anything has been written. An error of the rule itself comes again below.
        result = _total(_call_in_pieces(rule, arguments, scalars))
        _compiler_failed = True
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"the optimizer step runs uncompiled, several times slower: torch.compile failed ({reason}). Install a C++ "
            "compiler (on a GPU Triton), or pass compile=False to say that this is meant.",
            RuntimeWarning,
            stacklevel=2,
        )
        return result
    _compiled[(rule, *traits)] = compiled
    return result


def _compile(rule: Rule) -> Callable[..., Tensor | None]:
    assert isinstance(rule, FunctionType)
    # Dynamo counts recompilations per code object: a copy for each combination of dtypes keeps the limit out of reach.
    copy = FunctionType(rule.__code__.replace(), rule.__globals__, rule.__name__, rule.__defaults__, rule.__closure__)
    # A low threshold writes m before it is counted: the count then joins the same pass, which otherwise would be a
    # second one.
    options: dict[str, Any] = {"realize_opcount_threshold": 4}
    return torch.compile(copy, dynamic=True, fullgraph=True, options=options)


def _as_tensor(value: float | Tensor | None) -> Tensor | None:
    """A number as a 0-D float64 tensor on the CPU, where a kernel takes it as an argument and a new value compiles
    nothing."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float | int) else value


def _total(results: Sequence[Tensor | None]) -> Tensor | None:
    kept = [result for result in results if result is not None]
    return torch.stack(kept).sum() if kept else None


class TensorList:
    """Tensors on which a rule's operations act at once, through torch._foreach_*: only the operations that the
    rules use."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def to(self, dtype: torch.dtype) -> "TensorList":
        return self if self.dtype == dtype else TensorList([t.to(dtype) for t in self.tensors])

    def __add__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_add(self.tensors, self._operand(other)))

    def __sub__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_sub(self.tensors, self._operand(other)))

    def __mul__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_mul(self.tensors, self._operand(other)))

    def __truediv__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_div(self.tensors, self._operand(other)))

    def __lt__(self, other: "TensorList") -> "TensorList":
        return TensorList([a < b for a, b in zip(self.tensors, other.tensors, strict=True)])

    def abs(self) -> "TensorList":
        return TensorList(torch._foreach_abs(self.tensors))

    def sign(self) -> "TensorList":
        return TensorList(torch._foreach_sign(self.tensors))

    def sqrt(self) -> "TensorList":
        return TensorList(torch._foreach_sqrt(self.tensors))

    def clamp(self, low: float, high: float) -> "TensorList":
        return TensorList(torch._foreach_clamp_max(torch._foreach_clamp_min(self.tensors, low), high))

    def clamp_min(self, low: float | Tensor) -> "TensorList":
        if isinstance(low, Tensor):
            low = self._operand(low)
            return TensorList([t.clamp_min(low) for t in self.tensors])
        return TensorList(torch._foreach_clamp_min(self.tensors, low))

    def clamp_max(self, high: float) -> "TensorList":
        return TensorList(torch._foreach_clamp_max(self.tensors, high))

    def add_(self, other: "TensorList") -> "TensorList":
        torch._foreach_add_(self.tensors, other.tensors)
        return self

    def copy_(self, other: "TensorList") -> "TensorList":
        torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def sum(self) -> Tensor:
        return torch.stack([t.sum() for t in self.tensors]).sum()

    def _operand(self, other: Any) -> Any:
        if isinstance(other, TensorList):
            return other.tensors
        if isinstance(other, Tensor):  # torch._foreach_* take a tensor only in the dtype and on the device of the list
            return other.to(device=self.tensors[0].device, dtype=self.dtype, non_blocking=True)
        return other

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.where:
            return NotImplemented
        condition, a, b = args
        return cls([torch.where(condition, x, y) for x, y in zip(a.tensors, b.tensors, strict=True)])
