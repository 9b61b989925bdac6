"""Five common mistakes in public ports of Sophia: each has a test here that fails if the mistake is introduced."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG, gauss_newton_bartlett, sample_labels
from sophia.random import uniforms
from tests.sophia.chi_square import chi_square_p


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


def test_there_is_no_default_number_of_predictions() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="expected exactly one: num_predictions=N"):
        SophiaG([p]).update_hessian()


def test_the_number_of_predictions_counts_tokens_that_were_sampled() -> None:
    logits = torch.zeros(4, 6, 10, requires_grad=True)  # 4 sequences of 6 tokens
    positions = torch.arange(24).view(4, 6)
    assert gauss_newton_bartlett(lambda: logits, seed=0, step=1) == 24
    positions[3, 2:] = -1
    assert gauss_newton_bartlett(lambda: logits, seed=0, step=1, positions=positions) == 20


def test_the_estimate_has_the_same_mean_for_a_batch_of_any_size(softmax_model) -> None:
    """Each input four times over: four times the predictions, the same Gauss-Newton matrix."""
    once = estimated(softmax_model, 400).mean(0)
    plain = softmax_model.logits_of
    softmax_model.logits_of = lambda params: plain(params).repeat(4, 1)
    four_times = estimated(softmax_model, 400).mean(0)
    # Sums over 16 coordinates of means of 400: within 25 %, where counting N once for all would give a factor of 4.
    assert (four_times.sum() / once.sum() - 1).abs() < 0.25


def test_micro_batches_that_share_n_give_the_estimate_of_the_whole_batch(softmax_model) -> None:
    (whole,) = estimated(softmax_model, 1)
    for p in softmax_model.params:
        p.grad = None
    n = sum(
        gauss_newton_bartlett(
            lambda rows=rows: softmax_model.logits()[rows],
            seed=0,
            step=0,
            positions=torch.arange(12)[rows],
            total_predictions=12,
        )
        for rows in (slice(0, 5), slice(5, 6), slice(6, 12))
    )
    optimizer = SophiaG(softmax_model.params, betas=(0.0, 0.0))
    optimizer.update_hessian(num_predictions=n)
    torch.testing.assert_close(softmax_model.flat([optimizer.state[p]["hessian"] for p in softmax_model.params]), whole)


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


def test_averaging_ranks_does_not_inflate_the_estimate(softmax_model) -> None:
    """Eight ranks with the same inputs: with their own labels the mean is the Gauss-Newton diagonal, with shared
    labels 8
    times as large."""
    diagonal = softmax_model.gauss_newton().diagonal()
    optimizer = SophiaG(softmax_model.params, betas=(0.0, 0.0))
    rows = []
    for step in range(60):
        for p in softmax_model.params:
            p.grad = None
        n = sum(
            gauss_newton_bartlett(
                softmax_model.logits,
                seed=0,
                step=step,
                positions=torch.arange(12) * 8 + rank,
                total_predictions=12 * 8,
            )
            for rank in range(8)
        )
        optimizer.update_hessian(num_predictions=n)
        rows.append(softmax_model.flat([optimizer.state[p]["hessian"] for p in softmax_model.params]))
    ratio = torch.stack(rows).mean(0).sum() / diagonal.sum()
    assert 0.5 < ratio < 1.7


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


def test_sampling_from_bfloat16_logits_follows_their_float32_softmax() -> None:
    """In bfloat16 a running sum of 500 probabilities of 1/500 stops growing at a half. Chi-square at a rate of 1e-4."""
    logits = torch.linspace(-0.5, 0.5, 500).bfloat16()
    n = 100_000
    labels = sample_labels(logits.expand(n, -1), uniforms(0, 1, torch.arange(n)))
    counts = torch.bincount(labels, minlength=500)
    assert chi_square_p(counts, logits.double().softmax(-1) * n) > 1e-4


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
