"""The update rules: one elementwise function per method, the only place where its arithmetic is written.

Each takes tensors of one shape, and its hyper-parameters as 0-D tensors, so that neither a schedule nor a
controller recompiles a compiled form. The hyper-parameters are float64: 1 - β2 then loses nothing.

The state (m, h) has the precision of the arithmetic: float32, also for bfloat16 and float16 parameters.
`grad_scale` () divides the gradient; `found_inf` (), 0 or 1, holds weights and state back, bit for bit, where it is
1. Either may be None.
"""

import torch
from torch import Tensor


def _unscaled(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None) -> Tensor:
    grad = grad.to(dtype)
    return grad if grad_scale is None else grad / grad_scale


def _average(
    average: Tensor,  # (*) updated in place
    value: Tensor,  # (*)
    weight: Tensor,  # () share of the new value
    found_inf: Tensor | None,  # ()
) -> None:
    """average ← (1 - weight) · average + weight · value; average + weight · (average - average) is exact, so
    nothing moves on an
    overflow."""
    average.lerp_(value if found_inf is None else torch.where(found_inf > 0, average, value), weight)


def _descend(
    param: Tensor,  # (*) updated in place
    update: Tensor,  # (*)
    lr: Tensor,  # () η
    weight_decay: Tensor,  # () λ
    found_inf: Tensor | None,  # ()
) -> None:
    """θ ← θ - ηλθ - ηu, rounded once to the parameter's dtype."""
    if found_inf is not None:
        lr = lr * (1 - found_inf)
    param.copy_(param.to(update.dtype) * (1 - lr * weight_decay) - update * lr)


def sophia_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Tensor,  # () η
    beta1: Tensor,  # ()
    gamma: Tensor,  # () γ
    eps: Tensor,  # () ε
    weight_decay: Tensor,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int64, the number of coordinates with |m| < γh
    """m ← β1 m + (1-β1) g;  θ ← θ - ηλθ - η · clip(m / max(γh, ε), 1)   (Liu et al. 2024, Algorithm 3)."""
    _average(exp_avg, _unscaled(grad, exp_avg.dtype, grad_scale), 1 - beta1, found_inf)
    curvature = hessian * gamma
    _descend(param, (exp_avg / curvature.clamp_min(eps)).clamp(-1, 1), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum()


def sophia_unclipped_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Tensor,  # () η
    beta1: Tensor,  # ()
    gamma: Tensor,  # () γ
    eps: Tensor,  # () ε
    weight_decay: Tensor,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int64, the number of coordinates with |m| < γh
    """`sophia_update` without its clip, the paper's ablation: θ ← θ - ηλθ - η · m / max(γh, ε)."""
    _average(exp_avg, _unscaled(grad, exp_avg.dtype, grad_scale), 1 - beta1, found_inf)
    curvature = hessian * gamma
    _descend(param, exp_avg / curvature.clamp_min(eps), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum()


def gauss_newton_update(
    hessian: Tensor,  # (*) h, updated in place
    grad: Tensor,  # (*) ĝ, the gradient of the mean loss of sampled labels
    num_predictions: Tensor,  # () N
    weight: Tensor,  # () 1 - β2
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """h ← β2 h + (1-β2) N ĝ ⊙ ĝ   (Liu et al. 2024, Algorithm 2 and Algorithm 3)."""
    grad = _unscaled(grad, hessian.dtype, grad_scale)
    _average(hessian, grad * grad * num_predictions, weight, found_inf)


def hessian_update(
    hessian: Tensor,  # (*) h, updated in place
    estimate: Tensor,  # (*) ĥ
    weight: Tensor,  # () 1 - β2
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """h ← β2 h + (1-β2) ĥ   (Liu et al. 2024, Algorithm 3). ĥ is linear in the loss, so `grad_scale` divides it
    once."""
    _average(hessian, _unscaled(estimate, hessian.dtype, grad_scale), weight, found_inf)


def lion_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    lr: Tensor,  # () η
    beta1: Tensor,  # () of the update
    beta2: Tensor,  # () of the momentum
    weight_decay: Tensor,  # () λ
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """θ ← θ - η (sign(β1 m + (1-β1) g) + λθ);  m ← β2 m + (1-β2) g   (Chen et al. 2023, Algorithm 2)."""
    grad = _unscaled(grad, exp_avg.dtype, grad_scale)
    _descend(param, (exp_avg * beta1 + grad * (1 - beta1)).sign(), lr, weight_decay, found_inf)
    _average(exp_avg, grad, 1 - beta2, found_inf)


def adahessian_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) v, the average of ĥ ⊙ ĥ, read only
    lr: Tensor,  # () η
    beta1: Tensor,  # ()
    eps: Tensor,  # () ε
    weight_decay: Tensor,  # () λ
    correction1: Tensor,  # () 1 - β1^t
    correction2: Tensor,  # () 1 - β2^n after n estimates
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """m ← β1 m + (1-β1) g;  θ ← θ - ηλθ - η · m̂ / (√v̂ + ε)   (Yao et al. 2021, Algorithm 1, Hessian power 1)."""
    _average(exp_avg, _unscaled(grad, exp_avg.dtype, grad_scale), 1 - beta1, found_inf)
    update = (exp_avg / correction1) / ((hessian / correction2).sqrt() + eps)
    _descend(param, update, lr, weight_decay, found_inf)


def squared_hessian_update(
    hessian: Tensor,  # (*) v, updated in place
    estimate: Tensor,  # (*) ĥ
    weight: Tensor,  # () 1 - β2
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """v ← β2 v + (1-β2) ĥ ⊙ ĥ   (Yao et al. 2021, equation 10)."""
    estimate = _unscaled(estimate, hessian.dtype, grad_scale)
    _average(hessian, estimate * estimate, weight, found_inf)
