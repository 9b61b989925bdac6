"""The sums describe the state; the alarm rings if and only if Sophia runs as momentum-sign."""

import json
import math

import pytest
import torch

from sophia import SophiaG, UnclippedAlarm, curvature_summary, curvature_sums, diagnostics, gauss_newton_bartlett
from sophia.diagnostics import DECADES


def test_every_positive_entry_is_counted_in_its_decade() -> None:
    h = torch.tensor([[3e-14, 2e-12], [0.0, -5.0], [1.0, 9.99], [1e-1, 20.0], [9e3, 2e4], [1e30, 30.0]])
    counts = dict(zip([-13, *DECADES], curvature_summary(curvature_sums(h, h))["histogram"], strict=True))
    expected = {-13: 1, -12: 1, -1: 1, 0: 2, 1: 2, 3: 1, 4: 2}
    assert {decade: count for decade, count in counts.items() if count} == expected


def test_a_gpu_counts_what_a_cpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_PIECE", 7)
    numbers = torch.tensor([*range(5), 3, 3, 0, 4, 4, 4, 1, 0, 3, 3], dtype=torch.float32)
    assert torch.equal(diagnostics._counts_by_comparison(numbers, 6), diagnostics._counts(numbers, 6))


def test_norms_neither_underflow_nor_overflow() -> None:
    huge = torch.full((4, 2), 1e30)
    assert curvature_summary(curvature_sums(huge, huge))["momentum_norm"] == pytest.approx(math.sqrt(8) * 1e30)
    h, m = torch.full((4, 2), 1e-30), torch.tensor([3.0, 4.0])
    found = curvature_summary(curvature_sums(h, torch.zeros_like(h)) + curvature_sums(-m, m))
    assert curvature_summary(curvature_sums(h, h))["hessian_norm"] == pytest.approx(math.sqrt(8) * 1e-30)
    assert (found["hessian_norm"], found["momentum_norm"]) == (pytest.approx(5), pytest.approx(5))
    assert found["positive_fraction"] == 0.8


def test_an_optimizer_without_state_has_nothing_to_tell() -> None:
    empty = torch.zeros(0)
    assert curvature_summary(curvature_sums(empty, empty))["positive_fraction"] == 0.0


def test_the_alarm_rings_once_when_the_fraction_is_zero_for_longer_than_k_steps() -> None:
    alarm = UnclippedAlarm(10)
    assert [alarm.observe(step, 0.0) for step in range(1, 11)] == [None] * 10
    message = alarm.observe(11, 0.0)
    assert message is not None
    assert "every coordinate has been clipped for 11 steps (hessian_interval 10)" in message
    for cause in (
        "update_hessian() is not called",
        "sequences instead of tokens",
        "clipped before",
        "gamma is too small",
        "eps is above γh",
    ):
        assert cause in message
    assert [alarm.observe(step, 0.0) for step in range(12, 40)] == [None] * 28
    assert alarm.observe(40, 0.2) is None
    assert alarm.observe(41, 0.0) is None
    assert alarm.observe(52, 0.0) is not None  # steps may be missing


@pytest.mark.parametrize("cut", [5, 20])
def test_the_alarm_rings_after_an_interruption_as_if_there_had_been_none(cut: int) -> None:
    whole, first, second = UnclippedAlarm(10), UnclippedAlarm(10), UnclippedAlarm(10)
    rung = [first.observe(step, 0.0) for step in range(1, cut + 1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rung += [second.observe(step, 0.0) for step in range(cut + 1, 31)]
    assert rung == [whole.observe(step, 0.0) for step in range(1, 31)]


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_estimator_rings_the_alarm_and_a_sound_one_does_not(broken: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    optimizer = SophiaG(model.parameters(), lr=1e-2, hessian_interval=2, betas=(0.9, 0.9), gamma=5.0)
    alarm = UnclippedAlarm(2)
    rung = False
    for step in range(1, 30):
        if optimizer.hessian_due:
            n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
            if broken:
                optimizer.zero_grad(set_to_none=False)
            optimizer.update_hessian(num_predictions=n)
            optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        fraction = float(optimizer.unclipped_count) / optimizer.numel
        rung |= alarm.observe(step, fraction) is not None
    assert rung == broken
