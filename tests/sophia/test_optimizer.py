"""Sophia's update against an independent float64 implementation of the formulas."""

import inspect
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia import AdaHessian, Lion, ReferenceSophiaG, Sophia, SophiaG, SophiaH


@dataclass
class FormulaSophia:
    """m_t, h_t, θ_t as in the paper; refreshes before the steps with (t-1) mod k == 0."""

    theta: list[Tensor]
    lr: float
    betas: tuple[float, float]
    gamma: float
    eps: float
    weight_decay: float
    interval: int
    clip: bool = True
    hessian_power: float = 1.0
    hessian_scale: float = 1.0
    t: int = 0
    m: list[Tensor] = field(init=False)
    h: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.m = [torch.zeros_like(x) for x in self.theta]
        self.h = [torch.zeros_like(x) for x in self.theta]

    @property
    def due(self) -> bool:
        return self.t % self.interval == 0

    def refresh(self, estimates: list[Tensor]) -> None:
        self.h = [self.betas[1] * h + (1 - self.betas[1]) * e for h, e in zip(self.h, estimates, strict=True)]

    def step(self, grads: list[Tensor]) -> None:
        self.t += 1
        for i, g in enumerate(grads):
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            update = self.m[i] / torch.maximum(self.curvature(i), torch.tensor(self.eps, dtype=torch.float64))
            if self.clip:
                update = torch.where(update.abs() > 1, update.sign(), update)
            self.theta[i] = self.theta[i] - self.lr * self.weight_decay * self.theta[i]
            self.theta[i] = self.theta[i] - self.lr * update

    def curvature(self, i: int) -> Tensor:
        """γ·c·max(h, 0)^p, for p = c = 1 the paper's γh."""
        return self.gamma * self.hessian_scale * torch.relu(self.h[i]) ** self.hessian_power

    def unclipped(self) -> int:
        return sum(int((m.abs() < self.curvature(i)).sum()) for i, m in enumerate(self.m))


hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "gamma": st.floats(1e-3, 10),
        "eps": st.sampled_from([1e-15, 1e-12, 1e-7, 1e-3]),
        "weight_decay": st.floats(0, 0.5),
        "hessian_interval": st.integers(1, 7),
        "clip": st.booleans(),
        "hessian_power": st.sampled_from([1.0, 1.0, 0.5, 0.8, 1.5]),
        "hessian_scale": st.sampled_from([1.0, 1.0, 0.01, 3.0]),
    }
).map(lambda hyper: hyper if hyper["clip"] else {**hyper, "hessian_power": 1.0, "hessian_scale": 1.0})
shapes = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (1, 4, 2), (0, 3), (5, 5)]), min_size=1, max_size=4).filter(
    lambda chosen: any(0 not in shape for shape in chosen)
)


@given(hyper=hyperparameters, shapes=shapes, seed=st.integers(0, 2**31), gnb=st.booleans(), foreach=st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_fifty_steps_equal_the_formulas(
    hyper: dict, shapes: list[tuple[int, ...]], seed: int, gnb: bool, foreach: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    normal, uniform = (partial(draw, generator=rng, dtype=torch.float64) for draw in (torch.randn, torch.rand))
    draw = lambda scale: [normal(shape) * scale for shape in shapes]  # noqa: E731
    theta = draw(1)
    params = [torch.nn.Parameter(x.clone()) for x in theta]
    optimizer = Sophia(params, **hyper, foreach=foreach, compile=False)
    hyper["interval"] = hyper.pop("hessian_interval")
    reference = FormulaSophia(theta, **hyper)
    for _ in range(50):
        assert optimizer.hessian_due == reference.due
        if reference.due:
            n = int(torch.randint(1, 10_000, (), generator=rng))
            given_values = draw(10.0 ** (4 * uniform(()) - 3))
            for p, value in zip(params, given_values, strict=True):
                p.grad = value.clone()
            if gnb:
                optimizer.update_hessian(num_predictions=n)
                reference.refresh([n * g * g for g in given_values])
            else:
                optimizer.update_hessian(estimates=given_values)
                reference.refresh(given_values)
        grads = draw(10.0 ** (6 * uniform(()) - 4))
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.step(grads)
        assert int(optimizer.unclipped_count) == reference.unclipped()
        assert optimizer.numel == sum(p.numel() for p in params)
    for p, x, m, h in zip(params, reference.theta, reference.m, reference.h, strict=True):
        # Without the clip a step may be as large as lr · m / ε, whose rounding error stays when θ comes back.
        atol = 1e-12 if hyper["clip"] else 1e-13 / hyper["eps"]
        torch.testing.assert_close(p.detach(), x, rtol=1e-9, atol=atol)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(optimizer.state[p]["hessian"], h, rtol=1e-10, atol=1e-14)
        assert optimizer.state[p]["step"] == 50 or p.numel() == 0


@pytest.mark.parametrize("power", [{}, {"hessian_power": 0.7, "hessian_scale": 0.2}])
def test_float32_stays_within_rounding_of_the_formulas(power: dict[str, float]) -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = [normal(40, 30)]
    p = torch.nn.Parameter(theta[0].float())
    hyper = {"lr": 1e-2, "betas": (0.96, 0.99), "gamma": 0.05, "eps": 1e-3, "weight_decay": 0.2} | power
    optimizer = Sophia([p], **hyper, hessian_interval=3)
    reference = FormulaSophia(theta, **hyper, interval=3)
    for _ in range(50):
        if optimizer.hessian_due:
            estimate = normal(40, 30)
            optimizer.update_hessian(estimates=[estimate])
            reference.refresh([estimate])
        grad = normal(40, 30)
        p.grad = grad.float()
        optimizer.step()
        reference.step([grad])
    torch.testing.assert_close(p.detach().double(), reference.theta[0], rtol=1e-5, atol=1e-6)


def test_without_curvature_the_step_is_the_sign_of_the_momentum() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.0]))
    optimizer = Sophia([p], lr=0.1, weight_decay=0.0, hessian_interval=None)
    p.grad = torch.tensor([5.0, -1e-3, 0.0, 2.0])
    assert optimizer.unclipped_count.shape == ()
    assert optimizer.unclipped_count == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            assert not optimizer.hessian_due
            optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-2.0, 1.0, 3.0, -3.0]))
    assert optimizer.unclipped_count == 0


def test_a_scale_of_typical_curvature_to_1_minus_p_keeps_the_meaning_of_gamma() -> None:
    """At h = h₀ every power with c = h₀^(1-p) takes the paper's step; at p = c = 1 the paper's rule runs, bit for bit."""
    typical, grad = 0.02, torch.tensor([1e-4, -3e-4, 5e-3])
    results = []
    for power in (None, 1.0, 0.5, 0.8):
        p = torch.nn.Parameter(torch.ones(3))
        given = {} if power is None else {"hessian_power": power, "hessian_scale": typical ** (1 - power)}
        optimizer = Sophia([p], lr=0.1, betas=(0.0, 0.0), gamma=0.05, **given)
        optimizer.update_hessian(estimates=[torch.full((3,), typical)])
        p.grad = grad.clone()
        optimizer.step()
        results.append((p.detach(), int(optimizer.unclipped_count)))
    assert torch.equal(results[0][0], results[1][0])
    for weights, unclipped in results[1:]:
        torch.testing.assert_close(weights, results[0][0])
        assert unclipped == 2
    assert Sophia([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["hessian_power"] == 1.0


def test_a_negative_curvature_gives_the_sign_step_and_counts_as_clipped() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Sophia([p], lr=0.1, weight_decay=0.0)
    optimizer.update_hessian(estimates=[torch.tensor([-1e3, 1e3])])
    p.grad = torch.tensor([1e-3, 1e-3])
    optimizer.step()
    assert p[0] == -0.1
    assert -1e-5 < p[1] < 0
    assert optimizer.unclipped_count == 1


def test_v1_notation_converts_as_the_documentation_says() -> None:
    """clip(m / max(h, ε), ρ) with (η, ρ, ε, λ) equals the form here with (ηρ, γ=ρ, ερ, λ/ρ)."""
    lr, rho, eps, decay = 0.02, 0.04, 1e-9, 0.3
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(50, generator=rng, dtype=torch.float64)
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    p = torch.nn.Parameter(theta.clone())
    optimizer = Sophia([p], lr=lr * rho, gamma=rho, eps=eps * rho, weight_decay=decay / rho)
    for t in range(30):
        if t % 10 == 0:
            estimate = torch.randn(50, generator=rng, dtype=torch.float64).square()
            h = 0.99 * h + 0.01 * estimate
            optimizer.update_hessian(estimates=[estimate])
        p.grad = torch.randn(50, generator=rng, dtype=torch.float64)
        m = 0.96 * m + 0.04 * p.grad
        theta = theta * (1 - lr * decay) - lr * (m / h.clamp_min(eps)).clamp(-rho, rho)
        optimizer.step()
    torch.testing.assert_close(p.detach(), theta)


SOPHIA = {"lr": 6e-4, "betas": (0.96, 0.99), "eps": 1e-12, "weight_decay": 0.2, "hessian_interval": 10, "clip": True}
AUTHORS = {"lr": 1e-4, "betas": (0.965, 0.99), "gamma": 0.04 * 5120, "eps": 1e-15, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("cls", "defaults"),
    [
        (SophiaG, {**SOPHIA, "gamma": 0.05}),
        (SophiaH, {**SOPHIA, "gamma": 0.01}),
        (Lion, {"lr": 1e-4, "betas": (0.95, 0.98), "weight_decay": 0.2}),
        (AdaHessian, {"lr": 0.15, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.0, "hessian_interval": 1}),
        (ReferenceSophiaG, {**SOPHIA, **AUTHORS}),
    ],
)
def test_defaults_are_the_papers(cls: type, defaults: dict[str, Any]) -> None:
    group = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {key: group[key] for key in defaults} == defaults


def test_the_signature_of_sophiah_is_that_of_sophia_but_for_gamma() -> None:
    expected = dict(inspect.signature(Sophia).parameters)
    expected["gamma"] = expected["gamma"].replace(default=0.01)
    assert list(inspect.signature(SophiaH).parameters.items()) == list(expected.items())


def test_sophiah_takes_the_arguments_of_sophia() -> None:
    given = {"lr": 0.1, "betas": (0.5, 0.6), "gamma": 0.2, "eps": 0.3, "weight_decay": 0.4, "hessian_interval": 5}
    for form in ({"foreach": True}, {"compile": False}):
        one, other = (
            cls([torch.nn.Parameter(torch.zeros(1))], **given, **form, clip=False) for cls in (Sophia, SophiaH)
        )
        assert {key: other.param_groups[0][key] for key in (*given, "clip")} == {**given, "clip": False}
        assert other._form == one._form


def test_adahessian_equals_its_formulas() -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beta1, beta2, lr, eps, decay = 0.9, 0.99, 0.15, 1e-4, 0.01
    theta, (m, v), n = normal(20), torch.zeros(2, 20, dtype=torch.float64), 0
    p = torch.nn.Parameter(theta.clone())
    optimizer = AdaHessian([p], lr, (beta1, beta2), eps, decay, hessian_interval=2)
    for t in range(1, 21):
        if optimizer.hessian_due:
            estimate = normal(20)
            v, n = beta2 * v + (1 - beta2) * estimate**2, n + 1
            optimizer.update_hessian(estimates=[estimate])
        g = normal(20)
        m = beta1 * m + (1 - beta1) * g
        theta = theta * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**n)).sqrt() + eps)
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), theta)


def test_lr_may_be_a_scheduled_tensor_or_any_torch_schedule() -> None:
    def run(lr: float | Tensor, scheduled: bool) -> Tensor:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = SophiaG([p], lr=lr, hessian_interval=None)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) if scheduled else None
        for _ in range(10):
            p.grad = p.detach().clone()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        return p.detach()

    torch.testing.assert_close(run(torch.tensor(0.01), False), run(0.01, False))
    torch.testing.assert_close(run(torch.tensor(0.01), True), run(0.01, True))
    assert not torch.equal(run(0.01, True), run(0.01, False))
