"""What optimizers with a diagonal curvature estimate share: when a new estimate is due, and how it enters the state."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sophia.elementwise import ElementwiseOptimizer, advance, checked_grad, state_like
from sophia.kernels import local


class SecondOrderOptimizer(ElementwiseOptimizer):
    """State of `exp_avg`, `hessian` and `step`; estimates come in by `update_hessian` every `hessian_interval` steps."""

    def _set_transient_attributes(self) -> None:
        self._round: dict[int, int] = {}  # id(parameter) -> coordinates, since the training step began
        self._steps_since_refresh = 0
        self._warned = False

    def _validate_group(self, group: dict[str, Any]) -> None:
        interval, first = group["hessian_interval"], self.param_groups[0]["hessian_interval"]
        if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise ValueError(
                f"hessian_interval = {interval!r}, expected an integer >= 1: the paper uses 10; "
                "None is for a run without curvature"
            )
        if interval != first:
            raise ValueError(
                f"hessian_interval = {interval!r} in one group and {first!r} in another, expected one value: "
                "set it in the constructor, not by group"
            )

    @property
    def hessian_due(self) -> bool:
        """True before the steps t = 1, 2, … with (t-1) mod k == 0; t-1 is the largest step count of a parameter.

        For plain loops. A step that an overflow held back does not advance t, so the same step stays due; a loop that
        counts such steps decides by its own counter. The step counts live on the CPU, unless loss scaling has moved
        them to the device: then reading this property waits for the device.
        """
        interval = self.param_groups[0]["hessian_interval"]
        if interval is None:
            return False
        steps = [state["step"] for state in self.state.values() if "step" in state]
        return not steps or int(torch.stack([step.to(steps[0].device) for step in steps]).max()) % interval == 0

    @property
    def numel(self) -> int:
        """Coordinates on this rank that the last training step has updated, over all its calls of `step`."""
        return sum(self._round.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure.

        Raises RuntimeError for a sparse gradient. Warns once when k steps have passed without `update_hessian`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._enter_round(params)
                states = [self._state(p, group) for p in params]
                grad_scale, found_inf = self._amp(local(params[0]).device)
                advance(states, "step", found_inf)
                grads = [local(checked_grad(p)) for p in params]
                self._step_group(group, [local(p) for p in params], grads, states, grad_scale, found_inf)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        raise NotImplementedError

    def _enter_round(self, params: list[Tensor]) -> None:
        """One training step may be several calls of `step`, as DeepSpeed makes them, one for each group or shard: a
        parameter met again begins the next."""
        is_next = not self._round.keys().isdisjoint(id(p) for p in params)
        if is_next or not self._round:
            self._round = {}
            self._steps_since_refresh += 1
            self._begin_round()
        self._round.update((id(p), local(p).numel()) for p in params)
        interval = self.param_groups[0]["hessian_interval"]
        if interval is not None and self._steps_since_refresh > interval and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._steps_since_refresh} steps without update_hessian(), expected one every hessian_interval = "
                f"{interval} steps: the curvature is stale or, if none ever came, zero, which makes Sophia momentum-sign "
                "descent. Call update_hessian() when hessian_due is true; hessian_interval=None is for a run without "
                "curvature.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _begin_round(self) -> None:
        """Called at the first call of `step` in each training step."""

    @torch.no_grad()
    def update_hessian(
        self,
        num_predictions: int | Tensor | None = None,
        *,
        estimates: Sequence[Tensor | None] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Take in a curvature estimate ĥ, made at the weights before the step. Give exactly one of the first two.

        Args:
            num_predictions: N, for ĥ = N · g ⊙ g, where .grad holds g, the gradient of the *mean* loss over N
                predictions with labels sampled from the model (Gauss-Newton-Bartlett). N counts tokens, not sequences,
                over all micro-batches and ranks; g must not be clipped. An integer, or a 0-D tensor that is not read
                back.
            estimates: ĥ for each parameter, in the order of the parameters and in their shapes (a DTensor for a
                DTensor parameter); None only for a parameter that does not require a gradient.
            grad_scaler: the scaler of the loss behind g or ĥ: its scale is divided out before squaring, and on an
                overflow h stays as it is, with a warning. This reads one number back to the host. Without it the
                attributes `grad_scale` and `found_inf` hold, if they are set.

        Raises:
            TypeError: none or both of num_predictions and estimates; a plain estimate for a DTensor parameter.
            ValueError: N < 1, a wrong number of estimates, or one of the wrong shape.
            RuntimeError: a parameter without a gradient, or hessian_interval is None.
        """
        if self._refresh(num_predictions, estimates, grad_scaler):
            self._steps_since_refresh = 0

    def _refresh(
        self,
        num_predictions: int | Tensor | None,
        estimates: Sequence[Tensor | None] | None,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> bool:  # whether the estimate came in; an overflow that only the device knows of counts as true
        if self.param_groups[0]["hessian_interval"] is None:
            raise RuntimeError(
                "update_hessian() of an optimizer with hessian_interval=None, which means a run without curvature: "
                "give the constructor hessian_interval=10"
            )
        if (num_predictions is None) == (estimates is None):
            raise TypeError(
                f"update_hessian() got {'neither' if estimates is None else 'both'} of num_predictions and "
                "estimates, expected exactly one: num_predictions=N, the number of sampled tokens, when .grad "
                "holds the gradient of their mean loss; estimates=[…] for any other estimator"
            )
        if estimates is None:
            _check_num_predictions(num_predictions)
            values = self._gradients()
        else:
            values = self._checked_estimates(estimates)
        scale: Tensor | None = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            if not _all_finite(values.values()):
                warnings.warn(
                    "the curvature estimate overflowed under loss scaling: this refresh is skipped and h keeps its "
                    "last value. The scaler lowers its scale when a training step overflows; if this recurs, start "
                    "from a smaller init_scale.",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return False
            scale = torch.tensor(grad_scaler.get_scale())
        for group in self.param_groups:
            params = [p for p in group["params"] if p in values]
            if not params:
                continue
            device = local(params[0]).device
            grad_scale, found_inf = self._amp(device) if scale is None else (scale.to(device), None)
            self._update_group(
                group,
                [self._state(p, group) for p in params],
                [local(values[p]) for p in params],
                num_predictions,
                grad_scale,
                found_inf,
            )
        return True

    def _update_group(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        values: list[Tensor],  # .grad if num_predictions is given, else ĥ
        num_predictions: int | Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        raise NotImplementedError

    def _gradients(self) -> dict[Tensor, Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            if p.grad is None and p.requires_grad:
                raise RuntimeError(
                    f"parameter {index} of shape {tuple(p.shape)} has no gradient: run the backward of the "
                    "curvature loss before update_hessian(), or set requires_grad=False if the parameter is not "
                    "trained"
                )
        return {p: checked_grad(p) for p in params if p.grad is not None}

    def _checked_estimates(self, estimates: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
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
            if isinstance(p, DTensor) != isinstance(estimate, DTensor):
                raise TypeError(
                    f"the estimate for parameter {index} is a {type(estimate).__name__} and the parameter a "
                    f"{type(p).__name__}, expected the same: use torch.distributed.tensor.distribute_tensor, or "
                    "build the estimate from p.grad and sophia.random.normals_like(p, …)"
                )
            if isinstance(p, DTensor) and isinstance(estimate, DTensor) and estimate.placements != p.placements:
                estimate = estimate.redistribute(placements=p.placements)
            checked[p] = estimate
        return checked

    def _state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = state_like(p)
            state["hessian"] = state_like(p)
        return state


def _all_finite(values: Iterable[Tensor]) -> bool:
    """Whether every value is finite, on all ranks that share a DTensor; waits for the device."""
    bad = [value.isfinite().logical_not().sum() for value in values]
    return not any(int(count.full_tensor() if isinstance(count, DTensor) else count) for count in bad)


def _check_num_predictions(num_predictions: object) -> None:
    if isinstance(num_predictions, Tensor):
        if num_predictions.dim() != 0:
            raise ValueError(
                f"num_predictions is a tensor of shape {tuple(num_predictions.shape)}, expected an integer or a 0-D "
                "tensor: the number of sampled tokens"
            )
    elif isinstance(num_predictions, bool) or not isinstance(num_predictions, int) or num_predictions < 1:
        raise ValueError(
            f"num_predictions = {num_predictions!r}, expected an integer >= 1: the number of tokens (not sequences) "
            "whose labels were sampled, over all micro-batches and ranks"
        )
