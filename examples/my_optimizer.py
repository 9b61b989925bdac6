"""An optimizer of one's own for the challenge: AdamW, part of whose step is the sign of its momentum.

docs/challenge.md checks it, gives it the ranges of my_space.yaml, and runs it against tuned baselines.
"""

from collections.abc import Iterable
from typing import Any

import torch


class SignedAdam(torch.optim.Optimizer):
    """θ ← θ - lr · ((1 - blend) · m̂ / (√v̂ + ε) + blend · sign(m) + weight_decay · θ); blend = 0 is AdamW, 1 momentum-sign."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        blend: float = 0.2,
        eps: float = 1e-8,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "blend": blend, "eps": eps}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state, blend = self.state[p], group["blend"]
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                m.lerp_(p.grad, 1 - group["beta1"])
                v.lerp_(p.grad.square(), 1 - group["beta2"])
                adam = (m / (1 - group["beta1"] ** t)) / ((v / (1 - group["beta2"] ** t)).sqrt() + group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(adam, m.sign(), blend), alpha=-group["lr"])
