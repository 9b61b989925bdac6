"""Estimators of the diagonal curvature, for plain loops: each is one line before `update_hessian`.

Random numbers come from `sophia.random`: labels are a function of (seed, step, global position) and Hutchinson's
noise one of (seed, step, parameter name, index), so that they depend neither on the split into micro-batches nor on
the ranks.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.random import normals_like, uniforms

# Rows of logits whose cumulative distribution is held in float64 at once.
_ROWS = 1024


@torch.no_grad()
def sample_labels(
    logits: Tensor,  # (n, V) any floating dtype
    uniform: Tensor,  # (n,) float32 in [0, 1)
) -> Tensor:  # (n,) int64
    """Labels drawn from softmax(logits) by inverting the cumulative distribution: the smallest y with F(y) > u.

    Softmax in float32 and its sum in float64, so that a class of probability zero is never drawn.
    """
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows, u, out in zip(logits.split(_ROWS), uniform.split(_ROWS), labels.split(_ROWS), strict=True):
        cumulative = F.softmax(rows.float(), dim=-1).double().cumsum(dim=-1)
        threshold = u.double().unsqueeze(-1) * cumulative[:, -1:]
        out.copy_(torch.searchsorted(cumulative, threshold, right=True).squeeze(-1))
    return labels


def gauss_newton_bartlett(
    logits_fn: Callable[[], Tensor],
    *,
    seed: int,
    step: int,
    positions: Tensor | None = None,  # like the logits without their last dimension, int64
    total_predictions: int | None = None,
) -> int:
    """Samples ŷ ~ softmax(logits), adds the gradient of the mean cross entropy against ŷ to .grad, returns N.

        n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
        optimizer.update_hessian(num_predictions=n)

    (Liu et al. 2024, Algorithm 2.) Softmax, sampling and loss are in float32, whatever the dtype of the logits.

    Args:
        logits_fn: returns logits (…, V), one distribution per position.
        seed: of the labels.
        step: the training step.
        positions: the global position of each prediction, which decides its label; negative ones are left out. By
            default
            0, 1, … : with several micro-batches or ranks give each its own, or all draw the same labels.
        total_predictions: N over all micro-batches and ranks, when this is one of several whose gradients are
            *summed*; by
            default the predictions of this call.

    Returns:
        The number of predictions in this call. Add up the calls: the sum is `update_hessian`'s num_predictions.

    Raises:
        ValueError: positions of the wrong shape, or none to predict.
    """
    logits = logits_fn()
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if positions is None:
        positions = torch.arange(len(flat), device=flat.device)
    elif positions.shape != logits.shape[:-1]:
        raise ValueError(f"positions have shape {tuple(positions.shape)}, expected {tuple(logits.shape[:-1])}")
    positions = positions.reshape(-1)
    flat, positions = flat[positions >= 0], positions[positions >= 0]
    n = len(flat)
    if n == 0:
        raise ValueError("no prediction: all positions are negative or the batch is empty")
    labels = sample_labels(flat, uniforms(seed, step, positions))
    F.cross_entropy(flat, labels, reduction="sum").div(total_predictions or n).backward()  # type: ignore[no-untyped-call]
    return n


def hutchinson(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    seed: int,
    step: int,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """ĥ = u ⊙ (∇²L u) with u ~ N(0, I), by double backward (Liu et al. 2024, Algorithm 1). Entries may be negative.

        optimizer.update_hessian(estimates=hutchinson(lambda: loss(model(x), y), model.parameters(), seed=0, step=step))

    The model must be eager (torch.compile has no double backward) and not sharded (FSDP2 hides the graph); attention
    is switched to its mathematical form meanwhile.

    Args:
        loss_fn: returns the mean loss (), a function of the parameters.
        params: in the order of the optimizer's.
        seed: of the noise u.
        step: the training step.
        names: of the parameters, which key the noise; by default "0", "1", ….

    Returns:
        ĥ for each parameter, in its shape and dtype; zeros for one that the loss does not depend on.
    """
    params = list(params)
    noise = _noise(params, seed, step, names)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        grads = torch.autograd.grad(loss_fn(), params, create_graph=True, materialize_grads=True)
        used = [(g, u) for g, u in zip(grads, noise, strict=True) if g.requires_grad]
        products = torch.autograd.grad([g for g, _ in used], params, [u for _, u in used], materialize_grads=True)
    return [u * product for u, product in zip(noise, products, strict=True)]


@torch.no_grad()
def hutchinson_differences(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    seed: int,
    step: int,
    names: Sequence[str] | None = None,
    relative_step: float = 1e-3,
) -> list[Tensor]:
    """ĥ = u ⊙ (∇L(θ+δu) - ∇L(θ-δu)) / 2δ with δ = relative_step · ‖θ‖ / ‖u‖: needs first-order gradients only.

    Works with fused attention, torch.compile and sharded models. Arguments and result as in `hutchinson`; .grad is left
    as it was, and the weights are restored bit for bit.

    Raises:
        TypeError: parameters that are not float32 or float64: the difference would be lost in rounding.
    """
    params = list(params)
    for index, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {index} has dtype {p.dtype}, expected torch.float32: the difference of two gradients "
                "would drown in rounding; keep the weights in float32 and use autocast, or take the exact product, "
                "hutchinson()"
            )
    noise = _noise(params, seed, step, names)
    delta = relative_step * _norm(params) / _norm(noise)
    saved = [p.detach().clone() for p in params]
    grads: list[list[Tensor]] = []
    for sign in (1, -1):
        for p, weight, u in zip(params, saved, noise, strict=True):
            p.copy_(weight + u * (sign * delta))
        with torch.enable_grad():
            grads.append(list(torch.autograd.grad(loss_fn(), params, materialize_grads=True)))
    for p, weight in zip(params, saved, strict=True):
        p.copy_(weight)
    return [u * (plus - minus) / (2 * delta) for u, plus, minus in zip(noise, *grads, strict=True)]


def empirical_fisher(
    logits_fn: Callable[[], Tensor],
    targets: Tensor,  # like the logits without their last dimension, int64
    *,
    ignore_index: int = -100,
) -> int:
    """Adds the gradient of the mean *training* loss to .grad and returns N: ĥ = N · g ⊙ g, the ablation of the labels.

    Not an estimate of the Gauss-Newton matrix: it vanishes with the loss and its bias does not average out.
    """
    logits = logits_fn()
    n = int((targets != ignore_index).sum())
    if n == 0:
        raise ValueError(f"no prediction: all targets are {ignore_index}")
    F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=ignore_index
    ).backward()  # type: ignore[no-untyped-call]
    return n


def _noise(params: Sequence[Tensor], seed: int, step: int, names: Sequence[str] | None) -> list[Tensor]:
    if names is None:
        names = [str(index) for index in range(len(params))]
    elif len(names) != len(params):
        raise ValueError(f"{len(names)} names for {len(params)} parameters, expected one each")
    return [normals_like(p, seed, step, name).to(p.dtype) for p, name in zip(params, names, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).square().sum().sqrt()
