"""Lion: the sign of an interpolated momentum. Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS
2023."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sophia.elementwise import (
    ElementwiseOptimizer,
    ParamsT,
    check_betas,
    check_number,
    checked_grad,
    state_like,
    widened,
)
from sophia.kernels import apply, local
from sophia.rules import lion_update


class Lion(ElementwiseOptimizer):
    """u = sign(β1 m + (1-β1) g);  θ ← θ - η(u + λθ);  m ← β2 m + (1-β2) g.

    State per parameter: `exp_avg` (m), in the shape of the parameter. Defaults as in the Sophia paper's baseline.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor; a third to a tenth of AdamW's.
        betas: (β1, β2), the decay in the update and that of the momentum.
        weight_decay: λ, decoupled from the gradient and multiplied by η.
        foreach, compile: the form of the step, as in `Sophia`.

    Raises:
        ValueError: a hyper-parameter out of its range, by name.
        TypeError: a complex or integer parameter.
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

    def _validate_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 1e-4")
        check_betas(group)
        check_number(group, "weight_decay", "try 0.2")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Raises RuntimeError for a sparse one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = state_like(p)
            apply(
                lion_update,
                [
                    [local(p) for p in params],
                    [local(checked_grad(p)) for p in params],
                    [local(self.state[p]["exp_avg"]) for p in params],
                ],
                [
                    widened(group["lr"]),
                    group["betas"][0],
                    group["betas"][1],
                    group["weight_decay"],
                    *self._amp(local(params[0]).device),
                ],
                self._form,
            )
        return loss
