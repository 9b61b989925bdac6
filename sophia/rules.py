"""The update rules: one elementwise function per method, the only place where its arithmetic is written.

Each takes tensors of one shape, then hyper-parameters: floats, or 0-D float64 tensors (a compiled form takes only
these, so that neither a schedule nor a controller compiles anew). `sophia.kernels` carries the rules out.

The arithmetic has the precision of the state (m, h): float32, also for bfloat16 and float16 parameters. `grad_scale` ()
divides the gradient; `found_inf` (), 0 or 1, holds weights and state back, bit for bit, where it is 1. Both may be
None.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Scalar = float | Tensor
F = TypeVar("F", bound=Callable[..., Tensor | None])


def updates(*indices: int) -> Callable[[F], F]:
    """Marks which tensor arguments a rule changes, in the attribute `updated`."""

    def mark(rule: F) -> F:
        rule.updated = indices  # type: ignore[attr-defined]
        return rule

    return mark


def _unscaled(
    grad: Tensor,  # (*) any floating dtype
    state: Tensor,  # (*) whose dtype the arithmetic has
    grad_scale: Tensor | None,  # ()
) -> Tensor:  # (*)
    grad = grad.to(state.dtype)
    # A division per coordinate would not hide behind memory beside Sophia's own; powers of 2 and 1 stay exact.
    return grad if grad_scale is None else grad * (1 / grad_scale)


def _average(
    average: Tensor,  # (*) updated in place
    value: Tensor,  # (*)
    decay: Scalar,  # () β
    found_inf: Tensor | None,  # ()
) -> None:
    """average ← β average + (1-β) value. Not lerp_, which rounds otherwise where it is compiled."""
    new = average * decay + value * (1 - decay)
    average.copy_(new if found_inf is None else torch.where(found_inf > 0, average, new))


def _descend(
    param: Tensor,  # (*) updated in place
    update: Tensor,  # (*)
    lr: Scalar,  # () η
    weight_decay: Scalar,  # () λ
    found_inf: Tensor | None,  # ()
) -> None:
    """θ ← θ - ηλθ - ηu, rounded once to the parameter's dtype."""
    if found_inf is not None:
        lr = lr * (1 - found_inf)
    param.copy_(param.to(update.dtype) * (1 - lr * weight_decay) - update * lr)


@updates(0, 2)
def sophia_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Scalar,  # () η
    beta1: Scalar,  # ()
    gamma: Scalar,  # () γ
    eps: Scalar,  # () ε
    weight_decay: Scalar,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int32, the number of coordinates with |m| < γh
    """m ← β1 m + (1-β1) g;  θ ← θ - ηλθ - η · clip(m / max(γh, ε), 1)   (Liu et al. 2024, Algorithm 3)."""
    _average(exp_avg, _unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma
    _descend(param, (exp_avg / curvature.clamp_min(eps)).clamp(-1, 1), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


@updates(0, 2)
def sophia_unclipped_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Scalar,  # () η
    beta1: Scalar,  # ()
    gamma: Scalar,  # () γ
    eps: Scalar,  # () ε
    weight_decay: Scalar,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int32, the number of coordinates with |m| < γh
    """`sophia_update` without its clip, the paper's ablation: θ ← θ - ηλθ - η · m / max(γh, ε)."""
    _average(exp_avg, _unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma
    _descend(param, exp_avg / curvature.clamp_min(eps), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


@updates(0, 2)
def sophia_reference_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Scalar,  # () η
    beta1: Scalar,  # ()
    gamma: Scalar,  # () ρ·bs
    eps: Scalar,  # () 1e-15
    weight_decay: Scalar,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int32, the number of coordinates with |m| < ρ·bs·h + 1e-15
    """θ ← θ - ηλθ - η · sign(m) · min(|m| / (ρ·bs·h + 1e-15), 1), the authors' code (sophia.py,
    _single_tensor_sophiag)."""
    _average(exp_avg, _unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma + eps
    _descend(param, exp_avg.sign() * (exp_avg.abs() / curvature).clamp_max(1), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


@updates(0)
def gauss_newton_update(
    hessian: Tensor,  # (*) h, updated in place
    grad: Tensor,  # (*) ĝ, the gradient of the mean loss of sampled labels
    num_predictions: Scalar,  # () N
    beta2: Scalar,  # ()
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """h ← β2 h + (1-β2) N ĝ ⊙ ĝ   (Liu et al. 2024, Algorithm 2 and Algorithm 3)."""
    grad = _unscaled(grad, hessian, grad_scale)
    _average(hessian, grad * grad * num_predictions, beta2, found_inf)


@updates(0)
def hessian_update(
    hessian: Tensor,  # (*) h, updated in place
    estimate: Tensor,  # (*) ĥ
    beta2: Scalar,  # ()
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """h ← β2 h + (1-β2) ĥ   (Liu et al. 2024, Algorithm 3). ĥ is linear in the loss, so `grad_scale` divides it
    once."""
    _average(hessian, _unscaled(estimate, hessian, grad_scale), beta2, found_inf)


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
    grad = _unscaled(grad, exp_avg, grad_scale)
    if found_inf is not None:
        grad = torch.where(found_inf > 0, exp_avg, grad)  # 0 · nan would reach the weights
    _descend(param, (exp_avg * beta1 + grad * (1 - beta1)).sign(), lr, weight_decay, found_inf)
    _average(exp_avg, grad, beta2, found_inf)


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
    _average(exp_avg, _unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    update = (exp_avg / correction1) / ((hessian / correction2).sqrt() + eps)
    _descend(param, update, lr, weight_decay, found_inf)


@updates(0)
def squared_hessian_update(
    hessian: Tensor,  # (*) v, updated in place
    estimate: Tensor,  # (*) ĥ
    beta2: Scalar,  # ()
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """v ← β2 v + (1-β2) ĥ ⊙ ĥ   (Yao et al. 2021, equation 10)."""
    estimate = _unscaled(estimate, hessian, grad_scale)
    _average(hessian, estimate * estimate, beta2, found_inf)
