"""GPT-2 (Radford et al. 2019), the model that the Sophia paper pretrains, in one file.

Tied embeddings, learned positions, pre-norm blocks, tanh GELU. The vocabulary is padded to align the shapes of the
head's matrix products; the padding is excluded from the softmax, is never sampled and receives no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import causal_attention
from models.flops import Flops
from models.language_model import INITIAL_STD, LanguageModel


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. Raises ValueError for an impossible shape."""

    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # the longest sequence, in tokens
    bias: bool = False  # in linear layers and norms
    dropout: float = 0.0
    attention_layer_scaling: bool = False  # the "attention trick": logits additionally divided by (layer index + 1)
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; heads share the width evenly"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Number of parameters, including the token embedding's padding rows; without any embeddings if so asked."""
        width = self.n_embd
        block = 12 * width**2 + 2 * width  # matrices and norm scales
        norm = width
        if self.bias:
            block += 9 * width + 2 * width  # biases of qkv, out, up and down, and norm offsets
            norm += width
        outside = self.n_layer * block + norm
        return outside + (self.padded_vocab_size + self.block_size) * width if embeddings else outside

    def flops(self, sequence_length: int) -> Flops:
        """Forward FLOPs per token: 2 · 12 d² in the linear layers of a block, 2 · 2 T d in its attention, 2 V d in the head."""
        blocks = 2 * self.n_layer * 12 * self.n_embd**2
        attention = 4 * self.n_layer * sequence_length * self.n_embd
        return Flops(trunk=blocks + attention, head=2 * self.padded_vocab_size * self.n_embd)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x); in compiled code, the backward pass recomputes it from x instead of saving it.

    For functions that cost one pass over memory and whose input is saved anyway.
    """
    if not torch.compiler.is_compiling():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form. Compiled for a CPU it is x · sigmoid(2u), since tanh(u) = 2 sigmoid(2u) - 1 and an exponential is
    cheaper than a tanh in inductor's kernels."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # A tensor, not a number: numbers are compile-time constants, so each layer would be compiled separately.
        self.logit_factor = torch.tensor(1 / (layer + 1), device="cpu") if config.attention_layer_scaling else None
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, d / n_head)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0, self.logit_factor)
        return self.out(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.down(recomputed(gelu, self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = x + self.dropout(self.attention(recomputed(self.attention_norm, x)))
        return x + self.dropout(self.mlp(recomputed(self.mlp_norm, x)))


class GPT2(LanguageModel):
    """The model with its loss: forward(tokens, targets, uniforms) -> ModelOutput.

    On a real device, the model is initialised with seed 0. On the meta device, call `to_empty` and then
    `initialize(seed)`. `compile()` compiles each block and the passes inside the loss head in place.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config.vocab_size, config.block_size)
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        if not self.token_embedding.weight.is_meta:
            self.initialize(0)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, d): the trunk's output after the final norm.

        Raises ValueError for sequences longer than block_size.
        """
        length = tokens.size(1)
        if length > self.config.block_size:
            raise ValueError(
                f"sequences of {length} tokens: block_size={self.config.block_size} is the longest this model takes"
            )
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        return self.final_norm(self.through_blocks(x))

    def initial_tensor(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """GPT-2's initialisation; the token embedding's padding rows are zero."""
        initial = super().initial_tensor(name, shape, seed)
        if name == "token_embedding.weight":
            initial[self.config.vocab_size :] = 0
        return initial

    def initial_std(self, name: str) -> float:
        """0.02, or 0.02 / sqrt(2 n_layer) for the two projections into the residual stream."""
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        return INITIAL_STD / math.sqrt(2 * self.config.n_layer) if residual else INITIAL_STD

    def flops(self, sequence_length: int) -> Flops:
        return self.config.flops(sequence_length)
