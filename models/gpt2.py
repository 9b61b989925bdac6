"""GPT-2 (Radford et al. 2019), the model that the Sophia paper pretrains, in one file.

Tied embeddings, learned positions, pre-norm blocks, tanh GELU. The vocabulary is padded to align the shapes of the
head's matrix products; the padding is excluded from the softmax, is never sampled and receives no gradient.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from models.attention import causal_attention
from models.head import LossHead, plain_losses

ParameterKind = Literal["embedding", "attention", "mlp", "norm"]
INITIAL_STD = 0.02


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


class GPT2Output(NamedTuple):
    """Sums over positions, not means: callers divide by counts over all micro-batches and ranks."""

    loss_sum: Tensor | None  # () float32, cross entropy over positions with target != -100
    sampled_loss_sum: Tensor | None  # () float32, cross entropy of labels drawn from the softmax where uniforms >= 0


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


class GPT2(nn.Module):
    """The model with its loss: forward(tokens, targets, uniforms) -> GPT2Output.

    On a real device, the model is initialised with seed 0. On the meta device, call `to_empty` and then
    `initialize(seed)`. The ModuleList `blocks` holds the blocks, which are called as modules so that `fully_shard` can
    wrap each. `compile()` compiles each block and the passes inside the loss head in place.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = LossHead(config.vocab_size)
        self.attention: Literal["sdpa", "math"] = "sdpa"
        if not self.token_embedding.weight.is_meta:
            self.initialize(0)

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, -100 for no target
        uniforms: Tensor | None = None,  # (B, T) float32 in [0, 1), negative to draw no label
    ) -> GPT2Output:
        """Cross entropy of the targets, if given, and of labels drawn with the uniforms, if given.

        Raises ValueError for sequences longer than block_size.
        """
        hidden, weight = self.hidden(tokens), self.token_embedding.weight
        if self.attention == "math":
            return GPT2Output(*plain_losses(hidden, weight, targets, uniforms, self.config.vocab_size))
        return GPT2Output(*self.head(hidden, weight, targets, uniforms))

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, d): the trunk's output after the final norm."""
        length = tokens.size(1)
        if length > self.config.block_size:
            raise ValueError(
                f"sequences of {length} tokens: block_size={self.config.block_size} is the longest this model takes"
            )
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        if not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(x, 0)  # compile once, for any batch size
        if self.attention == "math":
            with sdpa_kernel(SDPBackend.MATH):
                for block in self.blocks:
                    x = block(x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.final_norm(x)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """() float32: the mean cross entropy over positions with target != -100."""
        loss_sum = self(tokens, targets).loss_sum
        return loss_sum / (targets != -100).sum()

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, vocab_size) float32."""
        return F.linear(self.hidden(tokens), self.token_embedding.weight)[..., : self.config.vocab_size].float()

    @contextmanager
    def maths_attention(self) -> Iterator[None]:
        """Run eagerly with the math attention kernel and the plain loss head, which can be differentiated twice.

        Flash and memory-efficient attention, torch.compile and the chunked head have no double backward.
        """
        before = self.attention
        self.attention = "math"
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.attention = before

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block and the passes inside the loss head in place, with torch.compile's arguments.

        All blocks share one compiled graph. Turns off donated buffers for the whole process, so that both losses of one
        forward pass can be differentiated, the first with retain_graph=True.
        """
        torch._functorch.config.donated_buffer = False
        # The backward pass of attention is such a function, and depends on nothing outside of it.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        for block in self.blocks:
            block.compile(*args, **kwargs)
        self.head.compile(*args, **kwargs)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Initialise like GPT-2; each tensor is a pure function of (seed, its name) on any device and sharding.

        Normal with standard deviation 0.02, or 0.02 / sqrt(2 n_layer) for the two projections into the residual
        stream. Biases and the embedding's padding rows are zero, norms one.
        """
        for name, parameter in self.named_parameters():
            initial = self.initial_tensor(name, parameter.shape, seed).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                # Each rank generated the whole tensor and keeps its shard, without communication.
                sharded = distribute_tensor(initial, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(sharded.to_local())
            else:
                parameter.copy_(initial)

    def initial_tensor(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if parameter_kind(name) == "norm":
            return torch.ones(shape)
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = INITIAL_STD / math.sqrt(2 * self.config.n_layer) if residual else INITIAL_STD
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        initial = torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
        if name == "token_embedding.weight":
            initial[self.config.vocab_size :] = 0
        return initial


def parameter_kind(name: str) -> ParameterKind:
    """The part of the model that a parameter belongs to, from its name in `GPT2.named_parameters()`.

    Raises ValueError for an unknown name.
    """
    parts = name.split(".")
    rules: dict[ParameterKind, Callable[[str], bool]] = {
        "norm": lambda part: part.endswith("norm"),
        "embedding": lambda part: part.endswith("embedding"),
        "attention": lambda part: part == "attention",
        "mlp": lambda part: part == "mlp",
    }
    for kind, matches in rules.items():
        if any(matches(part) for part in parts):
            return kind
    raise ValueError(f"{name!r} is not a parameter of GPT2; expected a name such as blocks.0.attention.qkv.weight")
