"""Optimizers for the tests of `check_optimizer`: each has one fault, but Descent and PredictionsAlone are sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sophia import SophiaG


class SignMomentum(SophiaG):
    """Posing as Sophia: it takes the estimates and never uses them, as eight public ports do."""

    def update_hessian(self, num_predictions: Any = None, *, estimates: Any = None, grad_scaler: Any = None) -> None:
        pass


class SquaredTrainingGradient(SophiaG):
    """The curvature is the square of the training gradient, at every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and "hessian" in self.state[p]:
                    self.state[p]["hessian"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
        return super().step(closure)


class PredictionsAlone(SophiaG):
    """Sound: the run's estimator gives no estimates."""

    def update_hessian(self, num_predictions: Any) -> None:  # type: ignore[override]
        super().update_hessian(num_predictions)


class Descent(torch.optim.Optimizer):
    """Gradient descent with momentum: the sound base of the faults below."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.gradient(p, group), group)

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        return p.grad

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        buffer = self.buffer(p)
        buffer.mul_(group["momentum"]).add_(grad)
        p.mul_(1 - self.rate(group) * group["weight_decay"]).add_(buffer, alpha=-self.rate(group))

    def buffer(self, p: Tensor) -> Tensor:
        return self.state[p].setdefault("momentum", torch.zeros_like(p))  # type: ignore[no-any-return]

    def rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])


class IgnoredSchedule(Descent):
    """It keeps the rate of its constructor."""

    def __init__(self, params: Any, lr: float = 0.1, **others: Any) -> None:
        super().__init__(params, lr, **others)
        self._lr = lr

    def rate(self, group: dict[str, Any]) -> float:
        return self._lr


class LostState(Descent):
    """Its momentum is not in `state`."""

    def buffer(self, p: Tensor) -> Tensor:
        if not hasattr(self, "_buffers"):
            self._buffers: dict[Tensor, Tensor] = {}
        return self._buffers.setdefault(p, torch.zeros_like(p))


class CoupledDecay(Descent):
    """L2 in the gradient, before an adaptive step."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        buffer = self.buffer(p)
        buffer.mul_(group["momentum"]).add_(grad + group["weight_decay"] * p)
        p.add_(buffer.sign(), alpha=-1e-2 * self.rate(group))


class SharedNoise(Descent):
    """Noise from torch's generator: the same on every shard, and other after a resumption."""

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        return p.grad * (1 + 0.1 * torch.randn_like(p))


class Waiting(Descent):
    """It reads a number of each tensor back to the host."""

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        return p.grad / max(1.0, p.grad.norm().item())
