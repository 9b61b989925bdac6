"""The loss head: from hidden states to cross entropies of targets and of labels drawn from the model's softmax.

A small GPT-2 spends over half of its training step here. Logits are computed for a few thousand positions at a time, and
their softmax, losses and gradients immediately, in place. So neither the whole batch's logits nor any full logits in
fp32 are ever held. Softmax, sampling and loss are in fp32 for any precision of the product.

Both losses share one softmax. Their gradients with respect to the logits, softmax - onehot(target) and
softmax - onehot(label), differ in two entries per row. So once the target's gradient has passed through the two matrix
products of the backward pass, look-ups give the label's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # target of a position without one, as in torch.nn.functional.cross_entropy
# Positions per chunk of logits. On CPUs, with or without bf16 tiles, 2048 to 8192 are within 3 % of each other; fewer take
# less memory.
CHUNK_ROWS = {"cpu": 2048, "cuda": 8192}
EAGER_ROWS = 256  # positions per fp32 slice of logits in uncompiled code
BLOCK = 128  # vocabulary columns per block of the sampler

Losses = tuple[Tensor | None, Tensor | None]


def log_normalizer(
    logits: Tensor,  # (N, V)
) -> Tensor:  # (N,) float32: log sum exp
    wide = logits.float()
    maximum = wide.amax(dim=-1)
    return maximum + (wide - maximum[:, None]).exp().sum(dim=-1).log()


def row_maximum(
    logits: Tensor,  # (N, V)
) -> Tensor:  # (N,) float32
    return logits.amax(dim=-1).float()


def exponentials_(
    logits: Tensor,  # (N, V), replaced by exp(logits - maximum)
) -> tuple[Tensor, Tensor]:  # (N,) float32 each: row maximum, and sum of exponentials before rounding
    wide = logits.float()
    maximum = wide.amax(dim=-1)
    # exp2, since inductor keeps an exp that is used twice in an fp32 buffer, which costs more than computing it twice.
    exponentials = ((wide - maximum[:, None]) * 1.4426950408889634).exp2()
    logits.copy_(exponentials)
    return maximum, exponentials.sum(dim=-1)


def block_masses(
    logits: Tensor,  # (N, V)
    shift: Tensor,  # (N,) float32
) -> tuple[Tensor, Tensor]:  # (N, ⌊V / BLOCK⌋) and (N, 1) float32: sums of exp(logits - shift) over blocks and the rest
    whole = logits.size(1) // BLOCK
    blocks = logits[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).float()
    rest = logits[:, whole * BLOCK :].float()
    return (
        (blocks - shift[:, None, None]).exp().sum(dim=-1),
        (rest - shift[:, None]).exp().sum(dim=-1, keepdim=True),
    )


def add_(
    total: Tensor,  # (N, d) float32
    part: Tensor,  # (N, d) in the products' precision
) -> None:
    total.add_(part.float())


class Passes(NamedTuple):
    """The passes over tensors too large for the caches: a chunk's logits and the weight's gradient."""

    log_normalizer: Callable[[Tensor], Tensor]
    row_maximum: Callable[[Tensor], Tensor]
    block_masses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    exponentials_: Callable[[Tensor], tuple[Tensor, Tensor]]
    add_: Callable[[Tensor, Tensor], None]


UNCOMPILED = Passes(log_normalizer, row_maximum, block_masses, exponentials_, add_)


class LossHead(nn.Module):
    """Summed cross entropies over the first vocab_size rows of the weight: of targets and of drawn labels."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.passes = Passes(*[_in_slices(function) for function in UNCOMPILED])

    @torch.compiler.disable
    def forward(
        self,
        hidden: Tensor,  # (B, T, d)
        weight: Tensor,  # (padded_vocab_size, d)
        targets: Tensor | None,  # (B, T) int64, -100 for no target
        uniforms: Tensor | None,  # (B, T) float32 in [0, 1), negative to draw no label
    ) -> Losses:
        """Compute the requested losses in chunks; they can be differentiated once.

        The targets' loss and its gradient are NaN if a target is negative and not -100. With both losses, labels must be
        drawn at exactly the positions that have targets, since both share one softmax: otherwise the labels' loss and
        its gradient are NaN. The host waits for neither check. Call `sampled_loss_sum.backward(retain_graph=True)`
        before `loss_sum.backward()`.
        """
        if targets is None and uniforms is None:
            return None, None
        hidden = hidden.flatten(0, -2)
        if targets is not None:
            targets = targets.flatten()
        if uniforms is not None:
            uniforms = uniforms.flatten()
        loss_sum, sampled_loss_sum = self._losses(hidden, weight, targets, uniforms)
        if targets is not None and loss_sum is not None:
            loss_sum = loss_sum * nan_if(is_invalid(targets))
        if targets is not None and uniforms is not None and sampled_loss_sum is not None:
            sampled_loss_sum = sampled_loss_sum * nan_if((targets == IGNORED) != (uniforms < 0))
        return loss_sum, sampled_loss_sum

    def _losses(self, hidden: Tensor, weight: Tensor, targets: Tensor | None, uniforms: Tensor | None) -> Losses:
        device = hidden.device.type
        dtype = weight.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return _ChunkedLosses.apply(self, hidden, weight, targets, uniforms, dtype, torch.is_grad_enabled())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the passes over the logits, with torch.compile's arguments."""
        self.passes = Passes(*[_of_any_length(torch.compile(function, *args, **kwargs)) for function in UNCOMPILED])


def is_invalid(
    targets: Tensor,  # (N,) int64
) -> Tensor:  # (N,) bool: negative and not -100. Indexing refuses a target that is too large.
    return (targets < 0) & (targets != IGNORED)


def nan_if(
    wrong: Tensor,  # (N,) bool
) -> Tensor:  # () float32: NaN if any is, else 1. A factor of a loss, since an exception would make the host wait.
    return torch.where(wrong.any(), torch.nan, 1.0)


def plain_losses(
    hidden: Tensor,  # (B, T, d)
    weight: Tensor,  # (padded_vocab_size, d)
    targets: Tensor | None,  # (B, T) int64, -100 for no target
    uniforms: Tensor | None,  # (B, T) float32 in [0, 1), negative to draw no label
    vocab_size: int,
) -> Losses:
    """The same losses from full logits, which can be differentiated twice; the reference for LossHead."""
    logits = F.linear(hidden.flatten(0, -2), weight)[:, :vocab_size].float()
    loss_sum = sampled_loss_sum = None
    if targets is not None:
        loss_sum = cross_entropy_sum(logits, targets.flatten())
    if uniforms is not None:
        labels = sample_labels(logits, uniforms.flatten())
        sampled_loss_sum = cross_entropy_sum(logits, labels)
    return loss_sum, sampled_loss_sum


def cross_entropy_sum(
    logits: Tensor,  # (N, V) float32
    targets: Tensor,  # (N,) int64, -100 for no target
) -> Tensor:  # ()
    """F.cross_entropy(…, reduction="sum") with half as many passes over the logits when differentiated twice.

    It is NaN if a target is negative and not -100.
    """
    loss_sum: Tensor = _CrossEntropySum.apply(logits, targets)
    return loss_sum * nan_if(is_invalid(targets))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.where(targets != IGNORED, logits.logsumexp(dim=-1) - picked, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        share = torch.where(targets != IGNORED, gradients[0], 0)[:, None]
        d_logits = logits.softmax(dim=-1) * share
        return d_logits.scatter_add_(1, targets.clamp(min=0)[:, None], -share), None


class _ChunkedLosses(torch.autograd.Function):
    """Losses and, while the logits are in memory, gradients. If both losses are computed, they count the same positions.

    The gradients are of the leading loss: the targets' if there are targets, else the labels'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: LossHead,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (padded_vocab_size, d)
        targets: Tensor | None,  # (N,)
        uniforms: Tensor | None,  # (N,)
        dtype: torch.dtype,  # of the matrix products
        differentiable: bool,
    ) -> Losses:
        narrow_hidden, narrow_weight = hidden.to(dtype), weight.to(dtype)
        rows, padded_vocab_size = len(hidden), len(weight)
        chunk_rows = rows_per_chunk(rows, hidden.device.type)
        labels = None if uniforms is None else torch.empty_like(uniforms, dtype=torch.int64)
        leading = targets if targets is not None else labels
        assert leading is not None
        loss_sum = None if targets is None else hidden.new_zeros((), dtype=torch.float32)
        sampled_loss_sum = None if labels is None else hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(narrow_hidden) if differentiable else None
        d_weight: Tensor | None = None
        buffer = narrow_hidden.new_empty(chunk_rows, padded_vocab_size)

        for start in range(0, rows, chunk_rows):
            part = slice(start, min(start + chunk_rows, rows))
            logits = torch.mm(narrow_hidden[part], narrow_weight.t(), out=buffer[: part.stop - part.start])
            real = logits[:, : head.vocab_size]
            if labels is not None and uniforms is not None:
                labels[part] = draw(real, head.passes.row_maximum(real), uniforms[part], head.passes.block_masses)
            counted = leading[part] != IGNORED
            index = torch.arange(len(real), device=real.device)
            targets_logits = None if targets is None else real[index, targets[part].clamp(min=0)].float()
            labels_logits = None if labels is None else real[index, labels[part].clamp(min=0)].float()
            if d_hidden is None:
                normalizer = head.passes.log_normalizer(real)
            else:
                largest, total = head.passes.exponentials_(real)
                normalizer = largest + total.log()
            if loss_sum is not None and targets_logits is not None:
                loss_sum += torch.where(counted, normalizer - targets_logits, 0).sum()
            if sampled_loss_sum is not None and labels_logits is not None:
                sampled_loss_sum += torch.where(counted, normalizer - labels_logits, 0).sum()

            if d_hidden is not None:
                # total · (softmax - onehot); the division by the total comes later, where rows are d wide and not V. The
                # label's entry is computed in fp32 separately: for a confident token, rounded probability - 1 is noise.
                share = torch.where(counted, 1 / total, 0)[:, None]
                leading_logits = targets_logits if targets_logits is not None else labels_logits
                assert leading_logits is not None
                real[index, leading[part].clamp(min=0)] = ((leading_logits - largest).exp() - total).to(dtype)
                logits[:, head.vocab_size :] = 0
                d_hidden[part] = torch.mm(logits, narrow_weight) * share
                scaled = (narrow_hidden[part] * share).to(dtype)
                if d_weight is None:
                    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
                    d_weight.copy_(_weight_gradient(logits, scaled))
                elif dtype == torch.float32:
                    d_weight.addmm_(logits.t(), scaled)
                else:
                    head.passes.add_(d_weight, _weight_gradient(logits, scaled))

        if differentiable:
            if d_weight is None:  # no rows
                d_weight = torch.zeros_like(weight, dtype=torch.float32)
            ctx.set_materialize_grads(False)
            ctx.gradients = d_hidden, d_weight
            ctx.dtypes = hidden.dtype, weight.dtype
            ctx.both = targets is not None and labels is not None
            if ctx.both:
                ctx.save_for_backward(narrow_hidden, narrow_weight, targets, labels)
        return loss_sum, sampled_loss_sum

    @staticmethod
    def backward(ctx: Any, *loss_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the loss head's gradients cannot be differentiated again: they are computed in the forward pass. To use "
                "create_graph=True, compute the loss inside model.maths_attention()"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss head's gradients are already used: they are computed in the forward pass and can be used once. "
                "With both losses, call sampled_loss_sum.backward(retain_graph=True) before loss_sum.backward()"
            )
        d_loss, d_sampled_loss = loss_gradients
        if not ctx.both:
            d_loss, d_sampled_loss = d_loss if d_loss is not None else d_sampled_loss, None
        d_hidden = d_weight = None
        if d_sampled_loss is not None:
            d_hidden, d_weight = _relabelled(ctx.gradients, ctx.saved_tensors, d_sampled_loss)
        if d_loss is not None:
            # Scale the weight's gradient in place and hand it over, so that autograd does not copy it.
            leading_d_hidden, leading_d_weight = ctx.gradients
            ctx.gradients = None
            leading_d_hidden, leading_d_weight = leading_d_hidden * d_loss, leading_d_weight.mul_(d_loss)
            d_hidden = leading_d_hidden if d_hidden is None else d_hidden + leading_d_hidden
            d_weight = leading_d_weight if d_weight is None else d_weight.add_(leading_d_weight)
        if d_hidden is None or d_weight is None:
            return (None,) * 7
        hidden_dtype, weight_dtype = ctx.dtypes
        return None, d_hidden.to(hidden_dtype), d_weight.to(weight_dtype), None, None, None, None


def _weight_gradient(
    logits: Tensor,  # (N, V) their gradients
    hidden: Tensor,  # (N, d)
) -> Tensor:  # (V, d), the transposed view of a product on CPUs
    # bf16 products on CPUs copy an operand that they have to transpose: the hidden states are the smaller one.
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        return torch.mm(hidden.t().contiguous(), logits).t()
    return torch.mm(logits.t(), hidden)


def _relabelled(
    gradients: tuple[Tensor, Tensor],  # (N, d) and (padded_vocab_size, d) float32, of the targets' loss
    saved: tuple[Tensor, ...],  # hidden (N, d), weight (padded_vocab_size, d), targets (N,), labels (N,)
    scale: Tensor,  # ()
) -> tuple[Tensor, Tensor]:  # (N, d), (padded_vocab_size, d) float32: scale times the gradients of the labels' loss
    """(p - onehot(label)) W = (p - onehot(target)) W + W[target] - W[label], and likewise for the weight's gradient."""
    d_hidden, d_weight = gradients
    hidden, weight, targets, labels = saved
    counted = (targets != IGNORED)[:, None]
    targets, labels = targets.clamp(min=0), labels.clamp(min=0)
    change = torch.where(counted, weight[targets].float() - weight[labels].float(), 0)
    share = torch.where(counted, hidden.float() * scale, 0)
    d_weight = d_weight * scale
    d_weight.index_add_(0, targets, share).index_add_(0, labels, share, alpha=-1)
    return (d_hidden.float() + change) * scale, d_weight


def sample_labels(
    logits: Tensor,  # (N, V)
    uniforms: Tensor,  # (N,) float32 in [0, 1), negative to draw no label
) -> Tensor:  # (N,) int64, -100 where no label was drawn
    """Labels drawn from softmax(logits) by inverse CDF: the first whose cumulative probability exceeds the uniform.

    A row's label depends only on its logits and its uniform. A token of probability zero is never drawn, even as the
    uniform tends to 1.
    """
    logits = logits.detach()
    return draw(logits, row_maximum(logits), uniforms, block_masses)


def draw(
    logits: Tensor,  # (N, V)
    shift: Tensor,  # (N,) float32: close to the largest logit, so that exp(logits - shift) is in range
    uniforms: Tensor,  # (N,) float32
    block_masses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:  # (N,) int64
    """Search the cumulative sum over blocks of the vocabulary first, then inside the chosen block."""
    masses = torch.cat(block_masses(logits, shift), dim=1)
    cumulative = running_sum(masses)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, masses, threshold)
    before = (cumulative - masses).gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = logits.gather(1, columns.clamp(max=logits.size(1) - 1)).float()
    probabilities = torch.where(columns < logits.size(1), (inside - shift[:, None]).exp(), 0)
    column = _first_above(running_sum(probabilities), probabilities, threshold - before)
    return torch.where(uniforms < 0, IGNORED, (block * BLOCK + column)[:, 0])


def running_sum(
    values: Tensor,  # (N, K) floating
) -> Tensor:  # (N, K)
    """values.cumsum(dim=-1), which torch refuses on CUDA under deterministic algorithms; there, sums over 1, 2, 4, … places."""
    if values.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(dim=-1)
    places = 1
    while places < values.size(1):
        values = values + F.pad(values[:, :-places], (places, 0))
        places *= 2
    return values


def _first_above(cumulative: Tensor, mass: Tensor, threshold: Tensor) -> Tensor:
    """(N, 1): the first index with mass and a cumulative sum above the threshold, else the last index with mass.

    Rounding can put the threshold at the last cumulative sum, which then no index exceeds. Mass is required because a
    parallel cumulative sum may grow by rounding at an index without mass.
    """
    index = torch.arange(mass.size(1), device=mass.device)
    last = torch.where(mass > 0, index, 0).amax(dim=-1, keepdim=True)
    first = torch.where((mass > 0) & (cumulative > threshold), index, mass.size(1)).amin(dim=-1, keepdim=True)
    return torch.minimum(first, last)


def rows_per_chunk(rows: int, device: str) -> int:
    """The rows per chunk: equal chunks of about CHUNK_ROWS, so that no short one is left over; at least 1."""
    return max(1, -(-rows // max(1, round(rows / CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])))))


def _in_slices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply an uncompiled function to slices of EAGER_ROWS rows, since it widens all its rows to fp32."""

    def over_slices(*arguments: Tensor) -> Any:
        results = [function(*slices) for slices in zip(*(a.split(EAGER_ROWS) for a in arguments), strict=True)]
        if results[0] is None:
            return None
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    return over_slices


def _of_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose number of rows is marked as dynamic."""

    def told(*arguments: Tensor) -> Any:
        for argument in arguments:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
        return function(*arguments)

    return told
