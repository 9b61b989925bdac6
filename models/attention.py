"""Causal attention: torch's kernels, and a route for compiled models on CPUs that is made of large matrix products.

torch's flash kernel for CPUs works in tiles so small that its products run at a fraction of the machine's rate;
most of a small GPT-2's time outside of the linear layers goes there. Over blocks of a few hundred queries, each
against the keys that it may see, the products run at full rate and inductor fuses what lies between. Scores are
held for one block at a time and computed anew in the backward pass, as the flash kernel does, so that memory
grows with the length and not with its square beyond one block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALLEST_BLOCK = 256  # queries; fewer make small products, more waste work on masked pairs
MOST_BLOCKS = 4  # of a sequence: each is code of its own to compile


def causal_attention(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H, T, D)
    value: Tensor,  # (B, H, T, D)
    dropout: float = 0.0,
    logit_factor: Tensor | None = None,  # () float32 on the CPU: multiplies the logits besides 1/sqrt(D)
) -> Tensor:  # (B, H, T, D)
    """softmax(query keyᵀ logit_factor / sqrt(D) + causal mask) value, by the route that is fastest here."""
    if torch.compiler.is_compiling() and query.device.type == "cpu" and not dropout:
        # Without the checkpoint, the compiler would see that the backward pass repeats products and keep them instead.
        return checkpoint(
            _BlockedAttention.apply, query, key, value, logit_factor, use_reentrant=False, preserve_rng_state=False
        )
    if logit_factor is not None:
        query = query * logit_factor
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, logit_factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, logit_factor)
        outputs = []
        for start, stop in _query_blocks(query.size(-2)):
            weights, total = _weights(query, key, start, stop, logit_factor)
            outputs.append((weights @ value[..., :stop, :] / total).to(value.dtype))
        return torch.cat(outputs, dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, logit_factor = ctx.saved_tensors
        (d_output,) = gradients
        length, dtype = query.size(-2), query.dtype
        d_queries: list[Tensor] = []
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        for start, stop in reversed(_query_blocks(length)):
            d_block = d_output[..., start:stop, :]
            weights, total = _weights(query, key, start, stop, logit_factor)
            d_weights = (d_block @ value[..., :stop, :].transpose(-1, -2)).float()
            inner = (weights * d_weights).sum(dim=-1, keepdim=True) / total
            d_logits = (weights * (d_weights - inner) * (_factor(query, logit_factor) / total)).to(dtype)
            d_queries.insert(0, d_logits @ key[..., :stop, :])
            unseen = (0, 0, 0, length - stop)
            d_key = d_key + F.pad((d_logits.transpose(-1, -2) @ query[..., start:stop, :]).float(), unseen)
            d_value = d_value + F.pad((weights.transpose(-1, -2) @ (d_block / total).to(dtype)).float(), unseen)
        return torch.cat(d_queries, dim=-2), d_key.to(dtype), d_value.to(dtype), None


def _query_blocks(length: int) -> list[tuple[int, int]]:
    rows = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _factor(query: Tensor, logit_factor: Tensor | None) -> Tensor | float:
    scale = query.size(-1) ** -0.5
    return scale if logit_factor is None else logit_factor * scale


def _weights(query: Tensor, key: Tensor, start: int, stop: int, logit_factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of the queries from start to stop over the keys before stop: numerators and their sums.

    Numerators (B, H, stop - start, stop) have the queries' precision and are 0 for later keys; sums
    (B, H, stop - start, 1) are float32. Rounding comes before summing, so that inductor keeps no copy in fp32.
    """
    products = query[..., start:stop, :] @ key[..., :stop, :].transpose(-1, -2)
    # int32 is as wide as the logits: masks of int64 comparisons would have to be narrowed, which is slower.
    position = torch.arange(stop, device=query.device, dtype=torch.int32)
    later = position > position[start:, None]
    logits = (products.float() * _factor(query, logit_factor)).masked_fill(later, -torch.inf)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp().to(query.dtype)
    return weights, weights.float().sum(dim=-1, keepdim=True)
