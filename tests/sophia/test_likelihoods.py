"""Labels at the ends of the distribution function, and the random number of each element."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    cumulative = logits.softmax(-1).double().cumsum(0)
    cumulative /= cumulative[-1].clone()
    grid = cumulative[100:-100:200] * 2**24  # where one class ends, to the resolution of a uniform
    uniform = torch.cat([grid.floor() / 2**24, grid.ceil() / 2**24, torch.tensor([LAST])]).float()
    labels = sample_labels(logits.expand(len(uniform), -1), uniform)
    assert bool((cumulative[labels] > uniform).all())
    assert bool((cumulative[labels - 1] <= uniform).all())


@pytest.mark.parametrize(("uniform", "logit", "label"), [(0.0, -200.0, 0), (LAST, 200.0, 1)])
def test_an_outcome_without_probability_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, uniform: float, logit: float, label: int
) -> None:
    monkeypatch.setattr("sophia.likelihoods.uniforms", lambda *_: torch.tensor([uniform]))
    assert Bernoulli().sample(torch.tensor([logit]), torch.tensor([0]), 0, 1).tolist() == [label]


def test_labels_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(50, 7, generator=generator), torch.rand(50, generator=generator)
    whole = sample_labels(logits, uniform)
    monkeypatch.setattr("sophia.likelihoods._ROWS", 8)
    assert torch.equal(sample_labels(logits, uniform), whole)


class NoFloatingPointSums(TorchDispatchMode):
    """Refuses the cumulative sums that CUDA has no deterministic kernel for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "cumsum" not in str(func) or not args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_deterministic_algorithms_draw_the_same_labels_without_a_floating_point_cumsum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = 4 * torch.randn(500, 3000, generator=generator), torch.rand(500, generator=generator)
    logits[:, ::3] = -math.inf
    logits[7, 5] = math.nan
    uniform[:2] = torch.tensor([0.0, LAST])
    expected = sample_labels(logits, uniform)
    torch.use_deterministic_algorithms(True)
    try:
        with NoFloatingPointSums():
            labels = sample_labels(logits, uniform)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(labels, expected)
    assert labels[7] == 2999


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
        of(len(event)).sample(outputs, positions, 3, 5).flatten(), of(0).sample(outputs.flatten(), single, 3, 5)
    )
