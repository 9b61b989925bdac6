"""Base classes of the optimizers: argument checks, float32 state, gathering of tensors, torch's loss scaling.

The methods are in `sophia.sophia`, `sophia.lion` and `sophia.adahessian`.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from sophia.kernels import Form, local, scalar_on

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

HALF = (torch.bfloat16, torch.float16)

# The smallest ε: anything less rounds to zero in float32, and 0 / 0 gives NaN weights.
SMALLEST = torch.finfo(torch.float32).tiny

# The 0-D float32 entries of a state: the number of steps and of curvature estimates.
COUNTS = ("step", "hessian_step")


class Amp(NamedTuple):
    """The tensors of torch's loss-scaling protocol, on the device of the group's first parameter."""

    grad_scale: Tensor | None  # () divides the gradients
    found_inf: Tensor | None  # () 1.0 if weights and state must not change, else 0.0


class Work(NamedTuple):
    """The parameters of one group that take part in a step or a refresh, with their values."""

    group: dict[str, Any]
    params: list[Tensor]
    values: list[Tensor]  # gradients or estimates, in the shapes and placements of the parameters
    states: list[dict[str, Tensor]]
    amp: Amp


class ElementwiseOptimizer(Optimizer):
    """Base of optimizers that update each coordinate independently, so that shards of any shape work.

    State is per tensor and created at first use, in float32 for half-precision parameters and otherwise in the
    parameter's dtype. `step` may be called several times per training step on different groups, on empty groups
    and with zero gradients; it ignores parameters without a gradient.

    `torch.amp.GradScaler` sets the attributes `grad_scale` and `found_inf` (0-D float32 tensors or None), as it does
    for torch's fused optimizers. Gradients are divided by `grad_scale`. If `found_inf` is 1, neither weights nor state
    change. Neither is read back to the host.
    """

    _step_supports_amp_scaling = True

    # The keys of `state[p]`. COUNTS start as 0-D zeros on the CPU, the others as zeros like p.
    _state_names: tuple[str, ...] = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        if foreach and compile:
            raise ValueError("foreach = True and compile = True, expected at most one: each implements the same step")
        self._form = Form(foreach, compile)
        super().__init__(params, defaults)
        self._set_transient_attributes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_form": self._form}

    def _set_transient_attributes(self) -> None:
        """Reset the host-side counters, which are not part of the state, at construction and when a state is loaded."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_transient_attributes()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for index, p in enumerate(group["params"]):
                if not p.is_floating_point():
                    raise TypeError(
                        f"parameter {index} of shape {tuple(p.shape)} has dtype {p.dtype}, expected a real floating "
                        "dtype: for a complex parameter, pass torch.view_as_real(p)"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter is out of range."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but the state keeps its dtype (float32 for half precision) and the counts their device."""
        loaded: dict[str, Any] = {}
        hooks = [  # the last before loading, which sees what others made of the state_dict, and the first after it
            self.register_load_state_dict_pre_hook(lambda _, changed: loaded.update(changed)),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        """Set the entries that torch.optim would convert to the dtype or the device of the parameter."""
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in COUNTS:
                    self.state[p][key] = value.clone() if isinstance(value, Tensor) else _count(value)
                elif p.dtype in HALF:
                    self.state[p][key] = value.to(device=p.device, dtype=torch.float32)

    def _with_gradients(self) -> Iterator[Work]:
        """Yield the work of a step. Raises RuntimeError for a sparse gradient."""
        params = [p for group in self.param_groups for p in group["params"]]
        return self._work({p: checked_grad(p) for p in params if p.grad is not None})

    def _work(self, values: Mapping[Tensor, Tensor], grad_scale: Tensor | None = None) -> Iterator[Work]:
        """Yield the work of each group, without parameters that have no value.

        Args:
            grad_scale: replaces the attributes `grad_scale` and `found_inf`.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p in values]
            if params:
                device = local(params[0]).device
                amp = self._amp(device) if grad_scale is None else Amp(grad_scale.to(device), None)
                yield Work(group, params, [values[p] for p in params], [self._state_of(p) for p in params], amp)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        for name in self._state_names:
            if name not in state:
                state[name] = _count(0) if name in COUNTS else _zeros_like(p)
        return state

    def _amp(self, device: torch.device) -> Amp:
        """Return the attributes on a device, without synchronizing unless it is the CPU."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = scalar_on(device, local(grad_scale))
        if found_inf is not None:  # GradScaler sums the flags of several devices
            found_inf = scalar_on(device, local(found_inf) > 0)
            found_inf = found_inf.to(torch.float32 if device.type == "mps" else torch.float64)
        return Amp(grad_scale, found_inf)


class CurvatureOptimizer(ElementwiseOptimizer):
    """Base of optimizers that get a diagonal curvature estimate from `update_hessian` every `hessian_interval` steps.

    They exclude `step` and `update_hessian` from torch.compile: a trace would not repeat what these count on the host. The
    kernels are compiled anyway.
    """

    _state_names: tuple[str, ...] = ("step", "exp_avg", "hessian")
    _starts_with_curvature = True  # whether the first refresh belongs before the first step
    _without_curvature = (
        "makes Sophia momentum-sign descent",
        "; hessian_interval=None is for a run without curvature",
    )

    def _set_transient_attributes(self) -> None:
        self._round: dict[int, int] = {}  # id(parameter) -> coordinates, since the start of the training step
        self._counts: list[Tensor] = []  # results of the rules in this training step
        self._steps_since_refresh = 0
        self._bare = True  # no curvature, and no state that was there before the first step
        self._stepped = self._warned = False

    def _with_gradients(self) -> Iterator[Work]:
        self._bare &= self._stepped or not any(self.state.values())
        self._stepped = True
        return super()._with_gradients()

    def _is_a_step(self) -> bool:
        """Return whether a step is more than a way to have a state, as that of torch.distributed.checkpoint is.

        That is a first step with a rate and gradients of zero, which changes nothing; `step` stays zero.
        """
        groups = self.param_groups
        if not self._bare or any(self.state.values()) or any(group["lr"] != 0 for group in groups):
            return True
        grads = (p.grad for group in groups for p in group["params"] if p.grad is not None)
        return _any(grad != 0 for grad in grads)

    @property
    def numel(self) -> int:
        """The number of coordinates that the last training step updated on this rank, over all its `step` calls."""
        return sum(self._round.values())

    def _steps_made(self) -> int:
        """Return the largest step count of any parameter."""
        steps = [state["step"] for state in self.state.values() if "step" in state]
        return int(torch.stack([step.to(steps[0].device) for step in steps]).max()) if steps else 0

    def _begins_step(self, params: list[Tensor]) -> bool:
        """Return whether these parameters start a new training step.

        DeepSpeed calls `step` once per group or shard; a parameter that appears again starts the next training step.
        """
        begins = not self._round or not self._round.keys().isdisjoint(id(p) for p in params)
        if begins:
            self._round = {}
            self._steps_since_refresh += 1
        self._round.update((id(p), local(p).numel()) for p in params)
        if begins and not self._warned and self.param_groups[0]["hessian_interval"] is not None:
            self._warn_without_curvature(self.param_groups[0]["hessian_interval"])
        return begins

    def _warn_without_curvature(self, interval: int) -> None:
        """Warn at a first step without curvature, and when a refresh is overdue; once until the next refresh."""
        without = self._steps_since_refresh
        first = self._bare and self._starts_with_curvature and any(group["lr"] != 0 for group in self.param_groups)
        if not first and without <= interval:
            return
        self._warned = True
        effect, way_out = self._without_curvature
        warnings.warn(
            f"{without} step{'s' * (without > 1)} without update_hessian(), expected one before the first step and every "
            f"hessian_interval = {interval} steps: the curvature is stale, or zero if it was never set, which {effect}. "
            f"Call update_hessian() when hessian_due is true{way_out}.",
            RuntimeWarning,
            stacklevel=7,
        )

    def _curvature(
        self,
        num_predictions: int | Tensor | None,
        estimates: Iterable[Tensor | None] | None,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> Iterator[Work]:
        """Check the arguments and yield the work of a refresh: gradients if num_predictions is given, else estimates.

        After an overflow, warn and yield nothing.
        """
        if self.param_groups[0]["hessian_interval"] is None:
            raise RuntimeError(
                "update_hessian() was called with hessian_interval=None, which means a run without curvature: "
                "pass hessian_interval=10 to the constructor"
            )
        if (num_predictions is None) == (estimates is None):
            raise TypeError(
                f"update_hessian() got {'neither' if estimates is None else 'both'} of num_predictions and "
                "estimates, expected exactly one: num_predictions=N, the number of sampled tokens, when .grad "
                "holds the gradient of their mean loss; estimates=[…] for any other estimator"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        if estimates is None:
            _check_num_predictions(num_predictions)
            values = _gradients(params)
        else:
            values = _checked_estimates(params, list(estimates))
        scale: Tensor | None = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            if not _all_finite(values.values()):
                warnings.warn(
                    "the curvature estimate overflowed under loss scaling: this refresh is skipped and h keeps its "
                    "last value. The scaler lowers its scale when a training step overflows; if this recurs, use a "
                    "smaller init_scale.",
                    RuntimeWarning,
                    stacklevel=5,
                )
                return
            scale = torch.tensor(grad_scaler.get_scale(), device="cpu")
        yield from self._work(values, scale)
        self._steps_since_refresh = 0
        self._bare = self._warned = False


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Return the closure's loss, computed with gradients enabled, or None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def advance(states: list[dict[str, Tensor]], key: str, found_inf: Tensor | None) -> None:
    """Add 1 to the 0-D count state[key], or 0 if found_inf is 1.

    The counts start on the CPU and move permanently to the device of found_inf, so that the host does not wait for it.
    """
    if found_inf is not None:
        for state in states:
            state[key] = state[key].to(found_inf.device, non_blocking=True)
    counts = [state[key] for state in states]
    if counts[0].device.type == "cpu":  # as torch.optim: a Python number would become a new tensor for each count
        torch._foreach_add_(counts, _count(1))
    else:
        torch._foreach_add_(counts, 1)
    if found_inf is not None:
        torch._foreach_sub_(counts, [found_inf.to(counts[0].dtype)] * len(counts))


def _count(value: float) -> Tensor:
    """Return a count as it starts: on the CPU, whatever the default device."""
    return torch.full((), value, dtype=torch.float32, device="cpu")


def _zeros_like(p: Tensor) -> Tensor:
    """Return zeros with the shape, layout and placement of p, in the dtype of the arithmetic."""
    dtype = torch.float32 if p.dtype in HALF else p.dtype
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def checked_grad(p: Tensor) -> Tensor:
    """Return p.grad in the placement of p. Raises RuntimeError for a sparse gradient."""
    grad = p.grad
    assert grad is not None
    if grad.is_sparse or grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} has layout {grad.layout}, expected a dense one: "
            "build the embedding with sparse=False, or optimize it with torch.optim.SparseAdam"
        )
    return _placed_like(p, grad)


def _placed_like(p: Tensor, value: Tensor) -> Tensor:
    if isinstance(p, DTensor) and isinstance(value, DTensor) and value.placements != p.placements:
        return value.redistribute(placements=p.placements)
    return value


def _gradients(params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    for index, p in enumerate(params):
        if p.grad is None and p.requires_grad:
            raise RuntimeError(
                f"parameter {index} of shape {tuple(p.shape)} has no gradient: run the backward of the "
                "curvature loss before update_hessian(), or set requires_grad=False if the parameter is not "
                "trained"
            )
    return {p: checked_grad(p) for p in params if p.grad is not None}


def _checked_estimates(params: Sequence[Tensor], estimates: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    if len(estimates) != len(params):
        raise ValueError(
            f"{len(estimates)} estimates for {len(params)} parameters, expected one for each, in the order of "
            "the parameters"
        )
    checked = {}
    for index, (p, estimate) in enumerate(zip(params, estimates, strict=True)):
        if estimate is None:
            if p.requires_grad:
                raise ValueError(
                    f"the estimate for parameter {index} of shape {tuple(p.shape)} is None, expected a tensor: "
                    "None is for parameters with requires_grad=False"
                )
            continue
        if estimate.shape != p.shape:
            raise ValueError(
                f"the estimate for parameter {index} has shape {tuple(estimate.shape)}, expected {tuple(p.shape)}: "
                "give the estimates in the order of the parameters"
            )
        if estimate.device != p.device or estimate.layout is not torch.strided:
            raise ValueError(
                f"the estimate for parameter {index} of shape {tuple(p.shape)} is on {estimate.device} with layout "
                f"{estimate.layout}, expected a dense tensor on {p.device}: use .to({str(p.device)!r}) or .to_dense()"
            )
        if isinstance(p, DTensor) != isinstance(estimate, DTensor):
            raise TypeError(
                f"the estimate for parameter {index} is a {type(estimate).__name__}, expected a {type(p).__name__} "
                "like the parameter: use torch.distributed.tensor.distribute_tensor, or "
                "build the estimate from p.grad and sophia.random.normals_like(p, …)"
            )
        checked[p] = _placed_like(p, estimate)
    return checked


def _all_finite(values: Iterable[Tensor]) -> bool:
    return not _any(value.isfinite().logical_not() for value in values)


def _any(masks: Iterable[Tensor]) -> bool:
    """Return whether a mask has a true entry, on all ranks that share a DTensor. Synchronizes the device."""
    counts = [mask.sum() for mask in masks]
    return any(int(count.full_tensor() if isinstance(count, DTensor) else count) for count in counts)


def _check_num_predictions(num_predictions: object) -> None:
    if isinstance(num_predictions, Tensor):
        if num_predictions.dim() != 0:
            raise ValueError(
                f"num_predictions is a tensor of shape {tuple(num_predictions.shape)}, expected an integer or a 0-D "
                "tensor: the number of sampled tokens"
            )
        if num_predictions.dtype == torch.bool:
            raise ValueError("num_predictions is a tensor of dtype torch.bool, expected the number of sampled tokens")
    elif not _is_integer(num_predictions) or num_predictions < 1:
        raise ValueError(
            f"num_predictions = {num_predictions!r}, expected an integer >= 1: the number of tokens (not sequences) "
            "whose labels were sampled, over all micro-batches and ranks"
        )


def check_number(
    group: dict[str, Any], name: str, remedy: str, *, positive: bool = False, least: float = 0.0, tensor: bool = True
) -> None:
    """Raise ValueError unless group[name] is a finite number >= least, or > 0 if `positive`.

    A 0-D tensor, if one may be given, is not checked: reading it would stall the device. NumPy's numbers become float:
    torch.load refuses them in a state_dict.
    """
    value = group[name]
    if isinstance(value, Tensor) and tensor:
        if value.dim() != 0:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}, expected a number or a 0-D tensor")
        return
    if not _is_number(value) or not least <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name} = {value!r}, expected a number {'> 0' if positive else f'>= {least:.3g}'}: {remedy}")
    group[name] = _plain(value)


def check_betas(group: dict[str, Any]) -> None:
    """Raise ValueError unless group["betas"] is a pair of numbers in [0, 1). NumPy's numbers become float."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas = {betas!r}, expected a pair such as (0.96, 0.99)")
    for index, beta in enumerate(betas):
        if not _is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] = {beta!r}, expected a number in [0, 1): 1 would ignore all new values")
    group["betas"] = (tuple if isinstance(betas, tuple) else list)(map(_plain, betas))


def check_interval(group: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless group["hessian_interval"] is an integer >= 1 or None, and equals the first group's.

    NumPy's integers become int: torch.load refuses them in a state_dict.
    """
    interval, first = group["hessian_interval"], groups[0]["hessian_interval"]
    if interval is not None and (not _is_integer(interval) or interval < 1):
        raise ValueError(
            f"hessian_interval = {interval!r}, expected an integer >= 1: the paper uses 10; "
            "None is for a run without curvature"
        )
    if interval != first:
        raise ValueError(
            f"hessian_interval = {interval!r} in one group and {first!r} in another, expected one value: "
            "set it in the constructor, not per group"
        )
    group["hessian_interval"] = None if interval is None else int(interval)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _plain(value: float) -> float:
    return value if type(value) in (int, float) else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
