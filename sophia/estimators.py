"""Estimators of the diagonal curvature for plain training loops, each called right before `update_hessian`.

Labels are a function of (seed, step, global position), Hutchinson's noise of (seed, step, parameter name, index), so
neither depends on micro-batches or ranks (`sophia.random`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.elementwise import HALF
from sophia.likelihoods import Categorical, Likelihood
from sophia.random import generators_kept, normals_like


def gauss_newton_bartlett(
    outputs_fn: Callable[[], Tensor],
    *,
    seed: int,
    step: int,
    positions: Tensor | None = None,
    total_predictions: float | None = None,
    likelihood: Likelihood = Categorical(),  # noqa: B008 frozen
    grad_scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Sample labels from the model, add the gradient of their mean loss to .grad and return N.

        n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
        optimizer.update_hessian(num_predictions=n)

    Liu et al. 2024, Algorithm 2. Zero the gradient before and after, and do not clip it in between.

    With several micro-batches, call it once for each with different `positions` and the same `total_predictions` N, and
    pass the sum of the returned values to `update_hessian`. DistributedDataParallel *averages* gradients: set
    total_predictions to N / world size on each rank, and pass the N of all ranks to `update_hessian`.

    Args:
        outputs_fn: returns the model's outputs: logits (…, V) for the default likelihood.
        seed: seed of the labels.
        step: the training step.
        positions: integers, in the shape of the logits without their last dimension: the global index of each prediction
            in this step's estimate, which determines its label. Negative positions are ignored. Default: 0, 1, 2, …,
            for an estimate that is a single call on a single rank.
        total_predictions: N, the divisor of the summed loss. Default: the number of predictions in this call. If it is
            given, a call may have none: its gradient is zero, and its backward takes part in that of the other ranks.
        likelihood: the distribution that the training loss is the likelihood of (`sophia.likelihoods`).
        grad_scaler: scales the loss, for float16; pass the same one to `update_hessian`.

    Returns:
        The number of predictions in this call.

    Raises:
        TypeError: `outputs_fn` does not return a tensor, or positions are not integers.
        ValueError: positions have the wrong shape, or there is nothing to predict, or total_predictions is not above
            zero, or there are no positions and total_predictions is larger than the number of predictions or
            torch.distributed has several ranks.
    """
    _check_total(total_predictions)
    outputs, positions = _predictions(_outputs(outputs_fn), positions, likelihood, total_predictions)
    if len(outputs) == 0:
        loss = outputs.sum()
    else:
        labels = likelihood.sample(outputs.detach(), positions, seed, step)
        loss = likelihood.loss_sum(outputs, labels) / (total_predictions or len(outputs))
    _backward(loss, grad_scaler)
    return len(outputs)


def empirical_fisher(
    outputs_fn: Callable[[], Tensor],
    targets: Tensor,  # (…) int64, the logits without their last dimension
    *,
    ignore_index: int = -100,
    total_predictions: float | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Add the gradient of the mean *training* loss to .grad and return N, for ĥ = N · g ⊙ g: an ablation.

    This does not estimate the Gauss-Newton matrix: the mean gradient is not zero, so ĥ grows with N, and it vanishes
    once the loss is fitted.

    Raises:
        TypeError: `outputs_fn` does not return a tensor.
        ValueError: targets have the wrong shape, or total_predictions is not above zero or, without it, there is nothing
            to predict.
    """
    _check_total(total_predictions)
    logits = _outputs(outputs_fn)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, expected {tuple(logits.shape[:-1])}: one for each position"
        )
    kept = targets != ignore_index
    n = int(kept.sum())
    if n == 0 and total_predictions is None:
        raise ValueError(f"nothing to predict: every target is ignore_index = {ignore_index} or the batch is empty")
    loss = F.cross_entropy(_in_full_precision(logits[kept]), targets[kept], reduction="sum") / (total_predictions or n)
    _backward(loss, grad_scaler)
    return n


def hutchinson(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    seed: int,
    step: int,
    names: Sequence[str] | None = None,
    buffers: Iterable[Tensor] = (),
    grad_scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor | None]:
    """Return ĥ = u ⊙ (∇²L u) with u ~ N(0, I), by double backward (Liu et al. 2024, Algorithm 1).

        estimates = hutchinson(lambda: F.cross_entropy(model(x), y), model.parameters(), seed=0, step=step)
        optimizer.update_hessian(estimates=estimates)

    Entries may be negative. The model must be eager (torch.compile does not support double backward) and unsharded
    (FSDP2 hides the graph); `F.scaled_dot_product_attention` runs its math kernel during the estimate. ĥ is linear in
    the loss: over equal micro-batches or ranks, average estimates made with the same u, that is, the same seed, step
    and names.

    Args:
        loss_fn: returns the mean loss (), computed from the parameters.
        params: the parameters, in the optimizer's order.
        seed: seed of the noise u.
        step: the training step.
        names: names of the parameters, which key the noise. Default: "0", "1", ….
        buffers: tensors to restore afterwards; pass `model.buffers()` to keep BatchNorm's running statistics unchanged.
        grad_scaler: scales the loss, for float16, and ĥ with it; pass the same one to `update_hessian`.

    Returns:
        ĥ for each parameter, in its shape and dtype; zeros if the loss does not depend on it, None if it is frozen
        (requires_grad=False), as `update_hessian` takes it.

    Raises:
        TypeError: `loss_fn` does not return a loss.
        ValueError: all parameters are frozen, the loss depends on none of them, or `names` do not fit.
    """
    everything = list(params)
    params, noise = _trained_with_noise(everything, seed, step, names)
    with _put_back(buffers), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        loss = _loss(loss_fn)
        scaled = loss if grad_scaler is None else grad_scaler.scale(loss)
        grads = torch.autograd.grad(scaled, params, create_graph=True, allow_unused=True)
        _check_dependence(grads)
        curved = [(grad, u) for grad, u in zip(grads, noise, strict=True) if grad is not None and grad.requires_grad]
        if not curved:  # linear in all of them
            return _with_frozen(everything, [torch.zeros_like(p) for p in params])
        products = torch.autograd.grad([g for g, _ in curved], params, [u for _, u in curved], materialize_grads=True)
    return _with_frozen(everything, [u * product for u, product in zip(noise, products, strict=True)])


@torch.no_grad()
def hutchinson_differences(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    seed: int,
    step: int,
    names: Sequence[str] | None = None,
    relative_step: float = 1e-3,
    buffers: Iterable[Tensor] = (),
) -> list[Tensor | None]:
    """Return ĥ = u ⊙ (∇L(θ+δu) - ∇L(θ-δu)) / 2δ with δ = relative_step · ‖θ‖ / ‖u‖, from first-order gradients.

    It works with fused attention, torch.compile and sharded models. On a GPT-2 in float32 it differs from the exact
    product by about 1e-3 in relative norm: the truncation error falls as δ², the rounding error grows as 1/δ. If all
    weights are zero, δ = relative_step.

    `loss_fn` is called twice and must be the same function of the weights both times, in float32 and so without autocast
    and loss scaling: pass `update_hessian` no grad_scaler. Both calls see
    the same state of torch's generators, so dropout masks agree; other randomness is the caller's responsibility.
    The weights and .grad are restored bit for bit, even if `loss_fn` raises, also the .grad of parameters that the loss
    depends on and `params` lacks. FSDP2 and reentrant checkpoints hide such parameters: with these, pass all that are
    trained. Arguments and result are those of `hutchinson`.

    Raises:
        TypeError: `loss_fn` does not return a loss.
        TypeError: half-precision weights or operations, as under autocast: rounding would swamp the difference of two
            gradients. A graph of torch.compile does not show its operations.
        ValueError: all parameters are frozen, the loss depends on none of them, `names` do not fit, or relative_step is
            not a number above zero.
    """
    if not 0 < relative_step < math.inf:
        raise ValueError(f"relative_step = {relative_step}, expected a number > 0: 1e-3 suits float32")
    everything = list(params)
    for index, p in enumerate(everything):
        if not p.requires_grad:
            continue
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {index} has dtype {p.dtype}, expected torch.float32: rounding would swamp the difference "
                "of two gradients; keep the weights in float32, or use the exact product, hutchinson()"
            )
        if torch.is_autocast_enabled(p.device.type):
            raise TypeError(
                f"autocast is on for {p.device.type}, expected float32 throughout: rounding would swamp the difference "
                "of two gradients; leave the autocast region, or use the exact product, hutchinson()"
            )
    params, noise = _trained_with_noise(everything, seed, step, names)
    size = _norm(params)
    delta = torch.where(size > 0, relative_step * size / _norm(noise), relative_step)
    weights, grads = [p.detach().clone() for p in params], _Gradients(params)

    def gradient_at(scale: Tensor) -> list[Tensor]:
        for p, weight, u in zip(params, weights, noise, strict=True):
            p.copy_(weight + u * scale)
        with torch.enable_grad():
            loss = _loss(loss_fn)
            nodes = _graph(loss)
            _check_precision(nodes)
            grads.set_aside(_leaves(loss, nodes))
            # Not autograd.grad, which DDP and FSDP do not hook, nor backward(inputs=…), which misses FSDP's own leaves.
            loss.backward()  # type: ignore[no-untyped-call]
        _check_dependence([p.grad for p in params])
        # Copies: DistributedDataParallel may return views of buckets that it reuses.
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    try:
        with _put_back(buffers):
            # Different dropout masks make a different function, and 1/2δ would amplify the difference.
            with generators_kept(p.device for p in params):
                plus = gradient_at(delta)
            minus = gradient_at(-delta)
    finally:
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
        grads.put_back()
    estimates = [u * (above - below) / (2 * delta) for u, above, below in zip(noise, plus, minus, strict=True)]
    return _with_frozen(everything, estimates)


@contextmanager
def _put_back(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of these tensors on exit."""
    saved = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


class _Gradients:
    """The .grad of tensors, to be set aside for a backward and put back after it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._saved: dict[Tensor, tuple[Tensor, Tensor] | None] = {}
        self.set_aside(tensors)

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Save the .grad of these tensors, those that are not saved yet, and clear that of all tensors known."""
        for tensor in tensors:
            if tensor not in self._saved:
                grad = tensor.grad
                # A copy too: under DistributedDataParallel, .grad may be a view of a bucket, which a backward overwrites.
                self._saved[tensor] = None if grad is None else (grad, grad.clone())
        for tensor in self._saved:
            tensor.grad = None

    def put_back(self) -> None:
        for tensor, saved in self._saved.items():
            tensor.grad = None if saved is None else saved[0].copy_(saved[1])


def _graph(loss: Tensor) -> list[Node]:
    """Return the nodes of the loss's graph."""
    found = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = {*found}
    for node in found:  # which grows
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found


def _leaves(loss: Tensor, nodes: Sequence[Node]) -> list[Tensor]:
    """Return the leaves of the loss's graph, which get a gradient in its backward."""
    named = [node for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]
    return [node.variable for node in named] if nodes else [loss]  # type: ignore[attr-defined]


def _check_precision(nodes: Iterable[Node]) -> None:
    """Raise TypeError if an operation of the graph has a half-precision result."""
    for node in nodes:
        for result in getattr(node, "_input_metadata", ()):
            if result.dtype in HALF:
                raise TypeError(
                    f"loss_fn computes in {result.dtype} ({node.name()}), expected float32 throughout: rounding would swamp "
                    "the difference of two gradients; leave the autocast region, or use the exact product, hutchinson()"
                )


def _check_dependence(grads: Iterable[Tensor | None]) -> None:
    """Raise ValueError if there is no gradient at all."""
    if all(grad is None for grad in grads):
        raise ValueError(
            "the loss depends on none of the parameters: pass those of the model that loss_fn calls; for one that FSDP2 "
            "shards, whose graph does not show its parameters, use hutchinson_differences()"
        )


def _outputs(outputs_fn: Callable[[], Tensor]) -> Tensor:
    return _returned(outputs_fn, "outputs_fn", "logits", lambda found: found.dim() > 0)


def _loss(loss_fn: Callable[[], Tensor]) -> Tensor:
    loss = _returned(loss_fn, "loss_fn", "loss", lambda found: found.numel() == 1)
    if loss.numel() != 1:
        raise TypeError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, expected a scalar: return its .mean()"
        )
    return loss


def _returned(function: Callable[[], object], name: str, wanted: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """Call a closure and return its tensor.

    Raises:
        TypeError: not a function, or it does not return a tensor; the message shows how to get one from its output.
    """
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, expected a function: wrap it in lambda: ...")
    returned = function()
    if isinstance(returned, Tensor):
        return returned
    members: Sequence[tuple[str, object]] = []
    if isinstance(getattr(returned, wanted, None), Tensor):  # a Hugging Face output, which is also a dictionary
        members = [(f".{wanted}", getattr(returned, wanted))]
    elif isinstance(returned, Mapping):
        members = sorted(
            ((f"[{key!r}]", member) for key, member in returned.items()), key=lambda one: wanted not in one[0]
        )
    elif isinstance(returned, Sequence):
        members = [(f"[{index}]", member) for index, member in enumerate(returned)]
    place = next((place for place, member in members if isinstance(member, Tensor) and fits(member)), None)
    remedy = f"return its {wanted}, as in lambda: model(x){place}" if place else f"return {wanted} as a tensor"
    raise TypeError(f"{name} returned a {type(returned).__name__}, expected a tensor: {remedy}")


def _predictions(
    outputs: Tensor, positions: Tensor | None, likelihood: Likelihood, total_predictions: float | None
) -> tuple[Tensor, Tensor]:
    """Return (n, *event) outputs of the predictions with a position >= 0, and (n,) their positions."""
    batch = outputs.shape[: outputs.dim() - likelihood.event_dims]
    if positions is None:
        _check_whole(batch.numel(), total_predictions)
        positions = torch.arange(batch.numel(), device=outputs.device).view(batch)
    elif positions.shape != batch:
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, expected {tuple(batch)}: one for each prediction"
        )
    elif positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"positions have dtype {positions.dtype}, expected integers: first + torch.arange(n)")
    elif not bool((kept := positions >= 0).all()):
        outputs, positions, batch = outputs[kept], positions[kept], torch.Size([-1])
    outputs = _in_full_precision(outputs.reshape(-1, *outputs.shape[len(batch) :]))
    if len(outputs) == 0 and total_predictions is None:
        raise ValueError("nothing to predict: the outputs are empty or every position is negative")
    return outputs, positions.reshape(-1)


def _check_total(total_predictions: float | None) -> None:
    if total_predictions is not None and not total_predictions > 0:
        raise ValueError(
            f"total_predictions = {total_predictions}, expected a number > 0: the predictions of all calls, divided by the "
            "number of ranks where gradients are averaged"
        )


def _check_whole(predictions: int, total_predictions: float | None) -> None:
    """Raise ValueError if a call without positions is part of an estimate: all parts would draw the same labels."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if total_predictions is not None and total_predictions > predictions:
        part = f"with total_predictions = {total_predictions} and {predictions} predictions in this call"
    elif ranks > 1:
        part = f"on {ranks} ranks"
    else:
        return
    raise ValueError(
        f"positions = None {part}, expected the global index of each prediction, since every call would draw the labels "
        "of 0, 1, 2, …: pass positions=first + torch.arange(n), in the shape of the outputs' predictions, with another "
        "first in each call and on each rank"
    )


def _backward(loss: Tensor, grad_scaler: torch.amp.GradScaler | None) -> None:
    scaled = loss if grad_scaler is None else grad_scaler.scale(loss)
    scaled.backward()  # type: ignore[no-untyped-call]


def _in_full_precision(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _trained_with_noise(
    params: Sequence[Tensor], seed: int, step: int, names: Sequence[str] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that require a gradient, and u for each; names belong to all parameters."""
    if names is None:
        names = [str(index) for index in range(len(params))]
    elif len(names) != len(params) or len(set(names)) != len(names):
        raise ValueError(f"{len(set(names))} different names for {len(params)} parameters, expected one for each")
    trained = {name: p for name, p in zip(names, params, strict=True) if p.requires_grad}
    if not trained:
        raise ValueError(f"none of the {len(params)} parameters requires a gradient, expected at least one")
    return list(trained.values()), [normals_like(p, seed, step, name).to(p.dtype) for name, p in trained.items()]


def _with_frozen(params: Sequence[Tensor], estimates: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the estimates with None in the places of the parameters that do not require a gradient."""
    following = iter(estimates)
    return [next(following) if p.requires_grad else None for p in params]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).square().sum().sqrt()
