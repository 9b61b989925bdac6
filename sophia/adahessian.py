"""AdaHessian: Adam with squared Hutchinson estimates instead of squared gradients in its second moment.

Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "AdaHessian: An Adaptive Second Order Optimizer for Machine Learning",
AAAI 2021. This implementation omits spatial averaging, which depends on the layer type and mixes coordinates.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.elementwise import (
    COUNTS,
    SMALLEST,
    CurvatureOptimizer,
    ParamsT,
    advance,
    check_betas,
    check_interval,
    check_number,
    evaluated,
)
from sophia.kernels import Scalar, apply, descend, fold, unscaled, updates
from sophia.sophia import refresh_due


@updates(0, 2)
def adahessian_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) v, the average of ĥ ⊙ ĥ, read only
    lr: Scalar,  # () η
    beta1: Scalar,  # ()
    eps: Scalar,  # () ε
    weight_decay: Scalar,  # () λ
    correction1: Scalar,  # () 1 - β1^t
    correction2: Scalar,  # () 1 - β2^n after n estimates
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """m ← β1 m + (1-β1) g;  θ ← θ - ηλθ - η · m̂ / (√v̂ + ε)   (Yao et al. 2021, Algorithm 1, Hessian power 1)."""
    fold(exp_avg, unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    update = (exp_avg / correction1) / ((hessian / correction2).sqrt() + eps)
    descend(param, update, lr, weight_decay, found_inf)


@updates(0)
def squared_hessian_update(
    hessian: Tensor,  # (*) v, updated in place
    estimate: Tensor,  # (*) ĥ
    beta2: Scalar,  # ()
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """v ← β2 v + (1-β2) ĥ ⊙ ĥ   (Yao et al. 2021, equation 10)."""
    estimate = unscaled(estimate, hessian, grad_scale)
    fold(hessian, estimate * estimate, beta2, found_inf)


class AdaHessian(CurvatureOptimizer):
    """AdaHessian with Hessian power 1 and bias correction.

        m ← β1 m + (1-β1) g;  v ← β2 v + (1-β2) ĥ ⊙ ĥ;  θ ← θ - ηλθ - η · m̂ / (√v̂ + ε)

    with m̂ = m / (1 - β1^t) and v̂ = v / (1 - β2^n) after n estimates. As with `Sophia`, call
    `update_hessian(estimates=hutchinson(…))` every `hessian_interval` steps.

    State per parameter: `exp_avg` (m) and `hessian` (v), in the parameter's shape; `step` (t) and `hessian_step` (n),
    0-D float32 tensors.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor.
        betas: (β1, β2), the decay rates of the momentum and of the squared curvature.
        eps: ε, added to √v̂.
        weight_decay: λ, decoupled weight decay, multiplied by η.
        hessian_interval: k, the number of steps between curvature estimates.
        foreach: as in `Sophia`.
        compile: as in `Sophia`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: a parameter is complex or integer.
    """

    _state_names = ("step", "exp_avg", "hessian", "hessian_step")
    _without_curvature = ("makes AdaHessian divide by eps alone", "")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_interval: int = 1,
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_interval": hessian_interval,
        }
        super().__init__(params, defaults, foreach=foreach, compile=compile)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 0.15")
        check_betas(group)
        check_number(group, "eps", "the paper uses 1e-4", least=SMALLEST)
        check_number(group, "weight_decay", "0 switches it off")
        if group["hessian_interval"] is None:
            raise ValueError(
                "hessian_interval = None, expected an integer >= 1: AdaHessian cannot step without curvature"
            )
        check_interval(group, self.param_groups)

    @property
    def hessian_due(self) -> bool:
        """True before the steps t with (t-1) mod k == 0, as in `Sophia`."""
        return refresh_due(self._steps_made() + 1, self.param_groups[0]["hessian_interval"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def update_hessian(
        self,
        num_predictions: None = None,
        *,
        estimates: Iterable[Tensor | None] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Fold ĥ of each parameter into v. Arguments as in `Sophia`, but `num_predictions` raises TypeError."""
        if num_predictions is not None:
            raise TypeError(
                f"AdaHessian.update_hessian() got num_predictions={num_predictions}, expected estimates=[…]: it "
                "averages the squared Hessian diagonal, which hutchinson() estimates"
            )
        for group, _, values, states, amp in self._curvature(None, estimates, grad_scaler):
            advance(states, "hessian_step", amp.found_inf)
            tensors = [[state["hessian"] for state in states], values]
            apply(squared_hessian_update, tensors, [group["betas"][1]], self._form, amp)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, as in `Sophia`."""
        loss = evaluated(closure)
        work, counted = self._with_gradients(), self._is_a_step()
        for group, params, grads, states, amp in work:
            self._begins_step(params)
            if counted:
                advance(states, "step", amp.found_inf)
            (beta1, beta2), eps = group["betas"], group["eps"]
            for same in _by_counts(states):
                # At count 0, m or v is zero, and dividing by the correction of count 1 avoids 0/0.
                t, n = (states[same[0]][name].double().clamp_min(1) for name in COUNTS)
                rows = [(params[i], grads[i], states[i]["exp_avg"], states[i]["hessian"]) for i in same]
                hyper = [group["lr"], beta1, eps, group["weight_decay"], 1 - beta1**t, 1 - beta2**n]
                apply(adahessian_update, list(zip(*rows, strict=True)), hyper, self._form, amp)
        return loss


def _by_counts(states: Sequence[dict[str, Tensor]]) -> Iterable[list[int]]:
    """Group the indices of states with the same counts; counts on a device, which are not read, are alone."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, state in enumerate(states):
        counts = [state[name] for name in COUNTS]
        known = all(count.device.type == "cpu" for count in counts)
        groups.setdefault(tuple(map(float, counts)) if known else ("on a device", index), []).append(index)
    return groups.values()
