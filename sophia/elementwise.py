"""What the optimizers of this package share: validation, state in float32, torch's protocol for loss scaling."""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from sophia.kernels import Form, local

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

HALF = (torch.bfloat16, torch.float16)

# The smallest ε: float32 rounds less to nothing, and 0 / 0 is a step of NaN.
SMALLEST = torch.finfo(torch.float32).tiny

# The 0-D float32 entries of a state: how many steps, and how many curvature estimates, it has taken in.
COUNTS = ("step", "hessian_step")


class ElementwiseOptimizer(Optimizer):
    """An optimizer whose update of a coordinate depends on that coordinate alone, so that shards of any shape work.

    State is kept per tensor and created at first use: float32 for parameters of half precision, otherwise the
    parameter's dtype. `step` may be called several times per training step on different groups, on empty groups,
    and with zero gradients; parameters without a gradient are left out.

    If the attributes `grad_scale` and `found_inf` (0-D float32 tensors or None) are set, as `torch.amp.GradScaler`
    does for torch's fused optimizers, the gradient is divided by the first, and where the second is 1 neither
    weights nor state change; no value is read back to the host.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        if foreach and compile:
            raise ValueError("foreach = True and compile = True, expected at most one: they are two forms of one step")
        self._form = Form(foreach, compile)
        super().__init__(params, defaults)
        self._set_transient_attributes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_form": self._form}

    def _set_transient_attributes(self) -> None:
        """Host-side counters that are no part of the state, set anew at construction and whenever a state is loaded."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_transient_attributes()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._validate_group(group)
            for index, p in enumerate(group["params"]):
                if not p.is_floating_point():
                    raise TypeError(
                        f"parameter {index} of shape {tuple(p.shape)} has dtype {p.dtype}, expected a real floating "
                        "dtype: pass torch.view_as_real(p) of a complex parameter"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _validate_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """grad_scale, and found_inf as 0.0 or 1.0, on the device of the parameters; the host does not wait for them."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = local(grad_scale).to(device, non_blocking=True)
        if found_inf is not None:  # a GradScaler adds up the flags of several devices
            found_inf = (local(found_inf) > 0).to(device, non_blocking=True)
            found_inf = found_inf.to(torch.float32 if device.type == "mps" else torch.float64)
        return grad_scale, found_inf

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but what torch casts to the parameter's dtype stays as it was: float32 for half precision,
        and the counts on their device."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in COUNTS:
                    self.state[p][key] = value.clone()
                elif p.dtype in HALF:
                    self.state[p][key] = value.to(device=p.device, dtype=torch.float32)


def widened(value: float | Tensor) -> float | Tensor:
    """A hyper-parameter with the precision of a Python float where it is a tensor, so that all forms of a rule compute
    with the same numbers. MPS, which lacks float64, keeps what it is given."""
    return value.double() if isinstance(value, Tensor) and value.device.type != "mps" else value


def state_like(p: Tensor) -> Tensor:
    """Zeros in the shape, layout and placement of p, in the dtype of the arithmetic."""
    dtype = torch.float32 if p.dtype in HALF else p.dtype
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def advance(states: list[dict[str, Tensor]], key: str, found_inf: Tensor | None) -> None:
    """Add 1 to the 0-D count state[key], but nothing where found_inf is 1.

    The counts live on the CPU, and move for good to the device of found_inf so that the host need not wait for it.
    """
    if found_inf is not None:
        for state in states:
            state[key] = state[key].to(found_inf.device, non_blocking=True)
    counts = [state[key] for state in states]
    if counts[0].device.type == "cpu":  # as torch.optim: a Python number would be wrapped into a tensor once per count
        torch._foreach_add_(counts, torch.ones(()))
    else:
        torch._foreach_add_(counts, 1)
    if found_inf is not None:
        torch._foreach_sub_(counts, [found_inf.to(counts[0].dtype)] * len(counts))


def checked_grad(p: Tensor) -> Tensor:
    """p.grad, dense and in the placement of p. Raises RuntimeError for a sparse gradient."""
    grad = p.grad
    assert grad is not None
    if grad.is_sparse or grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} has layout {grad.layout}, expected a dense one: "
            "build the embedding with sparse=False, or give its parameters to torch.optim.SparseAdam"
        )
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return grad


def check_number(
    group: Mapping[str, Any], name: str, remedy: str, *, positive: bool = False, least: float = 0.0
) -> None:
    """Raises ValueError that names the value, what was expected and the remedy, unless group[name] is a finite number
    >= least, or > 0. A 0-D tensor is taken on trust: reading it would stall the device."""
    value = group[name]
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}, expected a number or a 0-D tensor")
        return
    if not _is_number(value) or not least <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name} = {value!r}, expected a number {'> 0' if positive else f'>= {least:.3g}'}: {remedy}")


def check_betas(group: Mapping[str, Any]) -> None:
    """Raises ValueError unless group["betas"] is a pair of numbers in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas = {betas!r}, expected a pair such as (0.96, 0.99)")
    for index, beta in enumerate(betas):
        if not _is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] = {beta!r}, expected a number in [0, 1): with 1 nothing new comes in")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and value is not True and value is not False
