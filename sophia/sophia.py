"""Sophia: momentum divided by an average of diagonal curvature estimates, clipped per coordinate.

Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
ICLR 2024, arXiv 2305.14342. Update rules first, then the optimizer. `sophia.kernels` applies a rule to many tensors;
`sophia.elementwise` has what the package's optimizers share.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sophia.elementwise import (
    SMALLEST,
    CurvatureOptimizer,
    ParamsT,
    advance,
    check_betas,
    check_interval,
    check_number,
    evaluated,
)
from sophia.kernels import Rule, Scalar, apply, descend, fold, unscaled, updates


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
    fold(exp_avg, unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma
    descend(param, (exp_avg / curvature.clamp_min(eps)).clamp(-1, 1), lr, weight_decay, found_inf)
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
    grad = unscaled(grad, hessian, grad_scale)
    fold(hessian, grad * grad * num_predictions, beta2, found_inf)


@updates(0)
def hessian_update(
    hessian: Tensor,  # (*) h, updated in place
    estimate: Tensor,  # (*) ĥ
    beta2: Scalar,  # ()
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> None:
    """h ← β2 h + (1-β2) ĥ   (Liu et al. 2024, Algorithm 3). ĥ is linear in the loss: `grad_scale` divides it once."""
    fold(hessian, unscaled(estimate, hessian, grad_scale), beta2, found_inf)


def refresh_due(step: int, hessian_interval: int) -> bool:
    """Return whether step t = 1, 2, … starts with a new estimate: (t-1) mod k == 0   (Algorithm 3: t mod k = 1)."""
    return (step - 1) % hessian_interval == 0


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
    """`sophia_update` without the clip, an ablation of the paper: θ ← θ - ηλθ - η · m / max(γh, ε)."""
    fold(exp_avg, unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian * gamma
    descend(param, exp_avg / curvature.clamp_min(eps), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


@updates(0, 2)
def sophia_power_update(
    param: Tensor,  # (*) θ, updated in place
    grad: Tensor,  # (*) g
    exp_avg: Tensor,  # (*) m, updated in place
    hessian: Tensor,  # (*) h, read only
    lr: Scalar,  # () η
    beta1: Scalar,  # ()
    gamma: Scalar,  # () γ
    eps: Scalar,  # () ε
    weight_decay: Scalar,  # () λ
    power: Scalar,  # () p
    scale: Scalar,  # () c
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # () int32, the number of coordinates with |m| < γ·c·max(h, 0)^p
    """`sophia_update` with γ·c·max(h, 0)^p in place of γh."""
    fold(exp_avg, unscaled(grad, exp_avg, grad_scale), beta1, found_inf)
    curvature = hessian.clamp_min(0).pow(power) * (gamma * scale)
    descend(param, (exp_avg / curvature.clamp_min(eps)).clamp(-1, 1), lr, weight_decay, found_inf)
    return (exp_avg.abs() < curvature).sum(dtype=torch.int32)


class Sophia(CurvatureOptimizer):
    r"""Sophia with any estimator of the diagonal Hessian.

    At step t = 1, 2, …, starting from m = h = 0, without bias correction:

        m ← β1 m + (1-β1) g
        h ← β2 h + (1-β2) ĥ              in `update_hessian`, before the steps with (t-1) mod k == 0
        θ ← θ - ηλθ - η · clip(m / max(γh, ε), 1)

    If h is negative or tiny, the step is η·sign(m), so Sophia without curvature is momentum-sign descent.

    With `hessian_power` p and `hessian_scale` c, γ·c·max(h, 0)^p takes the place of γh. The paper has p = c = 1. A curvature
    h₀ with c·h₀^p = h₀, that is c = h₀^(1-p), is scaled as in the paper; smaller curvatures are raised towards it and larger
    ones lowered, so γ keeps its meaning if h₀ is a typical curvature of the model. c is a constant: taken from the data, it
    would differ between shards.

        optimizer = SophiaG(model.parameters(), lr=6e-4)
        for step, (x, y) in enumerate(batches, start=1):
            if optimizer.hessian_due:
                n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
                optimizer.update_hessian(num_predictions=n)
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    State per parameter, `optimizer.state[p]`: `exp_avg` (m) and `hessian` (h), in the shape of p, and `step` (t), a 0-D
    float32 tensor.

    Args:
        params: tensors, named tensors or parameter groups.
        lr: η, a float or a 0-D tensor; any scheduler may change it in place.
        betas: (β1, β2), the decay rates of the momentum and of the curvature.
        gamma: γ, the scale of the curvature; choose it so that `unclipped_count / numel` is between 0.1 and 0.5.
        eps: ε, the floor of γh. Worth tuning: 1e-7 may beat 1e-12.
        weight_decay: λ, decoupled weight decay, multiplied by η.
        hessian_interval: k, the number of steps between curvature estimates, the same for all groups. None runs without
            curvature (h stays zero, the paper's "clip only" ablation), and `hessian_due` is always False.
        clip: False omits the clip, an ablation of the paper; it diverges easily.
        hessian_power: p, the power of the curvature. Below 1, Sophia approaches a method of first order (Shin et al. 2025
            report that 0.8 to 0.9 does better than 0.5 in pretraining).
        hessian_scale: c, in the unit of h^(1-p).
        foreach: use `torch._foreach_*` operations on all tensors at once.
        compile: use compiled kernels, except for tensors too small to pay off. Default: from a million parameters on, if
            there is a compiler. False: eager, on accelerators foreach. All implementations give the same numbers.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: a parameter is complex or integer.
    """

    # The rule for each value of a group's `clip`.
    _rules: ClassVar[dict[bool, Rule]] = {True: sophia_update, False: sophia_unclipped_update}
    _power_rule: ClassVar[Rule] = staticmethod(sophia_power_update)

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
        hessian_power: float = 1.0,
        hessian_scale: float = 1.0,
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
            "hessian_power": hessian_power,
            "hessian_scale": hessian_scale,
        }
        super().__init__(params, defaults, foreach=foreach, compile=compile)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number(group, "lr", "the paper uses 2e-4 to 7e-4")
        check_betas(group)
        check_number(group, "gamma", "try 0.05 (GNB) or 0.01 (Hutchinson)", positive=True)
        check_number(group, "eps", "the paper uses 1e-12", least=SMALLEST)
        check_number(group, "weight_decay", "the paper uses 0.2")
        if not isinstance(group["clip"], bool):
            raise ValueError(
                f"clip = {group['clip']!r}, expected True or False: the threshold is always 1, scale lr instead"
            )
        check_number(group, "hessian_power", "the paper uses 1", positive=True, tensor=False)
        check_number(group, "hessian_scale", "1 is the paper's rule", positive=True, tensor=False)
        if not group["clip"] and _has_power(group):
            raise ValueError(
                f"clip = False with hessian_power = {group['hessian_power']!r}: expected 1 without the clip"
            )
        check_interval(group, self.param_groups)

    @property
    def hessian_due(self) -> bool:
        """True before the steps t = 1, 2, … with (t-1) mod k == 0; t-1 is the largest step count of any parameter.

        A step skipped because of an overflow does not advance t, so it stays due; a loop that counts such steps calls
        `refresh_due` with its own counter. The step counts are on the CPU unless loss scaling has moved them to the
        device; then reading this property synchronizes.
        """
        interval = self.param_groups[0]["hessian_interval"]
        return interval is not None and refresh_due(self._steps_made() + 1, interval)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def update_hessian(
        self,
        num_predictions: int | Tensor | None = None,
        *,
        estimates: Iterable[Tensor | None] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Fold a curvature estimate ĥ, made at the weights before the step, into h.

        Pass exactly one of `num_predictions` and `estimates`.

        Args:
            num_predictions: N, for ĥ = N · g ⊙ g, where .grad holds g, the gradient of the *mean* loss over N
                predictions with labels sampled from the model (Gauss-Newton-Bartlett). N counts tokens, not sequences,
                over all micro-batches and ranks; g must not be clipped. An integer, or a 0-D tensor, which is not read
                back to the host.
            estimates: ĥ for each parameter, in the order and the shapes of the parameters (a DTensor for a DTensor
                parameter); None only for a parameter that does not require a gradient.
            grad_scaler: the scaler of the loss behind g or ĥ. Its scale is divided out before squaring; on an overflow,
                h does not change and a warning is raised. This synchronizes. Default: the attributes `grad_scale` and
                `found_inf`, if set.

        Raises:
            TypeError: neither or both of num_predictions and estimates; a plain estimate for a DTensor parameter.
            ValueError: N < 1, or a wrong number, shape, layout or device of estimates.
            RuntimeError: a parameter has no gradient, or hessian_interval is None.
        """
        for group, _, values, states, amp in self._curvature(num_predictions, estimates, grad_scaler):
            tensors, beta2 = [[state["hessian"] for state in states], values], group["betas"][1]
            if num_predictions is not None:
                apply(gauss_newton_update, tensors, [num_predictions, beta2], self._form, amp)
            else:
                apply(hessian_update, tensors, [beta2], self._form, amp)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss, if there is a closure.

        Raises RuntimeError for a sparse gradient. Warns at the first step with a rate above zero that has no curvature,
        and after more than k steps without `update_hessian`. A first step with a rate and gradients of zero, by which
        torch.distributed.checkpoint makes a state, is not counted.
        """
        loss = evaluated(closure)
        work, counted = self._with_gradients(), self._is_a_step()
        for group, params, grads, states, amp in work:
            if self._begins_step(params):
                self._counts = []
            if counted:
                advance(states, "step", amp.found_inf)
            exp_avgs, hessians = [state["exp_avg"] for state in states], [state["hessian"] for state in states]
            hyper = [group["lr"], group["betas"][0], group["gamma"], group["eps"], group["weight_decay"]]
            rule = self._rules[group["clip"]]
            if _has_power(group):
                rule, hyper = self._power_rule, [*hyper, group["hessian_power"], group["hessian_scale"]]
            self._counts += apply(rule, [params, grads, exp_avgs, hessians], hyper, self._form, amp)
        return loss

    @property
    def unclipped_count(self) -> Tensor:
        """() int64 on the device: the number of coordinates in the last training step with |m| < γh, of `numel`.

        Where eps <= γh, the clip left these coordinates alone and no others. Where eps is above γh, a coordinate with
        |m| < eps is not clipped either, and it is not counted unless |m| < γh.
        """
        if not self._counts:
            devices = (p.device for group in self.param_groups for p in group["params"])
            return torch.zeros((), dtype=torch.int64, device=next(devices, None))
        return torch.stack([count.to(self._counts[0].device, torch.int64) for count in self._counts]).sum()


def _has_power(group: Mapping[str, Any]) -> bool:
    return (group.get("hessian_power", 1.0), group.get("hessian_scale", 1.0)) != (
        1.0,
        1.0,
    )  # absent in older state_dicts


class SophiaG(Sophia):
    """Sophia with the paper's defaults for Gauss-Newton-Bartlett: call `update_hessian(num_predictions=N)`."""


class SophiaH(Sophia):
    """Sophia with the paper's defaults for Hutchinson's estimator (γ = 0.01): call `update_hessian(estimates=…)`."""

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
        hessian_power: float = 1.0,
        hessian_scale: float = 1.0,
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
            hessian_power=hessian_power,
            hessian_scale=hessian_scale,
            foreach=foreach,
            compile=compile,
        )
