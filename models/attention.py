"""Causal attention: torch's kernels, and in models compiled for CPUs a backward pass made of large matrix products.

The forward pass of torch's flash kernel for CPUs is fast, but its backward pass uses tiles so small that products run at
a fraction of the machine's rate. Over blocks of a few hundred queries, each with the keys that it may see, products run
at full rate and inductor fuses the operations between them. Scores are held for one block at a time, so memory does not
grow with the square of the length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_BLOCK = 256  # queries; smaller blocks make small products, larger ones waste work on masked pairs
MOST_BLOCKS = 4  # per sequence; each block is compiled separately


def causal_attention(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H, T, D)
    value: Tensor,  # (B, H, T, D)
    dropout: float = 0.0,
    logit_factor: Tensor | None = None,  # () float32 on the CPU: multiplies the logits in addition to 1/sqrt(D)
) -> Tensor:  # (B, H, T, D)
    """softmax(query keyᵀ logit_factor / sqrt(D) + causal mask) value, by the fastest implementation for the device."""
    if logit_factor is not None:
        query = query * logit_factor
    if torch.compiler.is_compiling() and query.device.type == "cpu" and not dropout:
        output: Tensor = _BlockedBackward.apply(query, key, value)
        return output
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


class _BlockedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # normalizer (B, H, T) float32: log sum exp of a query's logits over its visible keys
        output, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=0.0, is_causal=True
        )
        ctx.save_for_backward(query, key, value, normalizer)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, normalizer = ctx.saved_tensors
        (d_output,) = gradients
        length, dtype, scale = query.size(-2), query.dtype, query.size(-1) ** -0.5
        d_queries: list[Tensor] = []
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        for start, stop in reversed(_query_blocks(length)):
            queries, d_block, seen = query[..., start:stop, :], d_output[..., start:stop, :], key[..., :stop, :]
            logits = (queries @ seen.transpose(-1, -2)).float() * scale
            # int32, as wide as the logits: masks of int64 comparisons would have to be narrowed, which is slower.
            position = torch.arange(stop, device=query.device, dtype=torch.int32)
            later = position > position[start:, None]
            # The product rounds logits, so a query's weights sum to 1 only approximately. They are renormalised, since
            # otherwise large logits double the gradients' error. The clamps keep gradients finite even where the
            # rounding error alone exceeds the range of exp.
            shifted = (logits - normalizer[..., start:stop, None]).clamp(max=80)
            weights = shifted.exp().masked_fill(later, 0).to(dtype)
            total = weights.float().sum(dim=-1, keepdim=True).clamp(min=1e-30)
            d_weights = (d_block @ value[..., :stop, :].transpose(-1, -2)).float()
            inner = (weights * d_weights).sum(dim=-1, keepdim=True) / total
            d_logits = (weights * (d_weights - inner) * (scale / total)).to(dtype)
            d_queries.insert(0, d_logits @ seen)
            unseen = (0, 0, 0, length - stop)
            d_key = d_key + F.pad((d_logits.transpose(-1, -2) @ queries).float(), unseen)
            d_value = d_value + F.pad((weights.transpose(-1, -2) @ (d_block / total).to(dtype)).float(), unseen)
        return torch.cat(d_queries, dim=-2), d_key.to(dtype), d_value.to(dtype)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    rows = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]
