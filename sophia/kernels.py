"""What an update rule is written with, and how it is carried out over many tensors.

A rule is an elementwise function: the only place where a method's arithmetic is written. It takes tensors of one shape,
then hyper-parameters, floats or 0-D float64 tensors (the compiled form takes only these, so that a schedule compiles
nothing anew), then `grad_scale` and `found_inf`, which may be None. The arithmetic has the precision of the state (m, h):
float32, also for bfloat16 and float16 parameters.

A rule is carried out in one of three forms, which agree to the last bit where the hardware rounds each operation (a GPU
compiler may fuse a multiplication into an addition):

- compiled: `torch.compile` makes a kernel of it, one pass over memory. Its sizes are symbolic, so that one compilation
  serves every model and every process, and it takes ROWS parameters at a call, since a call costs as much as a hundred
  thousand coordinates;
- foreach: each operation over all tensors at once, for accelerators without a compiler;
- eager: each operation over one tensor, in pieces that stay in the cache, for small models and CPUs without a compiler.

In the compiled and the eager form small tensors are joined, so that a hundred norms cost one call.
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
    """Which form carries a rule out, named as in torch.optim. None chooses by device and size; both False is eager."""

    foreach: bool | None = None
    compile: bool | None = None


AUTOMATIC = Form()

# Parameters of fewer coordinates are joined: below this size a call costs more than copying there and back.
JOINED_BELOW = 1 << 13
# From this many coordinates on a step is worth the seconds that compiling takes.
COMPILED_FROM = 1 << 20
# Rows that a compiled call takes, and the most coordinates in a row, whose count of unclipped ones is an int32.
ROWS, LONGEST_ROW = 8, 1 << 30
# Coordinates of a piece in the eager form: its temporaries stay in the second-level cache.
EAGER_PIECE = 1 << 17

_compiled: dict[tuple[object, ...], Callable[..., Tensor | None]] = {}
_compiler_failed = False


def updates(*indices: int) -> Callable[[F], F]:
    """Marks which tensor arguments a rule changes, in the attribute `updated`."""

    def mark(rule: F) -> F:
        rule.updated = indices  # type: ignore[attr-defined]
        return rule

    return mark


def unscaled(
    grad: Tensor,  # (*) any floating dtype
    state: Tensor,  # (*) whose dtype the arithmetic has
    grad_scale: Tensor | None,  # ()
) -> Tensor:  # (*)
    """The gradient in the dtype of the state, divided by `grad_scale`."""
    grad = grad.to(state.dtype)
    # A division per coordinate would not hide behind memory beside Sophia's own; powers of 2 and 1 stay exact.
    return grad if grad_scale is None else grad * (1 / grad_scale)


def fold(
    average: Tensor,  # (*) updated in place
    value: Tensor,  # (*)
    decay: Scalar,  # () β
    found_inf: Tensor | None,  # ()
) -> None:
    """average ← β average + (1-β) value, but nothing where found_inf is 1. Not lerp_, which rounds otherwise where it is
    compiled."""
    new = average * decay + value * (1 - decay)
    average.copy_(new if found_inf is None else torch.where(found_inf > 0, average, new))


def descend(
    param: Tensor,  # (*) updated in place
    update: Tensor,  # (*)
    lr: Scalar,  # () η
    weight_decay: Scalar,  # () λ
    found_inf: Tensor | None,  # ()
) -> None:
    """θ ← θ - ηλθ - ηu, rounded once to the parameter's dtype; bit for bit θ where found_inf is 1."""
    if found_inf is not None:
        lr = lr * (1 - found_inf)
    param.copy_(param.to(update.dtype) * (1 - lr * weight_decay) - update * lr)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives on this rank; any other tensor itself, detached. Only under no_grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def apply(
    rule: Rule,
    tensors: Sequence[Sequence[Tensor]],  # for each tensor argument of the rule, one tensor per parameter
    hyper: Sequence[Scalar],  # the rule's hyper-parameters
    form: Form = AUTOMATIC,
    amp: Sequence[Tensor | None] = (),  # grad_scale and found_inf, on the device of the parameters
) -> list[Tensor]:  # what the rule returned, for each call of it
    """Carry out `rule` on each parameter's tensors, in place: of DTensors on the part of this rank. Under no_grad."""
    results: list[Tensor | None] = []
    for rows in _by_signature(zip(*([local(t) for t in column] for column in tensors), strict=True)):
        scalars = [*(_widened(value, rows[0][0].device) for value in hyper), *amp]
        foreach, compile = _choose(form, rows)
        if foreach:
            results.append(rule(*(TensorList(column) for column in zip(*rows, strict=True)), *scalars))
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
    """A hyper-parameter with the precision of a Python float where it is a tensor, so that all forms of a rule compute
    with the same numbers (MPS, which lacks float64, keeps what it is given), from where kernels take it: the CPU or
    their own device, not another accelerator."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() and value.device.type != "mps":
        value = value.double()
    return value if value.device.type == "cpu" else value.to(device, non_blocking=True)


def _by_signature(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that are not empty, by what their tensors have in common: device and dtypes."""
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


def _flatten(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Large and small rows as one-dimensional views, and those whose tensors have no common layout as they are."""
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
    """Many rows in one, a copy; a single one as it is; none as an empty one."""
    return rows[0] if len(rows) == 1 else [torch.cat(column) for column in zip(*rows, strict=True)]


def _write_back(rule: Rule, joined: Row, rows: Sequence[Row]) -> None:
    sizes = [row[0].numel() for row in rows]
    for index in rule.updated:  # type: ignore[attr-defined]
        torch._foreach_copy_([row[index] for row in rows], list(joined[index].split(sizes)))


def _call_in_pieces(rule: Rule, row: Row, scalars: Sequence[Any]) -> list[Tensor | None]:
    size = EAGER_PIECE if row[0].device.type == "cpu" else LONGEST_ROW
    return [rule(*piece, *scalars) for piece in zip(*(t.split(size) for t in row), strict=True)]


def _cut_as_it_lies(row: Row) -> Iterable[Row]:
    """A row without a common layout in pieces of at most LONGEST_ROW coordinates, along its longest dimension."""
    parts = -(-row[0].numel() // LONGEST_ROW)
    dimension = max(range(row[0].dim()), key=row[0].size)
    return zip(*(t.tensor_split(parts, dimension) for t in row), strict=True)


def _call_compiled(rule: Rule, rows: Sequence[Row], scalars: Sequence[float | Tensor | None]) -> list[Tensor | None]:
    """Falls back to the eager form, for good and with one warning, if the compiler does not work."""
    values = [torch.tensor(s, dtype=torch.float64) if isinstance(s, float | int) else s for s in scalars]
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
    """A function that applies the rule to the tensors of ROWS rows, one row after the other in a list, whatever the sizes
    of the rows, with the dtypes and the device of `like`."""
    width = len(like)

    def apply_to_rows(tensors: list[Tensor], scalars: list[Tensor | None]) -> Tensor | None:
        results = [rule(*tensors[first : first + width], *scalars) for first in range(0, len(tensors), width)]
        counts = [result for result in results if result is not None]
        return torch.stack(counts).sum() if counts else None

    # Dynamo counts recompilations per code object: a copy for each combination of dtypes keeps its limit out of reach.
    copy = FunctionType(
        apply_to_rows.__code__.replace(), globals(), apply_to_rows.__name__, None, apply_to_rows.__closure__
    )
    # m is written before it is counted, and η, β and their like are computed before the loop: with the default of 30 the
    # count is a second pass over memory, and the hyper-parameters are converted once per vector.
    options: dict[str, Any] = {"realize_opcount_threshold": 1}
    compiled = torch.compile(copy, dynamic=True, fullgraph=True, options=options)
    # Sizes that are large, so that the loops are laid out for threads, and all different, so that no two rows are taken to
    # be of one size. They are the same everywhere, and so is the key of the compiler's cache on the disk.
    sizes = [(1 << 16) + 1001 * index for index in range(ROWS)]
    compiled([torch.zeros(size, dtype=t.dtype, device=t.device) for size in sizes for t in like], scalars)
    return compiled


def _cut(rows: Sequence[Row]) -> list[Row]:
    """The same coordinates in a multiple of ROWS rows, none too long: the longest one gives the missing ones."""
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
        f"the optimizer step runs uncompiled, several times slower: torch.compile failed ({reason}). Remove the library "
        "that is damaged, if one is named, or install a C++ compiler (on a GPU Triton), or pass compile=False to say "
        "that this is meant.",
        RuntimeWarning,
        stacklevel=4,
    )


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

    def sum(self, dtype: torch.dtype) -> Tensor:  # in int64, whatever dtype is enough for one row
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
