"""What is reported about the state is what is in the state; the alarm and the controller do what they say."""

import importlib
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia import (
    ConsecutiveCosine,
    GammaController,
    SophiaG,
    SophiaH,
    UnclippedAlarm,
    cosine_of,
    diagnostics,
    gauss_newton_bartlett,
)
from sophia.diagnostics import HISTOGRAM_BINS, histogram_edges


def optimizer_with(hessians: list[torch.Tensor], momenta: list[torch.Tensor], gamma: float = 0.5) -> SophiaH:
    params = [torch.nn.Parameter(torch.zeros_like(h)) for h in hessians]
    optimizer = SophiaH(params, gamma=gamma)
    optimizer.update_hessian(estimates=hessians)
    for p, h, m in zip(params, hessians, momenta, strict=True):
        optimizer.state[p]["hessian"], optimizer.state[p]["exp_avg"] = h.clone(), m.clone()
    return optimizer


def test_the_sums_by_kind_are_those_of_the_state() -> None:
    h = [torch.tensor([[1.0, -2.0], [0.0, 1e-3]]), torch.tensor([4.0, 1e-30])]
    m = [torch.tensor([[0.4, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 0.0])]
    optimizer = optimizer_with(h, m)
    p, q = optimizer.param_groups[0]["params"]
    record = diagnostics(optimizer, {"mlp": [p], "norm": [q]}).read()
    assert record["mlp"]["numel"] == 4
    assert record["mlp"]["unclipped_fraction"] == 0.25  # 0.4 < 0.5; the others are 0 < -1, 0 < 0, 1 < 5e-4
    assert record["norm"]["unclipped_fraction"] == 0.5  # 2 < 2 is false, 0 < 5e-31 is true
    assert record["mlp"]["positive_fraction"] == 0.5
    assert record["mlp"]["negative_fraction"] == 0.25
    assert record["mlp"]["hessian_norm"] == pytest.approx(math.sqrt(5 + 1e-6))
    assert record["mlp"]["momentum_norm"] == pytest.approx(math.sqrt(1.16))
    assert record["all"]["numel"] == 6
    assert record["all"]["hessian_norm"] == pytest.approx(math.sqrt(21))
    assert record["all"]["hessian_age"] == 0


def test_the_histogram_counts_each_positive_entry_in_its_bin() -> None:
    h = torch.tensor([1.5, 2.0, 5.0, 1e-30, 4e-20, 2e3, 1e30, -1.0, 0.0, 3e-7])
    optimizer = optimizer_with([h], [torch.zeros(10)])
    histogram = diagnostics(optimizer).read()["all"]["hessian_histogram"]
    edges = histogram_edges()
    assert len(histogram) == HISTOGRAM_BINS == len(edges) - 1
    assert sum(histogram) == 8
    assert histogram[0] == histogram[-1] == 1
    assert (edges[0], edges[-1]) == (1e-20, 1e4)
    for low, high, count in zip(edges[1:-2], edges[2:-1], histogram[1:-1], strict=True):
        assert count == int(((h >= low) & (h < high)).sum())


def test_the_record_does_not_depend_on_how_many_elements_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h, m = torch.logspace(-22, 6, 40), torch.logspace(-2, 4, 40)
    optimizer = optimizer_with([h], [m])
    whole = diagnostics(optimizer).sums
    monkeypatch.setattr(importlib.import_module("sophia.diagnostics"), "_CHUNK", 7)
    torch.testing.assert_close(diagnostics(optimizer).sums, whole, rtol=1e-6, atol=0)


def test_unclipped_means_by_the_gamma_of_the_parameters_group() -> None:
    optimizer = optimizer_with([torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)])
    p, q = optimizer.param_groups[0]["params"]
    groups = [{"params": [p], "gamma": 0.5}, {"params": [q], "gamma": 2.0}]
    split = SophiaH(groups)
    split.state = optimizer.state
    record = diagnostics(split, {"p": [p], "q": [q]}).read()
    assert [record[kind]["unclipped_fraction"] for kind in ("p", "q")] == [0, 1]


@given(seed=st.integers(0, 2**20), gamma=st.floats(0.01, 10))
@settings(max_examples=20, deadline=None)
def test_the_unclipped_fraction_of_the_state_is_the_count_of_the_step(seed: int, gamma: float) -> None:
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(50))
    optimizer = SophiaG([p], gamma=gamma)
    for _ in range(3):
        p.grad = torch.randn(50)
        optimizer.update_hessian(num_predictions=4)
        optimizer.step()
    count = int(optimizer.unclipped_count)
    assert diagnostics(optimizer).read()["all"]["unclipped_fraction"] == count / optimizer.numel


def test_the_age_of_h_counts_steps_since_the_last_estimate() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = SophiaG([p])
    assert optimizer.hessian_age is None
    optimizer.step()
    assert optimizer.hessian_age is None
    optimizer.update_hessian(num_predictions=1)
    for age in range(5):
        assert optimizer.hessian_age == age
        optimizer.step()
    restored = SophiaG([p])
    restored.load_state_dict(optimizer.state_dict())
    assert restored.hessian_age is None


def test_parameters_without_state_are_left_out() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(2)
    optimizer = SophiaG([p, q])
    optimizer.step()
    assert diagnostics(optimizer).read()["all"]["numel"] == 2
    assert diagnostics(SophiaG([p])).read()["all"]["numel"] == 0


def test_consecutive_cosine_is_that_of_the_two_estimates() -> None:
    tracker = ConsecutiveCosine()
    first, second = (
        [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])],
        [torch.tensor([1.0, 1.0]), torch.tensor([[-4.0]])],
    )
    assert tracker.observe(first) is None
    sums = tracker.observe(second)
    assert sums is not None
    torch.testing.assert_close(cosine_of(sums), torch.tensor([0.5**0.5, -1.0], dtype=torch.float64))
    torch.testing.assert_close(cosine_of(sums.sum(0)), torch.tensor((1 - 8) / math.sqrt(18 * 5), dtype=torch.float64))
    sums = tracker.observe([torch.zeros(2), torch.zeros(1, 1)])
    assert sums is not None
    assert bool((cosine_of(sums) == 0).all())


def test_the_sums_of_the_cosine_are_in_float32_though_the_estimate_before_is_kept_in_bfloat16() -> None:
    tracker, estimate = ConsecutiveCosine(), torch.randn(5000, generator=torch.Generator().manual_seed(0))
    tracker.observe([estimate])
    sums = tracker.observe([estimate])
    assert sums is not None
    kept = estimate.bfloat16().double()
    expected = torch.stack([estimate.double() @ kept, estimate.double().square().sum(), kept.square().sum()])
    torch.testing.assert_close(sums, expected[None], rtol=1e-5, atol=0)


def test_the_alarm_rings_once_when_the_fraction_is_zero_for_longer_than_k_steps() -> None:
    alarm = UnclippedAlarm(10)
    assert [alarm.observe(step, 0.0) for step in range(1, 11)] == [None] * 10
    message = alarm.observe(11, 0.0)
    assert message is not None
    assert "no coordinate has been unclipped for 11 steps (hessian_interval 10)" in message
    for cause in (
        "update_hessian() is not called",
        "sequences instead of tokens",
        "clipped before",
        "gamma is too small",
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


def test_the_controller_holds_the_unclipped_fraction_at_its_target() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(4000))
    scale = torch.randn(4000).exp()
    optimizer = SophiaH([p], lr=1e-3, gamma=0.01, hessian_interval=1, betas=(0.5, 0.9))
    controller = GammaController(optimizer, target=0.3, rate=0.5, span=1e4)
    p.grad = torch.randn(4000)
    optimizer.step()
    controller.update()
    assert controller.gamma == 0.01  # no curvature yet
    fractions = []
    for _ in range(120):
        p.grad = torch.randn(4000)
        optimizer.update_hessian(estimates=[scale * torch.randn(4000).square()])
        optimizer.step()
        controller.update()
        fractions.append(float(optimizer.unclipped_count) / optimizer.numel)
    assert fractions[0] < 0.1
    assert sum(fractions[-20:]) / 20 == pytest.approx(0.3, abs=0.02)
    restored = SophiaH([p])
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["gamma"] == controller.gamma
    assert GammaController(restored).gamma == controller.gamma


@pytest.mark.parametrize(("curvature", "fraction"), [(1e6, 1.0), (-1.0, 0.0)])
def test_the_controller_multiplies_gamma_by_the_exponential_of_what_is_missing(
    curvature: float, fraction: float
) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = SophiaH([p], gamma=0.01)
    controller = GammaController(optimizer, target=0.3, rate=0.5)
    optimizer.update_hessian(estimates=[torch.full((1,), curvature)])
    p.grad = torch.ones(1)
    optimizer.step()
    controller.update()
    assert float(controller.gamma) == pytest.approx(0.01 * math.exp(0.5 * (0.3 - fraction)))


def test_the_controller_counts_over_the_ranks_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Any = object()

    def all_reduce(counts: torch.Tensor, group: Any = None) -> None:
        assert group is ranks
        counts += torch.tensor([0.0, 3.0])  # three coordinates elsewhere, all clipped

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = SophiaH([p], gamma=0.01)
    controller = GammaController(optimizer, target=0.3, rate=0.5, process_group=ranks)
    optimizer.update_hessian(estimates=[torch.full((1,), 1e6)])
    p.grad = torch.ones(1)
    optimizer.step()
    controller.update()
    assert float(controller.gamma) == pytest.approx(0.01 * math.exp(0.5 * (0.3 - 0.25)))


def test_the_controller_stays_within_its_span() -> None:
    p = torch.nn.Parameter(torch.zeros(10))
    optimizer = SophiaH([p], gamma=0.01)
    controller = GammaController(optimizer, target=0.5, rate=1.0, span=3.0)
    optimizer.update_hessian(estimates=[-torch.ones(10)])
    for _ in range(9):
        p.grad = torch.ones(10)
        optimizer.step()
        controller.update()
    assert float(controller.gamma) == pytest.approx(0.03)
