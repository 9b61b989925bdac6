"""Labels at the ends of the distribution function, and which random number belongs to which element."""

import math
from collections.abc import Callable

import pytest
import torch

from sophia import Bernoulli, Gaussian, Likelihood, sample_labels

LAST = 1 - 2**-24  # the largest uniform


@pytest.mark.parametrize(
    ("uniform", "probabilities", "label"),
    [
        (0.0, [0, 0.5, 0.5], 1),
        (0.5, [0.5, 0.5], 1),
        (0.25, [0.25, 0, 0.75], 2),
        (LAST, [0.5, 0.5, 0], 1),
        (LAST, [1 / 3, 1 / 3, 1 / 3, 0], 2),
        (0.5, [math.nan, 1], 1),
    ],
)
def test_the_label_is_the_smallest_whose_distribution_function_exceeds_the_uniform(
    uniform: float, probabilities: list[float], label: int
) -> None:
    logits = torch.tensor([probabilities]).log()
    assert sample_labels(logits, torch.tensor([uniform])).tolist() == [label]


def test_labels_of_a_large_vocabulary_are_those_of_the_distribution_function_in_float64() -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(9))  # whose softmax adds up to less than LAST
    logits[-1] = -math.inf
    uniform = torch.cat([(torch.arange(199) + 0.5) / 199, torch.tensor([LAST])])
    labels = sample_labels(logits.expand(200, -1), uniform)
    cumulative = logits.softmax(-1).double().cumsum(0)
    cumulative /= cumulative[-1].clone()
    assert bool((cumulative[labels] > uniform).all())
    assert bool((cumulative[labels - 1] <= uniform).all())


def test_labels_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(50, 7, generator=generator), torch.rand(50, generator=generator)
    whole = sample_labels(logits, uniform)
    monkeypatch.setattr("sophia.likelihoods._ROWS", 8)
    assert torch.equal(sample_labels(logits, uniform), whole)


@pytest.mark.parametrize("of", [lambda dims: Gaussian(2.0, dims), Bernoulli], ids=["gaussian", "bernoulli"])
@pytest.mark.parametrize("event", [(3,), (2, 3)])
def test_each_element_of_an_event_has_the_random_number_of_a_position_of_its_own(
    of: Callable[[int], Likelihood], event: tuple[int, ...]
) -> None:
    """Element j of the k of prediction p draws what a prediction of a single element at position k·p + j draws."""
    positions = torch.tensor([4, 0, 9, 2**35])
    outputs = torch.randn(4, *event, generator=torch.Generator().manual_seed(0))
    k = math.prod(event)
    single = (positions[:, None] * k + torch.arange(k)).flatten()
    assert torch.equal(
        of(len(event)).sample(outputs, positions, 3, 5, 0).flatten(), of(0).sample(outputs.flatten(), single, 3, 5, 0)
    )
