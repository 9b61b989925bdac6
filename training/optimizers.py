"""The optimizers of a run: parameter groups by rule, and one constructor for each `optimizer=`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sophia import AdaHessian, GammaController, Lion, Sophia
from training.config import (
    AdaHessianConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SignumConfig,
    SophiaConfig,
)

Named = Mapping[str, Tensor]


def parameter_groups(parameters: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for the rest (biases, norms); every parameter in exactly one group.

    Args:
        parameters: by name; shards (DTensor) have their full tensor's dimensions.
    """
    decayed = {name: p for name, p in parameters.items() if p.dim() >= 2}
    others = {name: p for name, p in parameters.items() if p.dim() < 2}
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "names": list(decayed), "weight_decay": weight_decay},
        {"params": list(others.values()), "names": list(others), "weight_decay": 0.0},
    ]
    owned = [id(p) for group in groups for p in group["params"]]
    if len(set(owned)) != len(owned) or len(owned) != len(parameters):
        raise ValueError("a parameter is owned by no group or by more than one")
    return [group for group in groups if group["params"]]


def build_optimizers(config: OptimizerConfig, *, compile_step: bool) -> Callable[[Named], list[Optimizer]]:
    """A function from named parameters to the run's optimizers; each group carries its `peak_lr`.

    Args:
        config: the validated `optimizer` section.
        compile_step: let the project's own optimizers compile their elementwise update.
    """

    def build(parameters: Named) -> list[Optimizer]:
        optimizers = _construct(config, parameters, compile_step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = config.lr
        return optimizers

    return build


def gamma_controller(config: OptimizerConfig, optimizers: Sequence[Optimizer]) -> GammaController | None:
    """What steers γ to `optimizer.unclipped_target`; None where γ is constant."""
    if not isinstance(config, SophiaConfig) or config.unclipped_target is None:
        return None
    (optimizer,) = optimizers
    assert isinstance(optimizer, Sophia)
    return GammaController(optimizer, config.unclipped_target)


def _construct(config: OptimizerConfig, parameters: Named, compile_step: bool) -> list[Optimizer]:
    groups = parameter_groups(parameters, config.weight_decay)
    form = None if compile_step else False  # None: compiled where it is worth the compiling
    match config:
        case AdamWConfig():
            return [_adamw(groups, config.lr, config.betas, config.eps)]
        case LionConfig():
            return [Lion(groups, lr=config.lr, betas=config.betas, compile=form)]
        case SignumConfig():
            momentum = (config.betas[0], 0.0)
            return [Sophia(groups, lr=config.lr, betas=momentum, hessian_interval=None, compile=form)]
        case SophiaConfig():
            return [
                Sophia(
                    groups,
                    lr=config.lr,
                    betas=config.betas,
                    gamma=config.gamma,
                    eps=config.eps,
                    hessian_interval=config.hessian_interval,
                    clip=config.clip,
                    bias_correction=config.bias_correction,
                    compile=form,
                )
            ]
        case AdaHessianConfig():
            return [
                AdaHessian(
                    groups,
                    lr=config.lr,
                    betas=config.betas,
                    eps=config.eps,
                    hessian_interval=config.hessian_interval,
                    compile=form,
                )
            ]
        case MuonConfig():
            hidden = {name: p for name, p in parameters.items() if p.dim() == 2 and "embedding" not in name}
            rest = {name: p for name, p in parameters.items() if name not in hidden}
            muon = torch.optim.Muon(
                [{"params": list(hidden.values()), "names": list(hidden)}],
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            adamw_groups = parameter_groups(rest, config.weight_decay)
            return [muon, _adamw(adamw_groups, config.lr, config.betas, config.eps)]


def _adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """torch's AdamW, in its fused form: one kernel on CUDA and on the CPU."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
