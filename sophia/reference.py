"""The numerics of the authors' published code (github.com/Liuhong99/Sophia, sophia.py and train_sophiag.py).

Use it to reproduce old runs. It differs from the paper, and from `SophiaG`:

- the denominator is ρ·bs·h + 1e-15 instead of max(γh, ε), so γ = ρ·bs/N with a *constant* bs, whatever the estimate's N;
- h averages ĝ ⊙ ĝ without N, so its history becomes wrong when the batch size changes;
- h is refreshed *after* the steps t with t mod k == 0, at the updated weights: the first k steps have h = 0;
- the estimator's gradient is clipped to norm 1, so h depends on the norm of the full gradient;
- β1 = 0.965.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sophia.elementwise import ParamsT, check_number
from sophia.kernels import Rule, Scalar, descend, fold, unscaled, updates
from sophia.sophia import Sophia


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
    """θ ← θ - ηλθ - η · sign(m) · min(|m| / (ρ·bs·h + 1e-15), 1)   (sophia.py, _single_tensor_sophiag)."""
    fold(exp_avg, unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma + eps
    descend(param, exp_avg.sign() * (exp_avg.abs() / curvature).clamp_max(1), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


class ReferenceSophiaG(Sophia):
    """Sophia-G as in the authors' code.

        for step in range(1, steps + 1):
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.hessian_due:                    # after the steps k, 2k, …
                gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
                optimizer.update_hessian()               # clips .grad to estimator_clip first
                optimizer.zero_grad()

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η.
        betas: (β1, β2).
        rho: ρ.
        bs: the constant in ρ·bs; the authors' training script uses total batch size × block size, in tokens.
        weight_decay: λ.
        hessian_interval: k.
        estimator_clip: the maximum norm of .grad, clipped before squaring.
    """

    _rules: ClassVar[dict[bool, Rule]] = {True: sophia_reference_update}
    _starts_with_curvature = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        bs: int = 5120,
        weight_decay: float = 0.1,
        hessian_interval: int = 10,
        estimator_clip: float = 1.0,
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        given = {"rho": rho, "bs": bs, "estimator_clip": estimator_clip}
        for name in given:
            check_number(given, name, "the authors use 0.04, 5120 and 1", positive=True, tensor=False)
        self._estimator_clip = estimator_clip
        super().__init__(
            params, lr, betas, rho * bs, 1e-15, weight_decay, hessian_interval, foreach=foreach, compile=compile
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_estimator_clip": self._estimator_clip}

    @property
    def hessian_due(self) -> bool:
        """True after the steps t with t mod k == 0."""
        return self._steps_made() > 0 and super().hessian_due

    def update_hessian(self, num_predictions: Any = None, *, estimates: Any = None, grad_scaler: Any = None) -> None:
        """h ← β2 h + (1-β2) ĝ ⊙ ĝ with ĝ from .grad, clipped in place. Takes no argument: bs replaces N.

        Raises TypeError for any argument, RuntimeError for a parameter without a gradient.
        """
        if num_predictions is not None or estimates is not None or grad_scaler is not None:
            raise TypeError(
                "ReferenceSophiaG.update_hessian() takes no argument: as in the authors' code, bs replaces N"
            )
        torch.nn.utils.clip_grad_norm_(
            [p for group in self.param_groups for p in group["params"]], self._estimator_clip
        )
        super().update_hessian(num_predictions=1)
