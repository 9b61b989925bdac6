"""The estimators' means and variances against curvature computed in full, and what must not change them.

The statistical tests compare the mean of many draws with the exact value in units of the exact standard deviation.
Their false-alarm rate, over the choice of the seed, is stated as ALPHA per test; the seeds are fixed, so a pass
stays a pass.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sophia import (
    Bernoulli,
    Categorical,
    Gaussian,
    SophiaG,
    SophiaH,
    empirical_fisher,
    gauss_newton_bartlett,
    hutchinson,
    hutchinson_differences,
    sample_labels,
)
from sophia.random import normals_like

ALPHA = 1e-4
DRAWS = 1500


def normal_bound(coordinates: int) -> Tensor:
    """What the largest of so many standard normal numbers exceeds in size with probability ALPHA, or less often."""
    return -torch.special.ndtri(torch.tensor(ALPHA / (2 * coordinates), dtype=torch.float64))


def assert_mean(draws: Tensor, mean: Tensor, variance: Tensor) -> None:
    """draws (R, P): every coordinate's mean within the two-sided bound for ALPHA, Bonferroni over P; the pooled
    variance
    within 20 %, far more than its own error of about √(14/R) / √P and far less than a factor of 2."""
    deviations = (draws.mean(0) - mean) / (variance / len(draws)).sqrt()
    assert deviations.abs().max() < normal_bound(draws.shape[1])
    moving = variance > 0
    ratio = (draws.var(0)[moving] / variance[moving]).mean()
    assert 0.8 < ratio < 1.2


def gnb_draws(problem, count: int = DRAWS, step0: int = 0) -> Tensor:  # (count, P)
    rows = []
    optimizer = SophiaG(problem.params, betas=(0.0, 0.0))  # β2 = 0: h is the last estimate
    for step in range(step0, step0 + count):
        for p in problem.params:
            p.grad = None
        n = gauss_newton_bartlett(problem.logits, seed=0, step=step)
        optimizer.update_hessian(num_predictions=n)
        rows.append(problem.flat([optimizer.state[p]["hessian"] for p in problem.params]))
    return torch.stack(rows)


@pytest.mark.slow
def test_gauss_newton_bartlett_is_unbiased_with_the_variance_of_theory(problem) -> None:
    """Through the optimizer: E ĥ is the Gauss-Newton diagonal G, Var ĥ = 2G² + (1/N²) Σ (E s⁴ - 3 (E s²)²)."""
    n = len(problem.targets)
    diagonal = problem.gauss_newton().diagonal()
    second, excess = problem.score_moments()
    torch.testing.assert_close(second / n, diagonal)
    assert_mean(gnb_draws(problem), diagonal, 2 * diagonal**2 + excess / n**2)


@pytest.mark.slow
def test_hutchinson_is_unbiased_with_the_variance_of_theory(problem) -> None:
    """E ĥ is the Hessian's diagonal; Var ĥ_i = H_ii² + Σ_j H_ij² for normal noise."""
    hessian = problem.hessian()
    rows = [problem.flat(hutchinson(problem.loss, problem.params, seed=0, step=step)) for step in range(DRAWS)]
    assert_mean(torch.stack(rows), hessian.diagonal(), hessian.diagonal() ** 2 + hessian.square().sum(0))


def test_hutchinson_is_the_noise_times_the_exact_product(problem) -> None:
    noise = problem.flat([normals_like(p, 3, 7, str(i)).double() for i, p in enumerate(problem.params)])
    estimate = problem.flat(hutchinson(problem.loss, problem.params, seed=3, step=7))
    torch.testing.assert_close(estimate, noise * (problem.hessian() @ noise))


def test_central_differences_are_the_exact_product_up_to_the_step(problem) -> None:
    exact = problem.flat(hutchinson(problem.loss, problem.params, seed=3, step=7))
    before = [p.detach().clone() for p in problem.params]
    for p in problem.params:
        p.grad = torch.ones_like(p)
    differences = problem.flat(hutchinson_differences(problem.loss, problem.params, seed=3, step=7))
    assert (differences - exact).norm() < 1e-5 * exact.norm()
    assert all(torch.equal(p, q) for p, q in zip(problem.params, before, strict=True))
    assert all(bool((p.grad == 1).all()) for p in problem.params)


def test_the_weights_of_a_difference_are_a_thousandth_of_their_norm_apart_from_those_between(network) -> None:
    seen = []

    def loss() -> Tensor:
        seen.append(network.flat(network.params).clone())
        return network.loss()

    theta = network.flat(network.params).clone()
    noise = network.flat([normals_like(p, 3, 7, str(i)).double() for i, p in enumerate(network.params)])
    hutchinson_differences(loss, network.params, seed=3, step=7)
    step = 1e-3 * theta.norm() * noise / noise.norm()
    torch.testing.assert_close(seen, [theta + step, theta - step], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [hutchinson, hutchinson_differences])
def test_gradients_need_not_be_enabled_around_an_estimator(network, estimator) -> None:
    expected = network.flat(estimator(network.loss, network.params, seed=0, step=1))
    with torch.no_grad():
        estimates = estimator(network.loss, network.params, seed=0, step=1)
    assert torch.equal(network.flat(estimates), expected)


def test_central_differences_with_dropout_are_the_exact_product_under_the_same_masks(network) -> None:
    """And both leave the generator where one forward leaves it. float64: what remains is the truncation, O(δ²)."""

    def loss() -> Tensor:
        dropped = F.dropout(F.tanh(network.logits()), 0.5)
        return F.cross_entropy(dropped, network.targets)

    estimates, following = [], []
    for estimator in (hutchinson, hutchinson_differences):
        torch.manual_seed(11)
        estimates.append(network.flat(estimator(loss, network.params, seed=3, step=7)))
        following.append(torch.rand(3))
    exact, differences = estimates
    assert (differences - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(*following)


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_difference_of_some_parameters_leaves_the_gradients_of_all_as_they_were(
    network, before: float | None
) -> None:
    for p in network.params:
        p.grad = None if before is None else torch.full_like(p, before)
    (estimate,) = hutchinson_differences(network.loss, network.params[:1], seed=3, step=7)
    (exact,) = hutchinson(network.loss, network.params[:1], seed=3, step=7)
    assert (estimate - exact).norm() < 1e-5 * exact.norm()
    for p in network.params:
        assert p.grad is None if before is None else bool((p.grad == before).all())


@pytest.mark.parametrize("estimator", [hutchinson, hutchinson_differences])
def test_frozen_parameters_stay_in_place_and_have_no_estimate(network, estimator) -> None:
    frozen, *trained = network.params
    frozen.requires_grad_(False)
    before, seen = frozen.clone(), []

    def loss() -> Tensor:
        seen.append(torch.equal(frozen, before))
        return network.loss()

    nothing, *estimates = estimator(loss, network.params, seed=3, step=7)
    alone = estimator(network.loss, trained, seed=3, step=7, names=["1", "2"])
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(estimates, alone, strict=True))
    assert all(seen)
    SophiaH(network.params).update_hessian(estimates=[nothing, *estimates])


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_loss_that_raises_leaves_weights_gradients_and_buffers_as_they_were(network, fails_at: int) -> None:
    calls, buffer = [0], torch.zeros(2)

    def loss() -> Tensor:
        calls[0] += 1
        buffer.add_(1)
        if calls[0] == fails_at:
            raise RuntimeError("out of memory")
        return network.loss()

    before = [p.detach().clone() for p in network.params]
    for p in network.params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="out of memory"):
        hutchinson_differences(loss, network.params, seed=0, step=1, buffers=[buffer])
    assert all(torch.equal(p, q) for p, q in zip(network.params, before, strict=True))
    assert all(bool((p.grad == 1).all()) for p in network.params)
    assert bool((buffer == 0).all())


def test_weights_that_are_all_zero_have_a_curvature() -> None:
    """Of logistic regression, where training often starts: H = XᵀX / 4n there. float32 leaves 1e-7 / 1e-3 of it."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, generator=generator), torch.randint(2, (50,), generator=generator).float()
    w = torch.zeros(3, requires_grad=True)
    (estimate,) = hutchinson_differences(lambda: F.binary_cross_entropy_with_logits(x @ w, y), [w], seed=0, step=1)
    noise = normals_like(w, 0, 1, "0")
    torch.testing.assert_close(estimate, noise * (x.T @ x @ noise) / (4 * 50), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", [hutchinson, hutchinson_differences])
def test_the_estimate_is_kept_out_of_batch_norms_running_statistics(estimator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    x = torch.randn(8, 3)
    before = [buffer.clone() for buffer in model.buffers()]
    assert len(before) == 3
    estimator(lambda: model(x).square().mean(), model.parameters(), seed=0, step=1, buffers=model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_parameters_out_of_the_loss_or_linear_in_it_have_zero_curvature() -> None:
    x, unused, linear = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = lambda: (x**3).sum() + linear.sum()  # noqa: E731
    for estimator in (hutchinson, hutchinson_differences):
        curved, zero, flat = estimator(loss, [x, unused, linear], seed=0, step=1)
        assert bool((curved != 0).all())
        assert bool((zero == 0).all())
        assert bool((flat.abs() < 1e-3).all())
    (zero,) = hutchinson(lambda: linear.sum(), [linear], seed=0, step=1)
    assert bool((zero == 0).all())


def test_empirical_fisher_is_n_times_the_square_of_the_training_gradient(problem) -> None:
    n = empirical_fisher(problem.logits, problem.targets)
    grads = torch.autograd.grad(problem.loss(), problem.params)
    assert n == len(problem.targets)
    for p, grad in zip(problem.params, grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-14)  # in float64, as the weights are


def test_empirical_fisher_leaves_ignored_targets_out(softmax_model) -> None:
    targets = softmax_model.targets.clone()
    targets[::2] = -100
    n = empirical_fisher(softmax_model.logits, targets)
    (grad, _) = torch.autograd.grad(
        F.cross_entropy(softmax_model.logits(), targets, ignore_index=-100), softmax_model.params
    )
    assert n == 6
    torch.testing.assert_close(softmax_model.params[0].grad, grad)


def test_empirical_fisher_is_in_float32_and_scaled_as_the_loss_is() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (4 * torch.randn(64, 100, generator=generator)).bfloat16(), torch.arange(64)
    half, full = logits.clone().requires_grad_(), logits.float().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for outputs, grad_scaler in ((half, scaler), (full, None)):
        empirical_fisher(lambda outputs=outputs: outputs, targets, grad_scaler=grad_scaler)
    assert torch.equal(half.grad, (256 * full.grad).bfloat16())


def linear_outputs(outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(outputs, 3, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("event_dims", [0, 1])
def test_gaussian_likelihood_estimates_the_hessian_of_the_squared_error(event_dims: int) -> None:
    """Linear least squares, whose Hessian does not depend on the labels; scores are normal, so Var ĥ = 2 G² exactly."""
    x, w = linear_outputs(2)
    reduce = torch.mean if event_dims == 0 else lambda squares: squares.sum(-1).mean()
    y = torch.randn(10, 2, dtype=torch.float64)
    loss = lambda flat: reduce((x @ flat.view(2, 3).T - y).square()) / (2 * 0.5)  # noqa: E731
    hessian = torch.func.hessian(loss)(w.detach().flatten()).diagonal()
    rows = []
    for step in range(800):
        w.grad = None
        n = gauss_newton_bartlett(lambda: x @ w.T, seed=0, step=step, likelihood=Gaussian(0.5, event_dims))
        assert n == (20 if event_dims == 0 else 10)
        rows.append(n * w.grad.flatten().square())
    assert_mean(torch.stack(rows), hessian, 2 * hessian**2)


@pytest.mark.parametrize("event_dims", [0, 1])
def test_bernoulli_likelihood_estimates_the_hessian_of_multi_label_logits(event_dims: int) -> None:
    x, w = linear_outputs(3)
    reduce = torch.mean if event_dims == 0 else lambda losses: losses.sum(-1).mean()
    y = torch.randint(2, (10, 3)).double()

    def loss(flat: Tensor) -> Tensor:
        return reduce(F.binary_cross_entropy_with_logits(x @ flat.view(3, 3).T, y, reduction="none"))

    hessian = torch.func.hessian(loss)(w.detach().flatten()).diagonal()
    p = (x @ w.detach().T).sigmoid()  # (10, 3)
    moment = lambda k: (p * (p - 1) ** k + (1 - p) * p**k).T @ x**k  # noqa: E731  Σ_b E s_b^k for each (label, feature)
    squares = ((p * (1 - p)) ** 2).T @ x**4
    n = 30 if event_dims == 0 else 10
    variance = 2 * hessian**2 + ((moment(4) - 3 * squares) / n**2).flatten()
    rows = []
    for step in range(800):
        w.grad = None
        assert gauss_newton_bartlett(lambda: x @ w.T, seed=0, step=step, likelihood=Bernoulli(event_dims)) == n
        rows.append(n * w.grad.flatten().square())
    assert_mean(torch.stack(rows), hessian, variance)


def test_labels_follow_the_softmax() -> None:
    """300 classes, some of probability zero. Stratified uniforms: the inverse of the distribution function itself."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, generator=generator)
    logits[::7] = -math.inf
    n = 100_000
    labels = sample_labels(logits.expand(n, -1), (torch.arange(n) + torch.rand(n, generator=generator)) / n)
    frequency = torch.bincount(labels, minlength=300) / n
    assert (frequency - logits.softmax(-1)).abs().max() < 2 / n + 1e-6
    assert bool((frequency[logits == -math.inf] == 0).all())


def test_positions_that_are_negative_do_not_count(softmax_model) -> None:
    positions = torch.arange(12)
    positions[1::2] = -1
    n = gauss_newton_bartlett(softmax_model.logits, seed=0, step=1, positions=positions)
    assert n == 6
    grad = softmax_model.params[0].grad.clone()
    softmax_model.params[0].grad = None
    half = lambda: softmax_model.logits()[::2]  # noqa: E731
    gauss_newton_bartlett(half, seed=0, step=1, positions=torch.arange(12)[::2])
    torch.testing.assert_close(softmax_model.params[0].grad, grad)


def test_logits_of_any_rank_give_a_prediction_per_position(softmax_model) -> None:
    assert gauss_newton_bartlett(lambda: softmax_model.logits().view(2, 3, 2, 4), seed=0, step=1) == 12
    flat = softmax_model.params[0].grad.clone()
    softmax_model.params[0].grad = None
    gauss_newton_bartlett(softmax_model.logits, seed=0, step=1)
    torch.testing.assert_close(softmax_model.params[0].grad, flat)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(1.0), Bernoulli()])
def test_labels_depend_on_seed_and_step(likelihood) -> None:
    outputs = torch.zeros(500, 4) if isinstance(likelihood, Categorical) else torch.zeros(500)
    positions = torch.arange(500)
    base = likelihood.sample(outputs, positions, 0, 1)
    assert torch.equal(base, likelihood.sample(outputs, positions, 0, 1))
    for seed, step in ((1, 1), (0, 2)):
        assert not torch.equal(base, likelihood.sample(outputs, positions, seed, step))


def test_attention_models_need_no_care_for_the_exact_product() -> None:
    """F.scaled_dot_product_attention has no double backward in its fused forms: hutchinson takes the mathematical
    one."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    loss = lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()  # noqa: E731
    (exact,) = hutchinson(loss, [q], seed=0, step=1)
    (differences,) = hutchinson_differences(loss, [q], seed=0, step=1)
    assert (exact - differences).norm() < 2e-3 * exact.norm()


def test_positions_may_have_any_integer_dtype_and_no_other(softmax_model) -> None:
    weight, grads = softmax_model.params[0], []
    for dtype in (torch.int64, torch.int32, torch.int16):
        weight.grad = None
        gauss_newton_bartlett(softmax_model.logits, seed=0, step=1, positions=torch.arange(12, dtype=dtype))
        grads.append(weight.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"{dtype}, expected integers"):
            gauss_newton_bartlett(softmax_model.logits, seed=0, step=1, positions=torch.ones(12, dtype=dtype))


def test_a_call_of_padding_alone_takes_part_in_the_backward_with_a_gradient_of_zero(softmax_model) -> None:
    weight, nowhere = softmax_model.params[0], torch.full((12,), -1)
    for estimate in (
        lambda: gauss_newton_bartlett(softmax_model.logits, seed=0, step=1, positions=nowhere, total_predictions=4.5),
        lambda: empirical_fisher(softmax_model.logits, nowhere, ignore_index=-1, total_predictions=4.5),
    ):
        weight.grad = None
        assert estimate() == 0
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("estimator", [hutchinson, hutchinson_differences])
def test_a_loss_that_depends_on_none_of_the_parameters_is_refused(network, estimator) -> None:
    """Zeros would make Sophia momentum-sign descent without a word: FSDP2 hides the parameters, a copy has others."""
    others = [torch.nn.Parameter(p.detach().clone()) for p in network.params]
    with pytest.raises(ValueError, match="depends on none of the parameters"):
        estimator(network.loss, others, seed=0, step=1)


def test_the_exact_product_is_scaled_as_the_loss_is_and_unscaled_by_the_refresh() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    averages = []
    for scaling in ({}, {"grad_scaler": scaler}):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = SophiaH([p], betas=(0.9, 0.0))
        estimates = hutchinson(lambda p=p: (p**3).sum(), [p], seed=0, step=1, **scaling)
        optimizer.update_hessian(estimates=estimates, **scaling)
        averages.append(optimizer.state[p]["hessian"])
    assert averages[0].abs().min() > 0
    assert torch.equal(averages[0], averages[1])


def test_a_difference_of_a_loss_that_computes_in_half_precision_is_refused(network) -> None:
    weights = [p.detach().clone() for p in network.params]

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.ones(2, 3) @ network.params[0].float().T
        return hidden.float().square().mean()

    with pytest.raises(TypeError, match=r"loss_fn computes in torch\.bfloat16 \(.*\), expected float32"):
        hutchinson_differences(loss, network.params, seed=0, step=1)
    assert all(torch.equal(p, before) for p, before in zip(network.params, weights, strict=True))
