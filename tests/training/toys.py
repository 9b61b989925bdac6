"""Optimizers as people write them: state that is no tensor, and state that no checkpoint can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Counting(Optimizer):
    """Averages gradients; its steps depend on an int count, a float average, a flag and a None that are kept per
    parameter, and on a number that is kept per group."""

    def __init__(self, params: Any, lr: float = 1e-2, *, in_groups: bool = True) -> None:
        super().__init__(params, {"lr": lr})
        self.in_groups = in_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self.in_groups:
                group["total"] = group.get("total", 0.0) + group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, ema=0.0, limit=None, warm=True, exp_avg=torch.zeros_like(parameter))
                state["step"] += 1
                state["ema"] += 0.3 * (1 / state["step"] - state["ema"])
                state["warm"] = state["step"] < 12
                state["exp_avg"].lerp_(parameter.grad, 1 / state["step"])
                size = state["ema"] + group.get("total", 0.0) + 0.1 * state["warm"]
                parameter.add_(state["exp_avg"], alpha=-group["lr"] * size)


class Keeping(Optimizer):
    """Keeps whatever it is given, for each parameter, in its state by key, or in its groups."""

    def __init__(self, params: Any, make: Any, *, where: str = "state", key: Any = "kept") -> None:
        super().__init__(params, {"lr": 1e-3})
        self.make, self.where, self.key = make, where, key

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self.where == "group":
                group[self.key] = self.make(group["params"][0])
            for parameter in group["params"]:
                if self.where == "state":
                    self.state[parameter][self.key] = self.make(parameter)
        if self.where == "optimizer":
            self.state[self.key] = self.make(None)  # type: ignore[index]
