"""Output distributions: how Gauss-Newton-Bartlett samples labels from a model's outputs and scores them.

The estimate is that of the Gauss-Newton matrix only if the likelihood matches the training loss:

| training loss | likelihood | one prediction is |
|---|---|---|
| `F.cross_entropy(logits, y)` | `Categorical()` | a position |
| `F.mse_loss(outputs, y)` | `Gaussian(variance=0.5)` | an element |
| ½ · mean of squares | `Gaussian(variance=1.0)` | an element |
| squares summed over the last dimension, then the mean | `Gaussian(variance=0.5, event_dims=1)` | a row |
| `F.binary_cross_entropy_with_logits(logits, y)` | `Bernoulli()` | an element |
| the same, summed over the labels of an example, then the mean | `Bernoulli(event_dims=1)` | an example |

Even under autocast, the loss is in float32 (float64 for float64 outputs). Labels are sampled with uniform numbers of 24 bits
and normal numbers of float32, classes from a float32 softmax, also for float64 outputs.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sophia.random import normals_at, uniforms

# Rows of logits whose cumulative distribution is in memory in float64 at the same time.
_ROWS = 1024


class Likelihood(Protocol):
    """A family of label distributions, one distribution for each prediction."""

    @property
    def event_dims(self) -> int:
        """The number of trailing dimensions of the outputs that belong to one prediction."""
        ...

    def sample(
        self,
        outputs: Tensor,  # (n, *event)
        positions: Tensor,  # (n,) int64, not negative
        seed: int,
        step: int,
    ) -> Tensor:
        """Draw labels as a function of the outputs and (seed, step, position)."""
        ...

    def loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return () the sum of -log p(label) over the predictions, up to a constant."""
        ...


@torch.no_grad()
def sample_labels(
    logits: Tensor,  # (n, V) any floating dtype
    uniform: Tensor,  # (n,) float32 in [0, 1)
) -> Tensor:  # (n,) int64
    """Draw labels from softmax(logits) by inverting its distribution function: the smallest y with F(y) > u.

    The softmax is summed in float64: probabilities are exact to 2^-24, the resolution of u, and a class of probability
    zero is never drawn. A non-finite row gets the last class; its loss is not finite either.
    """
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows, u, out in zip(*(torch.split(t, _ROWS) for t in (logits, uniform, labels)), strict=True):
        cumulative = _cumulative(rows)
        threshold = u.double().unsqueeze(-1) * cumulative[:, -1:]
        out.copy_(torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max_(rows.shape[-1] - 1))
    return labels


def _cumulative(rows: Tensor) -> Tensor:
    """Return the distribution functions of softmax(rows), (n, V) float64."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.softmax(rows.float(), dim=-1).double().cumsum(dim=-1)
    # CUDA has no deterministic cumsum of floating-point numbers. In units of 2^-52, float64 holds all sums exactly.
    probabilities = rows.softmax(dim=-1, dtype=torch.float32).double()
    sums = (probabilities * 2.0**52).long().cumsum(dim=-1).double()
    return sums.where(probabilities.isfinite(), math.nan)


@dataclass(frozen=True)
class Categorical:
    """One of V classes. The last dimension holds the logits."""

    event_dims: int = 1

    def __post_init__(self) -> None:
        if self.event_dims != 1:
            raise ValueError(
                f"event_dims = {self.event_dims}, expected 1: the last dimension holds the logits of the classes"
            )

    def sample(self, outputs: Tensor, positions: Tensor, seed: int, step: int) -> Tensor:
        return sample_labels(outputs, uniforms(seed, step, positions))

    def loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="sum")


@dataclass(frozen=True)
class Gaussian:
    """Independent normal labels with the outputs as mean and a fixed variance σ²: -log p = (f - y)² / 2σ²."""

    variance: float
    event_dims: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise ValueError(f"variance = {self.variance}, expected a number > 0: F.mse_loss has variance 0.5")

    @torch.no_grad()
    def sample(self, outputs: Tensor, positions: Tensor, seed: int, step: int) -> Tensor:
        noise = normals_at(seed, step, "label", _element_positions(outputs, positions))
        return outputs + noise.to(outputs.dtype) * math.sqrt(self.variance)

    def loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).square().sum() / (2 * self.variance)


@dataclass(frozen=True)
class Bernoulli:
    """An independent binary label for each logit: multi-label classification."""

    event_dims: int = 0

    @torch.no_grad()
    def sample(self, outputs: Tensor, positions: Tensor, seed: int, step: int) -> Tensor:
        u = uniforms(seed, step, _element_positions(outputs, positions))
        return (u < outputs.sigmoid()).to(outputs.dtype)

    def loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")


def _element_positions(
    outputs: Tensor,  # (n, *event)
    positions: Tensor,  # (n,)
) -> Tensor:  # (n, *event)
    """Return a distinct position for each element of each prediction."""
    event = outputs.shape[1:]
    size = math.prod(event)
    within = torch.arange(size, device=outputs.device).view(event)
    return positions.view(-1, *(1 for _ in event)) * size + within
