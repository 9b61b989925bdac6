"""Lion: the sign of an interpolated momentum.

Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sophia.elementwise import ElementwiseOptimizer, ParamsT, check_betas, check_number, evaluated
from sophia.kernels import Scalar, apply, descend, fold, unscaled, updates


@updates(0, 2)
def lion_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    lr: Scalar,  # () η
    beta1: Scalar,  # () of the update
    beta2: Scalar,  # () of the momentum
    weight_decay: Scalar,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """θ ← θ - η (sign(β1 m + (1-β1) g) + λθ);  m ← β2 m + (1-β2) g   (Chen et al. 2023, Algorithm 2)."""
    grad = unscaled(grad, exp_avg, grad_scale)
    if found_inf is not None:
        grad = torch.where(found_inf > 0, exp_avg, grad)  # lr 0 times nan would still reach the weights
    descend(param, (exp_avg * beta1 + grad * (1 - beta1)).sign(), lr, weight_decay, found_inf)
    fold(exp_avg, grad, beta2, found_inf)


class Lion(ElementwiseOptimizer):
    """Lion, with the defaults of the Sophia paper's baseline.

        u = sign(β1 m + (1-β1) g);  θ ← θ - η(u + λθ);  m ← β2 m + (1-β2) g

    State per parameter: `exp_avg` (m), in the parameter's shape.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor; a third to a tenth of AdamW's.
        betas: (β1, β2), the interpolation in the update and the decay rate of the momentum.
        weight_decay: λ, decoupled weight decay, multiplied by η.
        foreach: as in `Sophia`.
        compile: as in `Sophia`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: a parameter is complex or integer.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.2,
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, foreach=foreach, compile=compile)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 1e-4")
        check_betas(group)
        check_number(group, "weight_decay", "try 0.2")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Raises RuntimeError for a sparse gradient."""
        loss = evaluated(closure)
        for group, params, grads, states, amp in self._with_gradients():
            tensors = [params, grads, [state["exp_avg"] for state in states]]
            apply(lion_update, tensors, [group["lr"], *group["betas"], group["weight_decay"]], self._form, amp)
        return loss
