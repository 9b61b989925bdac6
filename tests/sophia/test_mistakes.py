"""Five common mistakes in public ports of Sophia: each has a test here that fails if the mistake is introduced."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG, gauss_newton_bartlett, sample_labels


def estimated(problem, steps: int, **arguments) -> torch.Tensor:  # (steps, P)
    optimizer = SophiaG(problem.params, betas=(0.0, 0.0))
    rows = []
    for step in range(steps):
        for p in problem.params:
            p.grad = None
        optimizer.update_hessian(num_predictions=gauss_newton_bartlett(problem.logits, seed=0, step=step, **arguments))
        rows.append(problem.flat([optimizer.state[p]["hessian"] for p in problem.params]))
    return torch.stack(rows)


# 1. Squaring the training gradient.


def test_the_estimate_is_not_made_of_the_training_labels(softmax_model) -> None:
    """Against targets that the model finds all but impossible the training gradient is large; the curvature is not."""
    problem = softmax_model
    problem.targets = problem.logits().argmin(-1)
    (training, _) = torch.autograd.grad(problem.loss(), problem.params)
    diagonal = problem.gauss_newton().diagonal()
    empirical_fisher = 12 * problem.flat([training]).square()
    assert empirical_fisher.sum() > 10 * diagonal[:12].sum()
    mean = estimated(problem, 300).mean(0)
    # The mean of 300 draws of relative deviation √2 or so is within 40 % five deviations out.
    assert (mean.sum() / diagonal.sum() - 1).abs() < 0.4


def test_the_labels_are_drawn_and_not_the_likeliest_ones(softmax_model) -> None:
    rows = estimated(softmax_model, 10)
    assert bool((rows.std(0) > 0).all())


# 2. A constant or default N, N in sequences, N of another batch, one division too many.


def test_the_estimate_has_the_same_mean_for_a_batch_of_any_size(softmax_model) -> None:
    """Each input four times over: four times the predictions, the same Gauss-Newton matrix."""
    once = estimated(softmax_model, 400).mean(0)
    plain = softmax_model.logits_of
    softmax_model.logits_of = lambda params: plain(params).repeat(4, 1)
    four_times = estimated(softmax_model, 400).mean(0)
    # Sums over 16 coordinates of means of 400: within 25 %, where counting N once for all would give a factor of 4.
    assert (four_times.sum() / once.sum() - 1).abs() < 0.25


def test_a_change_of_batch_size_leaves_old_history_right() -> None:
    """N belongs to its own estimate: it is in h when h is updated, not in γ or in the step."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = SophiaG([p], betas=(0.0, 0.9))
    h = 0.0
    for n, gradient in ((100, 0.1), (400, 0.05), (7, 0.3)):
        p.grad = torch.tensor([gradient])
        optimizer.update_hessian(num_predictions=n)
        h = 0.9 * h + 0.1 * n * gradient**2
        assert optimizer.state[p]["hessian"].item() == pytest.approx(h, rel=1e-5)


# 3. The same noise on every rank.


def test_ranks_with_their_own_positions_draw_their_own_labels() -> None:
    logits = torch.zeros(256, 50)
    draws = []
    for rank in range(2):
        outputs = logits.clone().requires_grad_()
        positions = torch.arange(rank, 512, 2)  # sequence i on rank i mod 2
        gauss_newton_bartlett(lambda outputs=outputs: outputs, seed=0, step=1, positions=positions)
        draws.append(outputs.grad.argmin(-1))  # the label has the one negative gradient
    agreement = (draws[0] == draws[1]).float().mean()
    # 256 independent pairs agree with probability 1/50 each: more than 6 % has probability 1e-4.
    assert agreement < 0.06


# 4. Norm-clipping the estimator's gradient.


@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e4])
def test_the_curvature_is_quadratic_in_the_gradient_at_any_norm(norm: float) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    direction = torch.tensor([0.6, -0.8, 0.0])
    p.grad = direction * norm
    optimizer = SophiaG([p], betas=(0.0, 0.0))
    optimizer.update_hessian(num_predictions=5)
    torch.testing.assert_close(optimizer.state[p]["hessian"], 5 * (direction * norm).square(), rtol=1e-5, atol=0)
    assert torch.equal(p.grad, direction * norm)


def test_the_estimator_leaves_a_large_gradient_as_it_is() -> None:
    x = torch.full((4, 1), 1e3, dtype=torch.float64)
    w = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    gauss_newton_bartlett(lambda: x @ w.T, seed=0, step=1)
    residual = torch.full((3,), 1 / 3, dtype=torch.float64)
    # Each row's gradient is 1e3 · (softmax - one-hot): whatever the labels, its entries are multiples of 1e3 / 12.
    counts = (residual - w.grad.flatten() / 1e3) * 4
    torch.testing.assert_close(counts, counts.round())
    assert counts.sum() == pytest.approx(4)


# 5. Sampling or softmax in bfloat16.


def test_labels_of_bfloat16_logits_are_those_of_their_float32_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(200, 1000, generator=generator).bfloat16(), torch.rand(200, generator=generator)
    assert torch.equal(sample_labels(logits, uniform), sample_labels(logits.float(), uniform))


def test_the_loss_against_the_labels_is_in_float32() -> None:
    """The gradient of a bfloat16 logit is rounded once, at the end, not in the softmax."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(64, 100)).bfloat16()
    half, full = logits.clone().requires_grad_(), logits.float().requires_grad_()
    for outputs in (half, full):
        gauss_newton_bartlett(lambda outputs=outputs: outputs, seed=0, step=1)
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(half.grad, full.grad.bfloat16())
    rounded = logits.clone().requires_grad_()
    F.cross_entropy(rounded, full.grad.argmin(-1)).backward()
    assert not torch.equal(rounded.grad, half.grad)
