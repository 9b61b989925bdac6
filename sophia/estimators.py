"""Estimators of the diagonal curvature for plain loops: a line before `update_hessian`.

Random numbers come from `sophia.random`: labels are a function of (seed, step, global position), Hutchinson's noise
one of (seed, step, parameter name, index), so that they depend neither on the split into micro-batches nor on the
ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.likelihoods import Categorical, Likelihood
from sophia.random import generators_kept, normals_like


def gauss_newton_bartlett(
    outputs_fn: Callable[[], Tensor],
    *,
    seed: int,
    step: int,
    positions: Tensor | None = None,
    total_predictions: int | None = None,
    likelihood: Likelihood = Categorical(),  # noqa: B008 frozen
    grad_scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Samples labels from the model, adds the gradient of the mean loss against them to .grad, and returns N.

        n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
        optimizer.update_hessian(num_predictions=n)

    (Liu et al. 2024, Algorithm 2.) Do not clip the gradient in between, and zero it before and after. With several
    micro-batches, each call adds its share of one mean: give the calls different `positions` and the same
    `total_predictions` N, and `update_hessian` the sum of what they return. Under DistributedDataParallel, which
    *averages* gradients, total_predictions is N / world size on each rank, while `update_hessian` gets the N of all
    ranks.

    Args:
        outputs_fn: returns the model's outputs: logits (…, V) for the default likelihood.
        seed: of the labels.
        step: the training step.
        positions: int64, one for each prediction (logits without their last dimension): its global index in this step's
            estimate, which decides its label. Negative ones are left out. By default 0, 1, 2, …
        total_predictions: N by which the sum is divided; by default the predictions of this call.
        likelihood: the distribution behind the training loss (`sophia.likelihoods`).
        grad_scaler: scales the loss, for float16; give the same one to `update_hessian`.

    Returns:
        The number of predictions in this call.

    Raises:
        TypeError: `outputs_fn` returns no tensor.
        ValueError: positions of the wrong shape, or no prediction.
    """
    outputs, positions = _predictions(_outputs(outputs_fn), positions, likelihood)
    labels = likelihood.sample(outputs.detach(), positions, seed, step)
    loss = likelihood.loss_sum(outputs, labels) / (total_predictions or len(outputs))
    _backward(loss, grad_scaler)
    return len(outputs)


def empirical_fisher(
    outputs_fn: Callable[[], Tensor],
    targets: Tensor,  # (…) int64, the logits without their last dimension
    *,
    ignore_index: int = -100,
    total_predictions: int | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Adds the gradient of the mean *training* loss to .grad and returns N, for ĥ = N · g ⊙ g: an ablation.

    No estimate of the Gauss-Newton matrix: N times the square of a mean that is not zero grows with N, and where
    the loss has been fitted it vanishes.

    Raises:
        TypeError: `outputs_fn` returns no tensor.
        ValueError: targets of the wrong shape, or none to predict.
    """
    logits = _outputs(outputs_fn)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, expected {tuple(logits.shape[:-1])}: one for each position"
        )
    kept = targets != ignore_index
    n = int(kept.sum())
    if n == 0:
        raise ValueError(f"no prediction: every target is ignore_index = {ignore_index} or the batch is empty")
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
) -> list[Tensor]:
    """ĥ = u ⊙ (∇²L u) with u ~ N(0, I), by double backward (Liu et al. 2024, Algorithm 1). Entries may be negative.

        estimates = hutchinson(lambda: F.cross_entropy(model(x), y), model.parameters(), seed=0, step=step)
        optimizer.update_hessian(estimates=estimates)

    The model must be eager (torch.compile has no double backward) and whole on this rank (FSDP2 hides the graph);
    attention by `F.scaled_dot_product_attention` takes its mathematical form meanwhile. ĥ is linear in the loss:
    over micro-batches or ranks of one size take the mean of the estimates, all with the same u, that is, the same
    seed, step and names.

    Args:
        loss_fn: returns the mean loss (), computed from the parameters.
        params: in the order of the optimizer's.
        seed: of the noise u.
        step: the training step.
        names: of the parameters, which key the noise; by default "0", "1", ….
        buffers: put back afterwards; `model.buffers()` where BatchNorm would take the estimate into its running mean.

    Returns:
        ĥ for each parameter, in its shape and dtype; zeros for one on which the loss does not depend.
    """
    params = list(params)
    noise = _noise(params, seed, step, names)
    with _put_back(buffers), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        grads = torch.autograd.grad(_loss(loss_fn), params, create_graph=True, materialize_grads=True)
        curved = [(grad, u) for grad, u in zip(grads, noise, strict=True) if grad.requires_grad]
        if not curved:  # linear in all of them
            return [torch.zeros_like(p) for p in params]
        products = torch.autograd.grad([g for g, _ in curved], params, [u for _, u in curved], materialize_grads=True)
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
    buffers: Iterable[Tensor] = (),
) -> list[Tensor]:
    """ĥ = u ⊙ (∇L(θ+δu) - ∇L(θ-δu)) / 2δ with δ = relative_step · ‖θ‖ / ‖u‖: first-order gradients suffice.

    So it works with fused attention, torch.compile and sharded models. About 1e-3 from the exact product in relative
    norm on a GPT-2 in float32: the truncation error falls as δ², the rounding error grows as 1/δ. Where all weights
    are zero, δ = relative_step. `loss_fn` must not use autocast. It is called twice and has to be the same function of
    the weights both times: torch's generators, from which dropout draws, stand alike at both calls; other randomness
    must not change between them. .grad is left alone and the weights come back bit for bit, also where `loss_fn`
    raises. Arguments and result as of `hutchinson`.

    Raises:
        TypeError: `loss_fn` returns no loss.
        TypeError: weights in half precision, or autocast: the difference of two gradients would drown in rounding.
    """
    params = list(params)
    for index, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {index} has dtype {p.dtype}, expected torch.float32: the difference of two gradients "
                "would drown in rounding; keep the weights in float32, or take the exact product, hutchinson()"
            )
        if torch.is_autocast_enabled(p.device.type):
            raise TypeError(
                f"autocast is on for {p.device.type}, expected float32 throughout: the difference of two gradients "
                "would drown in rounding; leave the autocast region, or take the exact product, hutchinson()"
            )
    noise = _noise(params, seed, step, names)
    size = _norm(params)
    delta = torch.where(size > 0, relative_step * size / _norm(noise), relative_step)
    weights, grads = [p.detach().clone() for p in params], [p.grad for p in params]

    def gradient_at(scale: Tensor) -> list[Tensor]:
        for p, weight, u in zip(params, weights, noise, strict=True):
            p.copy_(weight + u * scale)
            p.grad = None
        with torch.enable_grad():
            _loss(loss_fn).backward()  # type: ignore[no-untyped-call] # not autograd.grad, which DDP and FSDP do not hook
        # Copies: DistributedDataParallel may hand out views of buckets that it uses again.
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    try:
        with _put_back(buffers):
            # Other dropout masks would be another function, and the difference of the two would be divided by 2δ.
            with generators_kept(p.device for p in params):
                plus = gradient_at(delta)
            minus = gradient_at(-delta)
    finally:
        for p, weight, grad in zip(params, weights, grads, strict=True):
            p.copy_(weight)
            p.grad = grad
    return [u * (above - below) / (2 * delta) for u, above, below in zip(noise, plus, minus, strict=True)]


@contextmanager
def _put_back(buffers: Iterable[Tensor]) -> Iterator[None]:
    """What these tensors held before, they hold afterwards."""
    saved = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


def _outputs(outputs_fn: Callable[[], Tensor]) -> Tensor:
    return _returned(outputs_fn, "outputs_fn", "logits", lambda found: found.dim() > 0)


def _loss(loss_fn: Callable[[], Tensor]) -> Tensor:
    loss = _returned(loss_fn, "loss_fn", "loss", lambda found: found.numel() == 1)
    if loss.numel() != 1:
        raise TypeError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, expected one number: return its .mean()"
        )
    return loss


def _returned(function: Callable[[], object], name: str, wanted: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """The tensor that a closure returns.

    Raises:
        TypeError: it is no function, or returns no tensor; with the expression for the tensor in it where there is one.
    """
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, expected a function: write lambda: ... before it")
    returned = function()
    if isinstance(returned, Tensor):
        return returned
    members: Sequence[tuple[str, object]] = []
    if isinstance(getattr(returned, wanted, None), Tensor):  # an output of Hugging Face's, which is a dictionary too
        members = [(f".{wanted}", getattr(returned, wanted))]
    elif isinstance(returned, Mapping):
        members = sorted(
            ((f"[{key!r}]", member) for key, member in returned.items()), key=lambda one: wanted not in one[0]
        )
    elif isinstance(returned, Sequence):
        members = [(f"[{index}]", member) for index, member in enumerate(returned)]
    place = next((place for place, member in members if isinstance(member, Tensor) and fits(member)), None)
    remedy = f"take {wanted} out, as in lambda: model(x){place}" if place else f"return {wanted} as a tensor"
    raise TypeError(f"{name} returned a {type(returned).__name__}, expected a tensor: {remedy}")


def _predictions(outputs: Tensor, positions: Tensor | None, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """(n, *event) the outputs of the predictions that count, and (n,) their positions."""
    batch = outputs.shape[: outputs.dim() - likelihood.event_dims]
    if positions is None:
        positions = torch.arange(batch.numel(), device=outputs.device).view(batch)
    elif positions.shape != batch:
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, expected {tuple(batch)}: one for each prediction"
        )
    else:
        outputs, positions, batch = outputs[positions >= 0], positions[positions >= 0], torch.Size([-1])
    outputs = _in_full_precision(outputs.reshape(-1, *outputs.shape[len(batch) :]))
    if len(outputs) == 0:
        raise ValueError("no prediction: the outputs are empty or every position is negative")
    return outputs, positions.reshape(-1)


def _backward(loss: Tensor, grad_scaler: torch.amp.GradScaler | None) -> None:
    scaled = loss if grad_scaler is None else grad_scaler.scale(loss)
    scaled.backward()  # type: ignore[no-untyped-call]


def _in_full_precision(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _noise(params: Sequence[Tensor], seed: int, step: int, names: Sequence[str] | None) -> list[Tensor]:
    if names is None:
        names = [str(index) for index in range(len(params))]
    elif len(names) != len(params) or len(set(names)) != len(names):
        raise ValueError(f"{len(set(names))} different names for {len(params)} parameters, expected one for each")
    return [normals_like(p, seed, step, name).to(p.dtype) for p, name in zip(params, names, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).square().sum().sqrt()
