"""A model of one's own: rotary positions, RMS norms and a SwiGLU, with GPT-2's width, depth and heads.

    python train.py model=gpt2_micro model.architecture=examples.my_model:Rotary optimizer=sophiag
    python train.py -m model.architecture=examples.my_model:Rotary model.arguments.expansion=2,4 optimizer=adamw,sophiag

docs/model.md says what a model has to offer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LanguageModel
from models.attention import causal_attention


class Attention(nn.Module):
    """Causal attention whose queries and keys carry their positions."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = causal_attention(rotated(q), rotated(k), v)
        return self.out(y.transpose(1, 2).flatten(-2))


def rotated(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
    """Rotate the coordinates i and i + D/2 at position t by t · 10000^(-2i/D) (Su et al. 2021)."""
    half = x.size(-1) // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.size(-2), device=x.device)[:, None] * rates
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, n_embd: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(n_embd, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.attention, self.mlp = Attention(n_embd, n_head), MLP(n_embd, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Rotary(LanguageModel):
    """The names of its modules tell the kinds of its parameters: embedding, attention, mlp, norm."""

    def __init__(
        self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int, expansion: float = 8 / 3
    ) -> None:
        super().__init__(vocab_size, block_size)
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, round(expansion * n_embd)) for _ in range(n_layer))
        self.final_norm = nn.RMSNorm(n_embd)

    def hidden(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, d)
        return self.final_norm(self.through_blocks(self.token_embedding(tokens)))
