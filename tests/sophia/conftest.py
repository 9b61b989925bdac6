"""Two small models whose curvature is computed in full, in float64, and a small transformer."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's test that draws follow the probabilities."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


class Transformer(nn.Module):
    """A causal language model of the same weights whenever it is made."""

    def __init__(self, vocabulary: int, layers: int, length: int, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            block = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


@dataclass
class Problem:
    """Logits as a function of named parameters, on fixed inputs and targets."""

    params: list[Tensor]
    logits_of: Callable[[list[Tensor]], Tensor]  # -> (n, V)
    targets: Tensor  # (n,) int64

    def logits(self) -> Tensor:
        return self.logits_of(self.params)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits(), self.targets)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    def jacobian(self) -> Tensor:  # (n, V, P)
        """Of the logits with respect to all parameters."""
        parts = torch.func.jacrev(lambda *params: self.logits_of(list(params)), argnums=tuple(range(len(self.params))))
        return torch.cat([part.flatten(start_dim=2) for part in parts(*self.params)], dim=2).detach()

    def gauss_newton(self) -> Tensor:  # (P, P)
        """(1/n) Σ_b J_b^T (diag(p_b) - p_b p_b^T) J_b, the matrix itself."""
        jacobian, probabilities = self.jacobian(), self.logits().softmax(-1).detach()
        inner = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
        return torch.einsum("bvi,bvw,bwj->ij", jacobian, inner, jacobian) / len(self.targets)

    def hessian(self) -> Tensor:  # (P, P)
        """Of the mean training loss, the matrix itself."""
        sizes, shapes = [p.numel() for p in self.params], [p.shape for p in self.params]

        def loss(flat: Tensor) -> Tensor:
            params = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
            return F.cross_entropy(self.logits_of(params), self.targets)

        return torch.func.hessian(loss)(self.flat(self.params))

    def score_moments(self) -> tuple[Tensor, Tensor]:  # (P,), (P,)
        """Σ_b E s_b² and Σ_b (E s_b⁴ - 3 (E s_b²)²), s_b the gradient of the loss at b against a label from the
        model."""
        jacobian, probabilities = self.jacobian(), self.logits().softmax(-1).detach()
        residual = probabilities.unsqueeze(1) - torch.eye(probabilities.shape[1], dtype=torch.float64)  # (n, label, V)
        scores = torch.einsum("byv,bvi->byi", residual, jacobian)  # the gradient for each possible label
        second = torch.einsum("by,byi->bi", probabilities, scores**2)
        fourth = torch.einsum("by,byi->bi", probabilities, scores**4)
        return second.sum(0), (fourth - 3 * second**2).sum(0)


def _parameters(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.fixture
def softmax_model() -> Problem:
    """Linear in its parameters, so that its Hessian is its Gauss-Newton matrix: 12 inputs of 3 features, 4 classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (12,), generator=generator)
    return Problem(_parameters(generator, (4, 3), (4,)), lambda p: x @ p[0].T + p[1], targets)


@pytest.fixture
def network() -> Problem:
    """Two layers: 12 inputs of 3 features, 4 hidden units, 3 classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (12,), generator=generator)
    params = _parameters(generator, (4, 3), (4,), (3, 4))
    return Problem(params, lambda p: torch.tanh(x @ p[0].T + p[1]) @ p[2].T, targets)


@pytest.fixture(params=["softmax_model", "network"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.getfixturevalue(request.param)
