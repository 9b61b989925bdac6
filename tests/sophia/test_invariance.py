"""Labels, noise and curvature do not depend on how a batch is split into micro-batches and ranks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sophia import Categorical, SophiaG, empirical_fisher, gauss_newton_bartlett, hutchinson
from tests.sophia.language_model import LanguageModel

SPLITS = [(8, 1, 1), (2, 2, 2), (1, 2, 4)]  # micro-batch × accumulation × world size
SEQUENCES, LENGTH = 8, 6


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(vocab_size=50, layers=2, width=16, length=LENGTH)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(50, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def slices(micro: int, accumulation: int, world: int, rank: int) -> list[list[int]]:
    """Sequence i goes to rank i mod W."""
    own = list(range(rank, SEQUENCES, world))
    assert len(own) == micro * accumulation
    return [own[first : first + micro] for first in range(0, len(own), micro)]


def positions_of(rows: list[int]) -> Tensor:
    return torch.tensor(rows).unsqueeze(1) * LENGTH + torch.arange(LENGTH)


def curvature(model: LanguageModel, tokens: Tensor, split: tuple[int, int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """h after one refresh in which the ranks' gradients are averaged, as DDP does, and the labels by sequence."""
    _, _, world = split
    labels: dict[int, Tensor] = {}
    likelihood = Categorical()

    class Recording:
        event_dims = 1

        def sample(self, outputs: Tensor, positions: Tensor, seed: int, step: int) -> Tensor:
            drawn = likelihood.sample(outputs, positions, seed, step)
            for position, label in zip(positions.tolist(), drawn, strict=True):
                labels[position] = label
            return drawn

        loss_sum = staticmethod(likelihood.loss_sum)

    optimizer = SophiaG(model.parameters())
    total, by_rank = 0, []
    for rank in range(world):
        model.zero_grad()
        for rows in slices(*split, rank):
            total += gauss_newton_bartlett(
                lambda rows=rows: model.logits(tokens[rows, :-1]),
                seed=5,
                step=3,
                positions=positions_of(rows),
                total_predictions=SEQUENCES * LENGTH // world,
                likelihood=Recording(),
            )
        by_rank.append([p.grad.clone() for p in model.parameters()])
    for p, *grads in zip(model.parameters(), *by_rank, strict=True):
        p.grad = torch.stack(grads).mean(0)
    assert total == SEQUENCES * LENGTH
    optimizer.update_hessian(num_predictions=total)
    return torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]), labels


@pytest.mark.parametrize("split", SPLITS[1:])
def test_gauss_newton_bartlett_does_not_depend_on_the_split(
    model: LanguageModel, tokens: Tensor, split: tuple[int, int, int]
) -> None:
    whole, labels = curvature(model, tokens, SPLITS[0])
    h, split_labels = curvature(model, tokens, split)
    assert len(labels) == SEQUENCES * LENGTH
    assert split_labels == labels
    assert (h - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("split", SPLITS[1:])
def test_hutchinson_does_not_depend_on_the_split(
    model: LanguageModel, tokens: Tensor, split: tuple[int, int, int]
) -> None:
    names = [name for name, _ in model.named_parameters()]

    def estimate(rows: list[int]) -> Tensor:
        loss = lambda: F.cross_entropy(model.logits(tokens[rows, :-1]).flatten(0, 1), tokens[rows, 1:].flatten())  # noqa: E731
        return torch.cat([e.flatten() for e in hutchinson(loss, model.parameters(), seed=5, step=3, names=names)])

    whole = estimate(list(range(SEQUENCES)))
    parts = torch.stack([estimate(rows) for rank in range(split[2]) for rows in slices(*split, rank)]).mean(0)
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_empirical_fisher_does_not_depend_on_the_split(model: LanguageModel, tokens: Tensor) -> None:
    results = []
    for split in ((8, 1, 1), (2, 4, 1)):
        model.zero_grad()
        n = sum(
            empirical_fisher(
                lambda rows=rows: model.logits(tokens[rows, :-1]),
                tokens[rows, 1:],
                total_predictions=SEQUENCES * LENGTH,
            )
            for rows in slices(*split, 0)
        )
        assert n == SEQUENCES * LENGTH
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


def test_hutchinson_noise_depends_on_the_name_and_not_on_the_order() -> None:
    a, b = (torch.randn(5, requires_grad=True) for _ in range(2))
    loss = lambda: (a**4).sum() + (b**4).sum()  # noqa: E731
    first = hutchinson(loss, [a, b], seed=0, step=1, names=["a", "b"])
    second = hutchinson(loss, [b, a], seed=0, step=1, names=["b", "a"])
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])


def test_gauss_newton_in_bfloat16_autocast_stays_within_two_percent_of_float32(
    model: LanguageModel, tokens: Tensor
) -> None:
    """Relative norm of the difference in h with the same labels; about half a percent is typical. (Drawn anew, a label
    flips where rounding moves a probability across its uniform: noise of the sampling, not of the precision.)"""

    class SameLabels:
        event_dims = 1
        labels: Tensor | None = None

        def sample(self, outputs: Tensor, positions: Tensor, seed: int, step: int) -> Tensor:
            assert outputs.dtype == torch.float32
            if self.labels is None:
                self.labels = Categorical().sample(outputs, positions, seed, step)
            return self.labels

        loss_sum = staticmethod(Categorical().loss_sum)

    likelihood, results = SameLabels(), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gauss_newton_bartlett(lambda: model.logits(tokens[:, :-1]), seed=0, step=1, likelihood=likelihood)
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]).square())
    difference = (results[1] - results[0]).norm() / results[0].norm()
    assert 0 < difference < 0.02
