"""Building blocks of update rules, and `apply`, which applies a rule to many tensors.

A rule is an elementwise function and the only place with a method's arithmetic. It takes tensors of one shape, then
hyper-parameters as floats or 0-D float64 tensors (the compiled form takes only tensors, so that a schedule does not
recompile), then `grad_scale` and `found_inf`, which may be None. The arithmetic has the precision of the state (m, h):
float32, also for bfloat16 and float16 parameters.

`apply` has three forms. They agree to the last bit if the hardware rounds each operation (a GPU compiler may fuse a
multiplication into an addition):

- compiled: `torch.compile` turns the rule into a kernel with one pass over memory. Sizes are symbolic, so one
  compilation serves every model and process. Each call takes ROWS parameters, because a call costs as much as a hundred
  thousand coordinates;
- foreach: each operation over all tensors at once, for accelerators without a compiler;
- eager: each operation over one tensor, in pieces that fit in the cache, for small models and CPUs without a compiler.

The compiled and the eager form join small tensors, so that a hundred norms cost one call.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Rule = Callable[..., Tensor | None]
Scalar = float | Tensor
F = TypeVar("F", bound=Rule)
Row = Sequence[Tensor]  # the tensor arguments of a rule, for one parameter


class Form(NamedTuple):
    """The form to use, with the names of torch.optim. None chooses by device and size; both False is eager."""

    foreach: bool | None = None
    compile: bool | None = None


AUTOMATIC = Form()

# Smaller parameters are joined: below this size a call costs more than copying there and back.
JOINED_BELOW = 1 << 13
# From this many coordinates on, a step is worth the seconds of compiling.
COMPILED_FROM = 1 << 20
# Rows per compiled call, and the largest row: its count of unclipped coordinates is an int32.
ROWS, LONGEST_ROW = 8, 1 << 30
# Coordinates per piece in the eager form: its temporaries fit in the L2 cache.
EAGER_PIECE = 1 << 17
# Coordinates per call in the foreach form, unless one row has more: up to six float32 temporaries are 400 MB.
FOREACH_PART = 1 << 24

_compiled: dict[tuple[object, ...], Callable[..., Tensor | None]] = {}
_compiler_failed = False


def reset() -> None:
    """Forget what was compiled. After `torch._dynamo.reset()`, it would be compiled again, for the first sizes it meets."""
    _compiled.clear()


def updates(*indices: int) -> Callable[[F], F]:
    """Record in the attribute `updated` which tensor arguments a rule changes."""

    def mark(rule: F) -> F:
        rule.updated = indices  # type: ignore[attr-defined]
        return rule

    return mark


def unscaled(
    grad: Tensor,  # (*) any floating dtype
    state: Tensor,  # (*) gives the dtype of the arithmetic
    grad_scale: Tensor | None,  # ()
) -> Tensor:  # (*)
    """Return the gradient in the dtype of the state, divided by `grad_scale`."""
    grad = grad.to(state.dtype)
    # A second division per coordinate would make the step compute-bound; the reciprocal of a power of 2 is exact.
    return grad if grad_scale is None else grad * (1 / grad_scale)


def fold(
    average: Tensor,  # (*) updated in place
    value: Tensor,  # (*)
    decay: Scalar,  # () β
    found_inf: Tensor | None,  # ()
) -> None:
    """average ← β average + (1-β) value, unless found_inf is 1. Not lerp_, which rounds differently when compiled."""
    new = average * decay + value * (1 - decay)
    average.copy_(new if found_inf is None else torch.where(found_inf > 0, average, new))


def descend(
    param: Tensor,  # (*) updated in place
    update: Tensor,  # (*)
    lr: Scalar,  # () η
    weight_decay: Scalar,  # () λ
    found_inf: Tensor | None,  # ()
) -> None:
    """θ ← θ - ηλθ - ηu, rounded once to the parameter's dtype; bit for bit θ if found_inf is 1."""
    if found_inf is not None:
        lr = lr * (1 - found_inf)
    # A model that became float64 after its first step keeps a float32 state.
    dtype = torch.promote_types(param.dtype, update.dtype)
    param.copy_(param.to(dtype) * (1 - lr * weight_decay) - update * lr)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor detached. Call it under no_grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def scalar_on(device: torch.device, scalar: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a 0-D tensor to the device of the kernels. Only a copy to the CPU waits: it would be read before it arrives."""
    return scalar.to(device, dtype, non_blocking=device.type != "cpu")


def apply(
    rule: Rule,
    tensors: Sequence[Sequence[Tensor]],  # for each tensor argument of the rule, one tensor per parameter
    hyper: Sequence[Scalar],  # the rule's hyper-parameters
    form: Form = AUTOMATIC,
    amp: Sequence[Tensor | None] = (),  # grad_scale and found_inf, on any device
) -> list[Tensor]:  # the results of the calls of the rule
    """Apply `rule` to each parameter's tensors in place (for DTensors, to this rank's shard). Call it under no_grad."""
    results: list[Tensor | None] = []
    for rows in _by_signature(zip(*([local(t) for t in column] for column in tensors), strict=True)):
        device = rows[0][0].device
        scalars = [
            *(_widened(value, device) for value in hyper),
            *(value if value is None else scalar_on(device, value) for value in amp),
        ]
        foreach, compile = _choose(form, rows)
        if foreach:
            for part in _parts(rows):
                results.append(rule(*(TensorList(column) for column in zip(*part, strict=True)), *scalars))
            continue
        large, small, odd = _flatten(rows)
        joined = _join(small)
        if joined and joined[0].numel() >= JOINED_BELOW:
            large.append(joined)
        elif joined:
            results += _call_in_pieces(rule, joined, scalars)
        if compile and large:
            results += _call_compiled(rule, large, scalars)
        else:
            for row in large:
                results += _call_in_pieces(rule, row, scalars)
        if len(small) > 1:
            _write_back(rule, joined, small)
        for row in odd:
            results += [rule(*piece, *scalars) for piece in _cut_as_it_lies(row)]
    return [result for result in results if result is not None]


def _widened(value: Scalar, device: torch.device) -> Scalar:
    """Return a tensor hyper-parameter in float64, on the CPU or the kernels' own device; a float as it is.

    With the precision of a Python number, all forms compute with the same numbers, and a number and a tensor share a
    compiled kernel. MPS lacks float64 and keeps the dtype.
    """
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "mps":
        value = value.double()
    return value if value.device.type == "cpu" else scalar_on(device, value)


def _by_signature(rows: Iterable[Row]) -> list[list[Row]]:
    """Group the non-empty rows by device and dtypes."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row[0].numel() > 0:
            groups.setdefault((row[0].device, *[t.dtype for t in row]), []).append(row)
    return list(groups.values())


def _choose(form: Form, rows: Sequence[Row]) -> Form:
    foreach, compile = form
    device = rows[0][0].device.type
    if compile is None:
        large = sum(row[0].numel() for row in rows) >= COMPILED_FROM
        compile = not foreach and large and device in ("cpu", "cuda", "xpu")
    compile = compile and not _compiler_failed
    if foreach is None:
        foreach = not compile and device != "cpu"
    return Form(foreach, compile)


def _parts(rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
    """Split the rows of a foreach call, whose temporaries are as large as all its rows."""
    first, size = 0, 0
    for index, row in enumerate(rows):
        if size and size + row[0].numel() > FOREACH_PART:
            yield rows[first:index]
            first, size = index, 0
        size += row[0].numel()
    yield rows[first:]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _flatten(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Split into large and small rows, as one-dimensional views, and rows without a common layout, unchanged."""
    large: list[Row] = []
    small: list[Row] = []
    odd: list[Row] = []
    for row in rows:
        if not all(t.is_contiguous() for t in row):
            order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
            permuted = [t.permute(order) for t in row]
            if not all(t.is_contiguous() for t in permuted):
                odd.append(row)
                continue
            row = permuted
        views = [t.view(-1) for t in row]
        (small if views[0].numel() < JOINED_BELOW else large).append(views)
    return large, small, odd


def _join(rows: Sequence[Row]) -> Row:
    """Concatenate rows into one. A single row is not copied; no rows give an empty row."""
    return rows[0] if len(rows) == 1 else [torch.cat(column) for column in zip(*rows, strict=True)]


def _write_back(rule: Rule, joined: Row, rows: Sequence[Row]) -> None:
    sizes = [row[0].numel() for row in rows]
    for index in rule.updated:  # type: ignore[attr-defined]
        torch._foreach_copy_([row[index] for row in rows], list(torch.split(joined[index], sizes)))


def _call_in_pieces(rule: Rule, row: Row, scalars: Sequence[Any]) -> list[Tensor | None]:
    size = EAGER_PIECE if row[0].device.type == "cpu" else LONGEST_ROW
    return [rule(*piece, *scalars) for piece in zip(*(torch.split(t, size) for t in row), strict=True)]


def _cut_as_it_lies(row: Row) -> Iterable[Row]:
    """Cut a row without a common layout along its longest dimension, into pieces of at most LONGEST_ROW coordinates."""
    parts = -(-row[0].numel() // LONGEST_ROW)
    dimension = max(range(row[0].dim()), key=row[0].size)
    return zip(*(t.tensor_split(parts, dimension) for t in row), strict=True)


def _call_compiled(rule: Rule, rows: Sequence[Row], scalars: Sequence[float | Tensor | None]) -> list[Tensor | None]:
    """Call the compiled rule. If compiling fails, warn once and use the eager form from then on."""
    values = [s if s is None or isinstance(s, Tensor) else _number(s) for s in scalars]
    signature = (
        rule,
        rows[0][0].device,
        *[t.dtype for t in rows[0]],
        *[None if value is None else (value.device, value.dtype) for value in values],
    )
    try:
        compiled = _compiled.get(signature) or _compile(rule, rows[0], values)
    except Exception as error:
        _warn_that_compiling_failed(error)
        return [result for row in rows for result in _call_in_pieces(rule, row, scalars)]
    _compiled[signature] = compiled
    rows = _cut(rows)
    chunks = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
    return [compiled([t for row in chunk for t in row], values) for chunk in chunks]


def _compile(rule: Rule, like: Row, scalars: list[Tensor | None]) -> Callable[..., Tensor | None]:
    """Compile a function that applies the rule to ROWS rows of any sizes, with the dtypes and the device of `like`.

    It takes the tensors of all rows in one flat list.
    """
    width = len(like)

    def apply_to_rows(tensors: list[Tensor], scalars: list[Tensor | None]) -> Tensor | None:
        results = [rule(*tensors[first : first + width], *scalars) for first in range(0, len(tensors), width)]
        counts = [result for result in results if result is not None]
        return torch.stack(counts).sum() if counts else None

    # Dynamo limits recompilations per code object: a copy per combination of dtypes stays below the limit.
    copy = FunctionType(
        apply_to_rows.__code__.replace(), globals(), apply_to_rows.__name__, None, apply_to_rows.__closure__
    )
    # Write m before counting, and compute hyper-parameters before the loop: with the default of 30, the count is a second
    # pass over memory, and the hyper-parameters are converted once per vector.
    options: dict[str, Any] = {"realize_opcount_threshold": 1}
    compiled = torch.compile(copy, dynamic=True, fullgraph=True, options=options)
    # Large sizes, so that loops are parallel, and all different, so that no two rows are assumed equal. Fixed sizes keep
    # the key of the compiler's disk cache the same everywhere.
    sizes = [(1 << 16) + 1001 * index for index in range(ROWS)]
    compiled([torch.zeros(size, dtype=t.dtype, device=t.device) for size in sizes for t in like], scalars)
    return compiled


def _cut(rows: Sequence[Row]) -> list[Row]:
    """Return the same coordinates in a multiple of ROWS rows, none too long, by splitting the longest one."""
    cut: list[Row] = []
    for row in rows:
        parts = -(-row[0].numel() // LONGEST_ROW)
        cut += [row] if parts == 1 else zip(*(t.tensor_split(parts) for t in row), strict=True)
    cut.sort(key=lambda row: row[0].numel())
    missing = -len(cut) % ROWS
    if missing:
        longest = cut.pop()
        cut += zip(*(t.tensor_split(missing + 1) for t in longest), strict=True)
    return cut


def _warn_that_compiling_failed(error: Exception) -> None:
    global _compiler_failed
    _compiler_failed = True
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    warnings.warn(
        f"the optimizer step runs uncompiled, several times slower: torch.compile failed ({reason}). Remove the damaged "
        "library if the reason names one, or install a C++ compiler (Triton on a GPU), or pass compile=False to silence "
        "this warning.",
        RuntimeWarning,
        stacklevel=4,
    )


class TensorList:
    """A list of tensors that supports the operations used by the rules, through torch._foreach_*."""

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

    def pow(self, exponent: Scalar) -> "TensorList":
        if isinstance(exponent, Tensor):
            exponent = self._operand(exponent)
            return TensorList([t.pow(exponent) for t in self.tensors])
        return TensorList(torch._foreach_pow(self.tensors, exponent))

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

    def sum(self, dtype: torch.dtype) -> Tensor:  # in int64, whatever dtype is enough for one row
        return torch.stack([t.sum() for t in self.tensors]).sum()

    def _operand(self, other: Any) -> Any:
        if isinstance(other, TensorList):
            return other.tensors
        if isinstance(other, Tensor):  # torch._foreach_* take a tensor only in the dtype and on the device of the list
            return scalar_on(self.tensors[0].device, other, self.dtype)
        return other

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.where:
            return NotImplemented
        condition, a, b = args
        return cls([torch.where(condition, x, y) for x, y in zip(a.tensors, b.tensors, strict=True)])
