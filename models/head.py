"""The loss head: from hidden states to cross entropies, of given targets and of labels drawn from the model's own softmax.

Softmax, sampling and loss are fp32 whatever the precision of the logits' product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the target of a position that has none, as in torch.nn.functional.cross_entropy
BLOCK = 128  # columns of the vocabulary whose probability mass the sampler sums first


class LossHead(nn.Module):
    """Cross entropy of the targets and of sampled labels, both from one softmax over the first vocab_size rows of the weight."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        weight: Tensor,  # (padded_vocab_size, d)
        targets: Tensor | None,  # (...) int64, -100 where there is none
        uniforms: Tensor | None,  # (...) float32, negative where no label is to be drawn
        plain: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        logits = F.linear(hidden.flatten(0, -2), weight)[:, : self.vocab_size].float()
        loss_sum = sampled_loss_sum = None
        if targets is not None:
            loss_sum = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
        if uniforms is not None:
            labels = sample_labels(logits.detach(), uniforms.flatten())
            sampled_loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        return loss_sum, sampled_loss_sum

    def compile(self, *args: Any, **kwargs: Any) -> None:
        pass


@torch.no_grad()
def sample_labels(
    logits: Tensor,  # (N, V) float32
    uniforms: Tensor,  # (N,) float32 in [0, 1), negative where no label is to be drawn
) -> Tensor:  # (N,) int64, -100 where no label was drawn
    """Labels drawn from softmax(logits) by inverse CDF: the first token whose cumulative probability exceeds the uniform.

    A row's label depends on its logits and its uniform alone. The cumulative sum is taken over blocks of the vocabulary
    first and inside the chosen block then. A token without probability is never drawn, not even as the uniform tends to 1.
    """
    rows, vocab_size = logits.shape
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    blocks = F.pad(weights, (0, -vocab_size % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass = blocks.sum(dim=-1)
    cumulative = mass.cumsum(dim=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, mass, threshold)
    before = (cumulative - mass).gather(1, block)
    inside = blocks[torch.arange(rows, device=logits.device), block[:, 0]]
    column = _first_above(inside.cumsum(dim=-1), inside, threshold - before)
    return torch.where(uniforms < 0, IGNORED, (block * BLOCK + column)[:, 0])


def _first_above(cumulative: Tensor, mass: Tensor, threshold: Tensor) -> Tensor:
    """(N, 1): the first index that has mass and whose cumulative sum exceeds the threshold; the last that has mass if none does.

    None does where rounding leaves the threshold at the last cumulative sum. Mass is asked for besides because a parallel
    cumulative sum may grow by rounding from one index to the next where there is no mass.
    """
    index = torch.arange(mass.size(1), device=mass.device)
    last = torch.where(mass > 0, index, 0).amax(dim=-1, keepdim=True)
    first = torch.where((mass > 0) & (cumulative > threshold), index, mass.size(1)).amin(dim=-1, keepdim=True)
    return torch.minimum(first, last)
