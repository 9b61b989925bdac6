"""Sophia: descent along the momentum over an average of diagonal curvature estimates, clipped.

Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
ICLR 2024, arXiv 2305.14342. The rule itself is `sophia.rules.sophia_update`.
"""

from typing import Any

import torch
from torch import Tensor

from sophia.elementwise import SMALLEST, ParamsT, check_betas, check_number, widened
from sophia.kernels import Rule, apply, local
from sophia.rules import gauss_newton_update, hessian_update, sophia_unclipped_update, sophia_update
from sophia.second_order import SecondOrderOptimizer


class Sophia(SecondOrderOptimizer):
    r"""Sophia with any estimator of the diagonal Hessian.

    At step t = 1, 2, …, with m and h zero at the start and without bias correction:

        m ← β1 m + (1-β1) g
        h ← β2 h + (1-β2) ĥ              before the steps with (t-1) mod k == 0, by `update_hessian`
        θ ← θ - ηλθ - η · clip(m / max(γh, ε), 1)

    Where h is negative or tiny the step is η·sign(m), so Sophia without curvature is momentum-sign descent.

        optimizer = SophiaG(model.parameters(), lr=6e-4)
        for step, (x, y) in enumerate(batches, start=1):
            if optimizer.hessian_due:
                n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
                optimizer.update_hessian(num_predictions=n)
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    State per parameter, `optimizer.state[p]`: `exp_avg` (m) and `hessian` (h), in the shape of p; `step` (t), a 0-D
    float32 tensor.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor; may be changed in place by any scheduler.
        betas: (β1, β2), the decays of the momentum and of the curvature.
        gamma: γ, the scale of the curvature; choose it so that `unclipped_count / numel` is between 0.1 and 0.5.
        eps: ε, the floor of γh. A live hyper-parameter: 1e-7 may beat 1e-12.
        weight_decay: λ, decoupled from the gradient and multiplied by η.
        hessian_interval: k, the steps from one estimate to the next, one value for all groups. None is for a run
            without curvature (h stays zero: the paper's "clip only" ablation): `hessian_due` is then always False.
        clip: False leaves out the clip, the paper's ablation; it diverges easily.
        foreach: carry the step out by torch._foreach_*, an operation on all tensors at once.
        compile: carry it out by compiled kernels; what is too small to be worth a call stays eager. By default from a
            million parameters on, if there is a compiler. False leaves the eager form, on accelerators the foreach form.
            All forms give the same numbers.

    Raises:
        ValueError: a hyper-parameter out of its range, by name.
        TypeError: a complex or integer parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | Tensor = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        hessian_interval: int | None = 10,
        *,
        clip: bool = True,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_interval": hessian_interval,
            "clip": clip,
        }
        super().__init__(params, defaults, foreach=foreach, compile=compile)

    def _validate_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 2e-4 to 7e-4")
        check_betas(group)
        check_number(group, "gamma", "try 0.05 (GNB) or 0.01 (Hutchinson)", positive=True)
        check_number(group, "eps", "the paper uses 1e-12", least=SMALLEST)
        check_number(group, "weight_decay", "the paper uses 0.2")
        if not isinstance(group["clip"], bool):
            raise ValueError(
                f"clip = {group['clip']!r}, expected True or False: the threshold is always 1, scale lr instead"
            )
        super()._validate_group(group)

    @property
    def unclipped_count(self) -> Tensor:
        """() int64 on the device: how many of the `numel` coordinates of the last training step had |m| < γh, so that
        the clip did not act."""
        if not self._counts:
            return torch.zeros((), dtype=torch.int64)
        return torch.stack([count.to(self._counts[0].device, torch.int64) for count in self._counts]).sum()

    def _set_transient_attributes(self) -> None:
        super()._set_transient_attributes()
        self._counts: list[Tensor] = []

    def _begin_round(self) -> None:
        self._counts = []

    def _rule(self, group: dict[str, Any]) -> Rule:
        return sophia_update if group["clip"] else sophia_unclipped_update

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        rule = self._rule(group)
        tensors = [
            params,
            grads,
            [local(state["exp_avg"]) for state in states],
            [local(state["hessian"]) for state in states],
        ]
        lr, gamma = widened(group["lr"]), widened(group["gamma"])
        beta1, eps = group["betas"][0], group["eps"]
        scalars = [lr, beta1, gamma, eps, group["weight_decay"], grad_scale, found_inf]
        self._counts += apply(rule, tensors, scalars, self._form)

    def _update_group(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        values: list[Tensor],
        num_predictions: int | Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        tensors, beta2 = [[local(state["hessian"]) for state in states], values], group["betas"][1]
        if num_predictions is None:
            apply(hessian_update, tensors, [beta2, grad_scale, found_inf], self._form)
        else:
            apply(gauss_newton_update, tensors, [num_predictions, beta2, grad_scale, found_inf], self._form)


class SophiaG(Sophia):
    """Sophia with the paper's defaults for the Gauss-Newton-Bartlett estimator: `gauss_newton_bartlett`, then
    `update_hessian(num_predictions=N)`."""


class SophiaH(Sophia):
    """Sophia with the paper's defaults for Hutchinson's estimator (γ = 0.01): `update_hessian(estimates=…)`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | Tensor = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        hessian_interval: int | None = 10,
        *,
        clip: bool = True,
        foreach: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            gamma,
            eps,
            weight_decay,
            hessian_interval,
            clip=clip,
            foreach=foreach,
            compile=compile,
        )
