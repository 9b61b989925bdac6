"""Half precision and loss scaling: state in float32, unscaling before squaring, and overflows that change nothing."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sophia import AdaHessian, Lion, SophiaG, SophiaH, gauss_newton_bartlett

OPTIMIZERS: list[tuple[type, dict[str, Any]]] = [
    (SophiaG, {}),
    (SophiaG, {"clip": False}),
    (SophiaH, {}),
    (Lion, {}),
    (AdaHessian, {}),
]
FORMS = [{"compile": False, "foreach": False}, {"foreach": True}]


def refresh(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    if isinstance(optimizer, AdaHessian | SophiaH):
        optimizer.update_hessian(estimates=[p.grad])
    elif not isinstance(optimizer, Lion):
        optimizer.update_hessian(num_predictions=50)  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_an_overflow_changes_neither_weights_nor_state(
    cls: type, options: dict[str, Any], form: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40))
    optimizer = cls([p], **options, **form)
    for held_from_the_start in (True, False):
        if not held_from_the_start:
            for _ in range(3):
                p.grad = torch.randn(40)
                refresh(optimizer, p)
                optimizer.step()
        p.grad = torch.randn(40)
        before = p.detach().clone(), {key: value.clone() for key, value in optimizer.state[p].items()}
        p.grad = torch.full((40,), float("nan"))
        p.grad[0] = float("inf")
        optimizer.found_inf = torch.tensor(2.0)  # a GradScaler adds up the flags of two devices
        refresh(optimizer, p)
        optimizer.step()
        del optimizer.found_inf
        assert torch.equal(p, before[0])
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, before[1].get(key, torch.zeros_like(value))), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_grad_scale_divides_the_gradient_and_the_estimate(
    cls: type, options: dict[str, Any], form: dict[str, bool]
) -> None:
    results = []
    for scale in (None, 64.0):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(40))
        optimizer = cls([p], **options, **form)
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        for _ in range(5):
            p.grad = torch.randn(40) * (scale or 1)
            refresh(optimizer, p)
            optimizer.step()
        results.append((p.detach(), dict(optimizer.state[p])))
        if scale is not None:
            assert optimizer.grad_scale == scale
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_bfloat16_weights_keep_their_state_in_float32() -> None:
    """Ten steps below the resolution of bfloat16 at 1 must still reach the momentum."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    reference = torch.nn.Parameter(torch.ones(3))
    optimizer, exact = SophiaG([p], lr=1e-2), SophiaG([reference], lr=1e-2)
    for t in range(10):
        for q in (p, reference):
            q.grad = torch.full((3,), 2.0**-t, dtype=q.dtype)
        for o in (optimizer, exact):
            if o.hessian_due:
                o.update_hessian(num_predictions=3)
            o.step()
    for key in ("exp_avg", "hessian"):
        assert optimizer.state[p][key].dtype == torch.float32
        assert torch.equal(optimizer.state[p][key], exact.state[reference][key])
    torch.testing.assert_close(p.detach().float(), reference.detach(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("cls", [SophiaG, Lion])
def test_a_step_rounds_a_bfloat16_weight_once(cls: type) -> None:
    """Decay and step together: rounded after each, weights would drift."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1000).bfloat16())
    p.grad = torch.randn(1000).bfloat16()
    expected = p.detach().float() * (1 - 0.1 * 0.3) - p.grad.float().sign() * 0.1
    cls([p], lr=0.1, weight_decay=0.3).step()
    assert torch.equal(p, expected.bfloat16())


def test_float32_gradients_for_bfloat16_weights_are_taken_as_they_are() -> None:
    p = torch.zeros(3, dtype=torch.bfloat16)
    optimizer = SophiaH([p])
    estimate = torch.tensor([1.0 + 2**-12, 2.0, -3.0])
    optimizer.update_hessian(estimates=[estimate])
    assert torch.equal(optimizer.state[p]["hessian"], estimate * (1 - 0.99))


def test_a_grad_scaler_takes_the_step_through_the_fused_protocol() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        m = torch.nn.Linear(6, 3)
        optimizer = SophiaG(m.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(12):
            x = torch.randn(8, 6)
            if optimizer.hessian_due:
                n = gauss_newton_bartlett(lambda m=m, x=x: m(x), seed=0, step=1, grad_scaler=scaler)
                optimizer.update_hessian(num_predictions=n, grad_scaler=scaler)
                optimizer.zero_grad()
            scaler.scale(m(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert not hasattr(optimizer, "grad_scale")
        results.append([p.detach() for p in m.parameters()] + [optimizer.state[p]["hessian"] for p in m.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_a_grad_scaler_skips_a_step_that_overflows() -> None:
    m = torch.nn.Linear(6, 3)
    optimizer = SophiaG(m.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    before = [p.detach().clone() for p in m.parameters()]
    scaler.scale(m(torch.ones(1, 6)).sum() * 1e10).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))
    assert scaler.get_scale() < 2.0**120
    assert all(optimizer.state[p]["step"] == 0 for p in m.parameters())
    assert optimizer.hessian_due


def test_an_overflowing_estimate_skips_the_refresh_and_says_so() -> None:
    m = torch.nn.Linear(6, 3)
    optimizer = SophiaG(m.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for p in m.parameters():
        p.grad = torch.full_like(p, 1024.0)
    optimizer.update_hessian(num_predictions=4, grad_scaler=scaler)
    before = [optimizer.state[p]["hessian"].clone() for p in m.parameters()]
    torch.testing.assert_close(before[0], torch.full((3, 6), 0.01 * 4), rtol=1e-6, atol=0)
    m.weight.grad[0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match="overflowed under loss scaling: this refresh is skipped") as caught:
        optimizer.update_hessian(num_predictions=4, grad_scaler=scaler)
    assert caught[0].filename == __file__
    assert all(torch.equal(optimizer.state[p]["hessian"], h) for p, h in zip(m.parameters(), before, strict=True))


def test_half_precision_gradients_are_unscaled_before_they_are_squared() -> None:
    """In float16 the square of a small gradient is zero, and that of the scaled one is infinite."""
    p = torch.zeros(2, dtype=torch.float16)
    p.grad = torch.tensor([1e-3, 500.0], dtype=torch.float16)
    optimizer = SophiaG([p], betas=(0.9, 0.0))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.update_hessian(num_predictions=1)
    expected = (p.grad.float() / 1024).square()
    torch.testing.assert_close(optimizer.state[p]["hessian"], expected)
    assert bool((optimizer.state[p]["hessian"] > 0).all())
