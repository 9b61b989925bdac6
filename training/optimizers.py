"""The optimizers of a run: parameter groups by rule, and one constructor for each `optimizer=`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from models import parameter_kind
from sophia import AdaHessian, Lion, Sophia
from training.config import (
    AdaHessianConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SignumConfig,
    SophiaConfig,
)
from training.strategies.state import numbers_of

Named = Mapping[str, Tensor]


def parameter_groups(
    parameters: Named,
    weight_decay: float,
    lr: float,
    embedding_lr_ratio: float = 1.0,
    *,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for the rest (biases, norms); every parameter in exactly one group.

    Args:
        parameters: by name; shards (DTensor) have their full tensor's dimensions.
        lr: the groups' peak rate.
        embedding_lr_ratio: what the rate of the embeddings is multiplied by. At 1 they share a group with the other
            matrices.
        decay_embeddings: whether the embeddings of tokens and positions decay with the other matrices.
    """

    if len({id(p) for p in parameters.values()}) != len(parameters):
        raise ValueError("a parameter has more than one name and would be stepped more than once")
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        embeds = parameter_kind(name) == "embedding"
        apart = embedding_lr_ratio != 1 and embeds
        decays = parameter.dim() >= 2 and (decay_embeddings or not embeds)
        rate = lr * embedding_lr_ratio if apart else lr
        settings = {"weight_decay": weight_decay if decays else 0.0, "lr": rate, "initial_lr": rate}
        group = groups.setdefault((apart, not decays), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def build_optimizers(config: OptimizerConfig, *, compile_step: bool) -> Callable[[Named], list[Optimizer]]:
    """A function from named parameters to the run's optimizers; each group carries its `initial_lr`.

    Args:
        config: the validated `optimizer` section.
        compile_step: let the project's own optimizers compile their elementwise update.
    """

    def build(parameters: Named) -> list[Optimizer]:
        optimizers = _construct(config, parameters, compile_step=compile_step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial"] = numbers_of(group)  # what the optimizer has changed by then is saved
        return optimizers

    return build


def _construct(config: OptimizerConfig, parameters: Named, *, compile_step: bool) -> list[Optimizer]:
    grouped = partial(
        parameter_groups,
        weight_decay=config.weight_decay,
        lr=config.lr,
        embedding_lr_ratio=config.embedding_lr_ratio,
        decay_embeddings=config.decay_embeddings,
    )
    form = None if compile_step else False  # None: compiled where it is worth the compiling
    match config:
        case AdamWConfig():
            return [_adamw(grouped(parameters), config.lr, config.betas, config.eps)]
        case LionConfig():
            return [Lion(grouped(parameters), lr=config.lr, betas=config.betas, compile=form)]
        case SignumConfig():
            momentum = (config.betas[0], 0.0)
            return [Sophia(grouped(parameters), lr=config.lr, betas=momentum, hessian_interval=None, compile=form)]
        case SophiaConfig():
            return [
                Sophia(
                    grouped(parameters),
                    lr=config.lr,
                    betas=config.betas,
                    gamma=config.gamma,
                    eps=config.eps,
                    hessian_interval=config.hessian_interval,
                    clip=config.clip,
                    compile=form,
                )
            ]
        case AdaHessianConfig():
            return [
                AdaHessian(
                    grouped(parameters),
                    lr=config.lr,
                    betas=config.betas,
                    eps=config.eps,
                    hessian_interval=config.hessian_interval,
                    compile=form,
                )
            ]
        case MuonConfig():
            hidden = {name: p for name, p in parameters.items() if p.dim() == 2 and parameter_kind(name) != "embedding"}
            rest = {name: p for name, p in parameters.items() if name not in hidden}
            muon = torch.optim.Muon(
                grouped(hidden),
                lr=config.lr,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            return [muon, _adamw(grouped(rest), config.lr, config.betas, config.eps)]


def _adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """torch's AdamW, in its fused form: one kernel on CUDA and on the CPU."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
