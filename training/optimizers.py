"""A run's optimizers: parameter groups, and one constructor per `optimizer=`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from models import parameter_kind
from sophia import AdaHessian, Lion, Sophia
from sophia.kernels import COMPILED_FROM
from training import external
from training.config import (
    AdaHessianConfig,
    AdamWConfig,
    ExternalConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SignumConfig,
    SophiaConfig,
)
from training.strategies.state import numbers_of

Named = Mapping[str, Tensor]
KindOf = Callable[[str], str]  # a parameter's kind by its name, as LanguageModel.parameter_kind


def parameter_groups(
    parameters: Named,
    weight_decay: float,
    lr: float,
    embedding_lr_ratio: float = 1.0,
    *,
    decay_embeddings: bool = True,
    matrices_apart: bool = False,
    kind_of: KindOf = parameter_kind,
) -> list[dict[str, Any]]:
    """Group the parameters, each in exactly one group: matrices get weight decay, biases and norms none.

    Args:
        parameters: by name; shards (DTensor) have their full tensor's dimensions.
        weight_decay: weight decay of the matrices.
        lr: the peak learning rate.
        embedding_lr_ratio: multiplies the learning rate of the embeddings. At 1 they share a group with the other
            matrices.
        decay_embeddings: whether token and position embeddings get weight decay.
        matrices_apart: hidden matrices get a group of their own, with "matrices": True.
        kind_of: a parameter's kind by its name.
    """
    if len({id(p) for p in parameters.values()}) != len(parameters):
        raise ValueError("a parameter has several names and would be updated several times")
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        embeds = kind_of(name) == "embedding"
        apart = embedding_lr_ratio != 1 and embeds
        decays = parameter.dim() >= 2 and (decay_embeddings or not embeds)
        rate = lr * embedding_lr_ratio if apart else lr
        settings = {"weight_decay": weight_decay if decays else 0.0, "lr": rate, "initial_lr": rate}
        if matrix := matrices_apart and is_hidden_matrix(name, parameter, kind_of):
            settings["matrices"] = True
        group = groups.setdefault((apart, not decays, matrix), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def is_hidden_matrix(name: str, parameter: Tensor, kind_of: KindOf = parameter_kind) -> bool:
    return parameter.dim() == 2 and kind_of(name) != "embedding"


def build_optimizers(
    config: OptimizerConfig, *, compile_step: bool, kind_of: KindOf = parameter_kind
) -> Callable[[Named], list[Optimizer]]:
    """Return a function that builds the run's optimizers from named parameters; each group has an `initial_lr`.

    Args:
        config: the validated `optimizer` section.
        compile_step: whether the optimizers of `sophia` may compile their update.
        kind_of: the model's `parameter_kind`.
    """

    def build(parameters: Named) -> list[Optimizer]:
        optimizers = _construct(config, parameters, compile_step=compile_step, kind_of=kind_of)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial"] = numbers_of(group)  # a checkpoint saves what the optimizer has changed since
        return optimizers

    return build


def _construct(config: OptimizerConfig, parameters: Named, *, compile_step: bool, kind_of: KindOf) -> list[Optimizer]:
    grouped = partial(
        parameter_groups,
        weight_decay=config.weight_decay,
        lr=config.lr,
        embedding_lr_ratio=config.embedding_lr_ratio,
        decay_embeddings=config.decay_embeddings,
        kind_of=kind_of,
    )
    by_size = None if compile_step else False  # None: each call compiles if it is large
    # A model's groups decide together, so that small ones get a kernel of the same kind as torch's fused AdamW. AdaHessian
    # steps each parameter by itself and would compile for each shape.
    large = sum(parameter.numel() for parameter in parameters.values()) >= COMPILED_FROM
    form = True if compile_step and large else by_size
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
                    hessian_power=config.hessian_power,
                    hessian_scale=config.hessian_scale,
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
                    compile=by_size,
                )
            ]
        case MuonConfig():
            hidden = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p, kind_of)}
            rest = {name: p for name, p in parameters.items() if name not in hidden}
            muon = torch.optim.Muon(
                grouped(hidden),
                lr=config.lr,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            return [muon, _adamw(grouped(rest), config.lr, config.betas, config.eps)]
        case ExternalConfig():
            groups = grouped(parameters, matrices_apart=config.groups == "matrices_apart")
            if config.groups == "flat":
                everything = {
                    "params": [*parameters.values()],
                    "names": [*parameters],
                    "weight_decay": config.weight_decay,
                }
                groups = [everything | {"lr": config.lr, "initial_lr": config.lr}]
            return [external.build(config, groups, parameters)]


def _adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """Return torch's fused AdamW: one kernel on CUDA and on the CPU."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
