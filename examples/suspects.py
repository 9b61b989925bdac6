"""Optimizers for the question why Sophia falls behind: each changes one thing that is under suspicion.

They are external optimizers (`optimizer.factory=examples.suspects:SophiaOnKind`), whose groups have the parameters' names.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from models import parameter_kind
from sophia import Sophia


class SophiaOnKind(Optimizer):
    """Sophia on one kind of weights, AdamW on the others.

    Args:
        params: the run's groups; `lr` and `weight_decay` are Sophia's.
        kind: "embedding", "attention" or "mlp"; norms and biases are AdamW's.
        adamw_lr: AdamW's peak learning rate.
        adamw_weight_decay: AdamW's weight decay of matrices.
        adamw_embedding_lr_ratio: the embeddings' rate over `adamw_lr`, where they are AdamW's.

    Raises ValueError if no parameter has the kind.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        hessian_interval: int = 10,
        *,
        kind: str,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        adamw_lr: float,
        adamw_betas: tuple[float, float],
        adamw_weight_decay: float,
        adamw_embedding_lr_ratio: float = 1.0,
    ) -> None:
        groups = [part for group in params for part in _split(group, kind)]
        if not any(group["sophia"] for group in groups):
            raise ValueError(f"kind={kind!r}: no matrix has this kind; expected embedding, attention or mlp")
        for group in groups:
            if not group["sophia"]:
                embeds = all(parameter_kind(name) == "embedding" for name in group["names"])
                group["lr"] = group["initial_lr"] = adamw_lr * (adamw_embedding_lr_ratio if embeds else 1.0)
                group["weight_decay"] = adamw_weight_decay if group["weight_decay"] else 0.0
        self._sophia = Sophia(
            [group for group in groups if group["sophia"]],
            betas=betas,
            gamma=gamma,
            eps=eps,
            hessian_interval=hessian_interval,
        )
        self._adamw = AdamW([group for group in groups if not group["sophia"]], betas=adamw_betas, fused=True)
        super().__init__([*self._sophia.param_groups, *self._adamw.param_groups], {})

    def _of(self, optimizer: Optimizer) -> Optimizer:
        """Give one of the two its groups and the common state, which loading a checkpoint replaces."""
        optimizer.state = self.state
        optimizer.param_groups = [
            group for group in self.param_groups if group["sophia"] is (optimizer is self._sophia)
        ]
        return optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for optimizer in (self._sophia, self._adamw):
            self._of(optimizer).step()

    def update_hessian(self, num_predictions: int | Tensor) -> None:
        self._of(self._sophia)
        self._sophia.update_hessian(num_predictions)


def _split(group: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """Yield the part of a group whose matrices have the kind, and the rest, apart by whether they embed."""
    parts: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in zip(group["names"], group["params"], strict=True):
        found = parameter_kind(name)
        key = parameter.dim() >= 2 and found == kind, found == "embedding"
        part = parts.setdefault(key, group | {"params": [], "names": [], "sophia": key[0]})
        part["params"].append(parameter)
        part["names"].append(name)
    yield from parts.values()


class SophiaWithoutStaleRows(Sophia):
    """Sophia that only decays a row of an embedding while the momentum of the row is more than twice its gradient.

    The rows of tokens that occur in the batch have gradients larger than their momentum, an average over noise. The
    momentum of any other row is the direction of an earlier batch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        before = [
            (parameter, parameter.clone(), 1 - group["lr"] * group["weight_decay"])
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter_kind(name) == "embedding"
        ]
        super().step()
        clip = getattr(self, "grad_scale", None)  # the run clips the gradient by what divides it
        for parameter, rows, decay in before:
            gradient = parameter.grad.norm(dim=1) / (1 if clip is None else clip)
            stale = self.state[parameter]["exp_avg"].norm(dim=1) > 2 * gradient
            parameter[stale] = decay * rows[stale]
