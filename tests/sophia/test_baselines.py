"""Lion is the paper's step by step; AdamW, Lion and Sophia learn the same quadratic and the same transformer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia import AdaHessian, Lion, SophiaG, SophiaH, gauss_newton_bartlett, hutchinson
from tests.sophia.language_model import LanguageModel


def lion_of_the_paper(
    theta: Tensor, g: Tensor, m: Tensor, lr: float, weight_decay: float, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """One step of Algorithm 2 of Chen et al. 2023; the next θ and m."""
    update = (beta1 * m + (1 - beta1) * g).sign()
    return theta - lr * (update + weight_decay * theta), beta2 * m + (1 - beta2) * g


@given(
    lr=st.floats(1e-5, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    weight_decay=st.floats(0, 0.5),
    shape=st.sampled_from([(3,), (2, 4), (5, 1, 2)]),
    seed=st.integers(0, 2**30),
    foreach=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_lion_is_the_papers_step_by_step(
    lr: float, betas: tuple[float, float], weight_decay: float, shape: tuple[int, ...], seed: int, foreach: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    b, exp_avg = a.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    ours = Lion([a], lr, betas, weight_decay, foreach=foreach, compile=False)
    for _ in range(20):
        a.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        b, exp_avg = lion_of_the_paper(b, a.grad, exp_avg, lr, weight_decay, *betas)
        ours.step()
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state[a]["exp_avg"], exp_avg, rtol=1e-12, atol=1e-12)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.03, betas=(0.9, 0.95), weight_decay=0.0),
    "lion": lambda params: Lion(params, lr=0.01, weight_decay=0.0),
    "sophiag": lambda params: SophiaG(params, lr=0.03, gamma=1.0, weight_decay=0.0, betas=(0.9, 0.9)),
    "sophiah": lambda params: SophiaH(params, lr=0.03, gamma=1.0, weight_decay=0.0, betas=(0.9, 0.9)),
    "adahessian": lambda params: AdaHessian(params, lr=0.3, eps=1e-2),
}


def minimise(
    make: Callable[[Any], torch.optim.Optimizer],
    params: list[Tensor],
    loss: Callable[[], Tensor],
    outputs: Callable[[], Tensor],
    steps: int,
) -> float:
    optimizer = make(params)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 1 / steps  # decays to about a third: sign-like steps need it to settle
        if getattr(optimizer, "hessian_due", False):
            if type(optimizer) is SophiaG:
                n = gauss_newton_bartlett(outputs, seed=0, step=step)
                optimizer.update_hessian(num_predictions=n)
            else:
                optimizer.update_hessian(estimates=hutchinson(loss, params, seed=0, step=step))  # type: ignore[attr-defined]
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_same_transformer(name: str) -> None:
    """Memorises four sequences: from ln 16 = 2.77 to less than 1.2 nats in 60 steps."""
    model = LanguageModel(vocab_size=16, layers=1, width=16, length=8)
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    final = minimise(OPTIMIZERS[name], list(model.parameters()), lambda: model.loss(x, y), lambda: model.logits(x), 60)
    assert final < 1.2
