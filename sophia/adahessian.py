"""AdaHessian: Adam with the average of squared Hutchinson estimates in place of the squared gradient.

Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "AdaHessian: An Adaptive Second Order Optimizer for Machine Learning",
AAAI 2021. Without its spatial averaging, which depends on the kind of the layer and would tie coordinates together.
"""

from typing import Any

import torch
from torch import Tensor

from sophia.elementwise import SMALLEST, ParamsT, advance, check_betas, check_number, widened
from sophia.kernels import apply, local
from sophia.rules import adahessian_update, squared_hessian_update
from sophia.second_order import SecondOrderOptimizer


class AdaHessian(SecondOrderOptimizer):
    """m ← β1 m + (1-β1) g;  v ← β2 v + (1-β2) ĥ ⊙ ĥ;  θ ← θ - ηλθ - η · m̂ / (√v̂ + ε), bias-corrected.

    State per parameter: `exp_avg` (m) and `hessian` (v), in the shape of the parameter; `step` (t) and
    `hessian_step`, the number n of estimates in v, 0-D float32 tensors: m̂ = m / (1 - β1^t), v̂ = v / (1 - β2^n).
    Estimates come in as in `Sophia`, by `update_hessian(estimates=hutchinson(…))` every `hessian_interval` steps.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor.
        betas: (β1, β2), the decays of the momentum and of the squared curvature.
        eps: ε, added to √v̂.
        weight_decay: λ, decoupled from the gradient and multiplied by η.
        hessian_interval: k, the steps from one estimate to the next.
        foreach, compile: the form of the step, as in `Sophia`.

    Raises:
        ValueError: a hyper-parameter out of its range, by name.
        TypeError: a complex or integer parameter.
    """

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

    def _validate_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 0.15")
        check_betas(group)
        check_number(group, "eps", "the paper uses 1e-4", least=SMALLEST)
        check_number(group, "weight_decay", "0 switches it off")
        if group["hessian_interval"] is None:
            raise ValueError(
                "hessian_interval = None, expected an integer >= 1: AdaHessian has no step without curvature"
            )
        super()._validate_group(group)

    def _state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super()._state(p, group)
        if "hessian_step" not in state:
            state["hessian_step"] = torch.zeros((), dtype=torch.float32)
        return state

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        lr, eps, weight_decay = widened(group["lr"]), group["eps"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        for p, grad, state in zip(params, grads, states, strict=True):
            # Where a count is still 0, m or v is zero whatever divides it: 1 avoids 0/0.
            correction1 = 1 - beta1 ** state["step"].double().clamp_min(1)
            correction2 = 1 - beta2 ** state["hessian_step"].double().clamp_min(1)
            apply(
                adahessian_update,
                [[p], [grad], [local(state["exp_avg"])], [local(state["hessian"])]],
                [lr, beta1, eps, weight_decay, correction1, correction2, grad_scale, found_inf],
                self._form,
            )

    def _update_group(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        values: list[Tensor],
        num_predictions: int | Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if num_predictions is not None:
            raise TypeError(
                f"update_hessian(num_predictions={num_predictions}) of AdaHessian, expected estimates=[…]: it "
                "averages the square of the Hessian's diagonal, which hutchinson() estimates"
            )
        advance(states, "hessian_step", found_inf)
        tensors = [[local(state["hessian"]) for state in states], values]
        apply(squared_hessian_update, tensors, [group["betas"][1], grad_scale, found_inf], self._form)
