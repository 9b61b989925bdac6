"""Guards on a run's numbers: loss spikes, non-finite steps, ranks that differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.runs import curve, lines, run, run_in_child, summary, tiny
from training import loop
from training.distributed import Distributed
from training.loop import Reporter
from training.reliability import checkpoints, guards
from training.reliability.checkpoints import Checkpoint
from training.reliability.guards import HORIZON, LossSpikes, RanksDiffer, compare_ranks
from training.reliability.watchdog import Watchdog
from training.strategies.ddp import DDP


def noisy(steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, generator=generator).tolist()
    return [3 + 2 * math.exp(-step / 60) + 0.05 * noise[step] for step in range(steps)]


def events(losses: list[float], threshold: float = 6.0) -> list[int]:
    spikes = LossSpikes(threshold)
    return [step for step, loss in enumerate(losses) if spikes.observe(loss) is not None]


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes(seed: int) -> None:
    assert events(noisy(600, seed)) == []


def test_a_spike_is_marked_where_it_begins_and_once() -> None:
    losses = noisy(600)
    for step, height in enumerate((1.0, 1.5, 2.0, 1.2, 0.8)):
        losses[300 + step] += height
    losses[450] += 1.0
    assert events(losses) == [300, 450]


def test_a_loss_that_stays_high_becomes_normal() -> None:
    losses = noisy(900)
    losses[400:] = [loss + 3 for loss in losses[400:]]
    losses[850] += 2.0
    assert events(losses) == [400, 850]


def test_nothing_is_said_before_there_is_a_mean() -> None:
    assert events([5.0] * (HORIZON - 1) + [50.0]) == []
    assert events([5.0] * HORIZON + [50.0]) == [HORIZON]


@pytest.mark.parametrize("mean", [0.1, 5.0])
def test_noise_is_never_taken_for_less_than_half_a_percent_of_the_loss(mean: float) -> None:
    """After constant losses, six deviations of half a percent are three percent."""
    assert events([mean] * 200 + [1.0299 * mean]) == []
    assert events([mean] * 200 + [1.0301 * mean]) == [200]


@given(losses=st.lists(st.floats(0, 20) | st.just(math.nan) | st.just(math.inf), max_size=120), cut=st.integers(0, 120))
@settings(max_examples=50, deadline=None)
def test_spike_detection_continues_after_an_interruption(losses: list[float], cut: int) -> None:
    whole = LossSpikes(3.0)
    expected = [whole.observe(loss) for loss in losses]
    first, second = LossSpikes(3.0), LossSpikes(3.0)
    got = [first.observe(loss) for loss in losses[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.observe(loss) for loss in losses[cut:]]
    assert got == expected
    assert second.state_dict() == whole.state_dict()


# Whole runs with non-finite gradients, or one bad batch.


def spoil_gradients(steps: tuple[int, ...]) -> None:
    """Make one gradient infinite before these updates."""
    count = [0]
    original = DDP.step

    def spoiled(self: DDP, max_norm: float | None, loss: torch.Tensor) -> Any:
        count[0] += 1
        if count[0] in steps:
            next(iter(self.model.parameters())).grad.view(-1)[3] = math.inf
        return original(self, max_norm, loss)

    DDP.step = spoiled  # type: ignore[method-assign]


def spoil_losses(steps: tuple[int, ...]) -> None:
    """Make the losses of these updates infinite, but not their gradients."""
    original = loop.forward_backward

    def spoiled(run: Any, *rest: Any) -> torch.Tensor:
        return original(run, *rest) + (math.inf if run.state.step + 1 in steps else 0.0)

    loop.forward_backward = spoiled


def spoil_estimate(number: int) -> None:
    """Make the gradients of this refresh NaN."""
    count = [0]
    original = DDP.update_hessian

    def spoiled(self: DDP, **named: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            for parameter in self.model.parameters():
                parameter.grad.fill_(math.nan)
        return original(self, **named)

    DDP.update_hessian = spoiled  # type: ignore[method-assign]


def run_spoiled(overrides: Sequence[str], spoil: Callable[..., None], *arguments: Any) -> int:
    """The command line after `spoil(*arguments)`, whose replacements are undone; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        replaced = [(DDP, "step"), (DDP, "update_hessian"), (Reporter, "__init__")]
        for owner, name in [*replaced, (loop, "forward_backward")]:
            patch.setattr(owner, name, getattr(owner, name))
        spoil(*arguments)
        return run(overrides)


@pytest.mark.parametrize("optimizer", ["sophiag", "muon"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(
    optimizer: str, corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path, f"optimizer={optimizer}")
    assert run_spoiled(overrides, spoil_gradients, (5, 6, 13)) == 0
    trained = lines(tmp_path / "run", "train")
    assert [line["step"] for line in trained if line.get("skipped")] == [5, 6, 13]
    assert [line["step"] for line in trained if line["grad_norm"] is None] == [5, 6, 13]
    assert summary(tmp_path / "run")["skipped_steps"] == 3
    assert all(math.isfinite(line["loss"]) for line in trained)
    assert "step 6: gradient is not finite, step skipped (2 in a row, 10 allowed)" in capfd.readouterr().err


def test_a_step_whose_loss_alone_is_not_finite_is_skipped_like_one_of_bad_gradients(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    by_gradient, by_loss = (tiny(corpus, tmp_path, name=name) for name in ("gradient", "loss"))
    assert run_spoiled(by_gradient, spoil_gradients, (5, 13)) == 0
    assert run_spoiled(by_loss, spoil_losses, (5, 13)) == 0
    trained = lines(tmp_path / "loss", "train")
    assert [line["step"] for line in trained if line.get("skipped")] == [5, 13]
    assert [line["step"] for line in trained if line["loss"] is None] == [5, 13]
    assert "step 5: loss is not finite, step skipped (1 in a row, 10 allowed)" in capfd.readouterr().err
    one, other = (checkpoints.available(tmp_path / name / "checkpoints")[0] for name in ("gradient", "loss"))
    assert checkpoints.step_of(one) == checkpoints.step_of(other) == 24
    for name in Checkpoint(one).names():
        assert torch.equal(Checkpoint(one).tensor(name), Checkpoint(other).tensor(name)), name


def test_more_than_n_skipped_steps_in_a_row_end_as_diverged_and_the_last_good_checkpoint_stays(
    corpus: list[str], tmp_path: Path
) -> None:
    overrides = tiny(corpus, tmp_path, "train.max_skipped_steps=3", "checkpoint.interval=2", "checkpoint.keep=1")
    assert run_spoiled(overrides, spoil_gradients, tuple(range(9, 25))) == 3
    ended = summary(tmp_path / "run")
    assert (ended["status"], ended["steps"], ended["skipped_steps"]) == ("diverged", 12, 4)
    assert ended["reason"] == "4 non-finite steps in a row, up to step 12"
    (event,) = lines(tmp_path / "run", "event")
    assert (event["event"], event["step"], event["reason"]) == ("diverged", 12, ended["reason"])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]


def report_a_step_late(steps: tuple[int, ...]) -> None:
    """As on CUDA, where a step's numbers are read after the next one has been queued."""
    spoil_gradients(steps)
    original = Reporter.__init__

    def late(self: Reporter, run: Any) -> None:
        original(self, run)
        self._behind = 1

    Reporter.__init__ = late  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [24, 16, 13], ids=["at the end", "before an evaluation", "between"])
def test_a_run_diverges_alike_whether_its_numbers_arrive_immediately_or_a_step_late(
    corpus: list[str], tmp_path: Path, step: int
) -> None:
    ended = {}
    for name, prepare in {"at once": spoil_gradients, "late": report_a_step_late}.items():
        overrides = tiny(corpus, tmp_path, "train.max_skipped_steps=0", name=name.replace(" ", "-"))
        assert run_spoiled(overrides, prepare, (step,)) == 3, name
        directory = tmp_path / name.replace(" ", "-")
        ended[name] = summary(directory)
        assert lines(directory, "train")[-1]["step"] >= step
        assert all(line["step"] < step for line in lines(directory, "eval"))
    assert ended["late"]["status"] == ended["at once"]["status"] == "diverged"
    assert ended["late"]["reason"] == ended["at once"]["reason"]


def test_skipped_steps_are_counted_across_an_interruption(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path, "train.max_skipped_steps=3")
    assert run_in_child([*overrides, "train.steps=24"], spoil_gradients_then_stop, 8) == 75
    assert summary(tmp_path / "run")["skipped_steps"] == 2
    assert run_spoiled(overrides, spoil_gradients, (1, 2)) == 3  # the first two of this sitting: steps 9 and 10
    assert summary(tmp_path / "run")["steps"] == 10


def spoil_gradients_then_stop(step: int) -> None:
    from tests.training.reliability.test_signals import stop_in_step

    spoil_gradients((step - 1, step))
    stop_in_step(step, 15)


def test_a_bad_estimate_never_enters_h_and_is_reported(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_spoiled(overrides, spoil_estimate, 3) == 0
    refreshes = lines(tmp_path / "run", "hessian")
    assert [line["step"] for line in refreshes if line["held_back"]] == [11]
    assert all(line["hessian_norm"] is not None for line in refreshes)
    assert refreshes[2]["hessian_norm"] == refreshes[1]["hessian_norm"]
    assert summary(tmp_path / "run")["estimates_held_back"] == 1
    assert "step 11: non-finite curvature estimate skipped" in capfd.readouterr().err


def test_an_infinite_loss_ends_as_diverged(corpus: list[str], tmp_path: Path) -> None:
    overrides = ["optimizer=adamw", "optimizer.lr=1e30", "train.grad_clip=null", "train.max_skipped_steps=2"]
    assert run(tiny(corpus, tmp_path, *overrides)) == 3
    assert summary(tmp_path / "run")["status"] == "diverged"
    assert run(tiny(corpus, tmp_path, *overrides)) == 3  # said again, not run again


def strike(step: int) -> None:
    """Make the loss of one batch ten times too large."""
    original = loop.forward_backward
    loop.forward_backward = lambda run, batch: original(run, batch) * (10 if run.state.step == step - 1 else 1)


def test_a_loss_spike_is_an_event_and_the_run_continues(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path, "train.steps=70", "eval.interval=70", "optimizer=adamw")
    assert run_spoiled(overrides, strike, 60) == 0
    (event,) = lines(tmp_path / "run", "event")
    assert (event["event"], event["step"]) == ("loss_spike", 60)
    assert event["loss"] > 30 > event["expected"]
    assert summary(tmp_path / "run")["loss_spikes"] == 1


def test_running_as_sign_momentum_is_an_event(corpus: list[str], tmp_path: Path) -> None:
    assert run(tiny(corpus, tmp_path, "optimizer.gamma=1e-30")) == 0
    (event,) = lines(tmp_path / "run", "event")
    assert (event["event"], event["step"]) == ("all_clipped", 6)
    assert "gamma is too small" in event["reason"]


def test_guards_change_neither_curve_nor_name(corpus: list[str], tmp_path: Path) -> None:
    off = ["guards.spike_deviations=null", "guards.weights_interval=null", "guards.hang_minutes=null"]
    assert run(tiny(corpus, tmp_path, *off, name="off")) == 0
    assert run(tiny(corpus, tmp_path, name="on")) == 0
    assert curve(tmp_path / "off") == curve(tmp_path / "on")


# Ranks that differ: two calls that see each other's hashes stand for two ranks.


class Ranks:
    """A stand-in for Distributed with this rank's hashes and another's."""

    world_size = 3

    def __init__(self, other: list[int] | None) -> None:
        self.other = other
        self.mine: list[int] = []

    def gather_objects(self, mine: list[int]) -> list[list[int]]:
        self.mine = mine
        return [mine, mine if self.other is None else self.other, mine]


class Holder:
    shards_optimizer_state = False

    def __init__(self, distributed: Ranks, weight: torch.Tensor) -> None:
        from models import GPT2, GPT2Config

        with torch.device("meta"):
            self.model = GPT2(GPT2Config(vocab_size=61, n_layer=1, n_head=1, n_embd=8, block_size=8))
        self.distributed = distributed
        self.optimizers: list = []
        self.weight = weight
        self.device = weight.device

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"a.weight": torch.ones(3), "b.weight": self.weight, "c.weight": torch.ones(2, 2)}


@pytest.mark.slow
@given(
    place=st.integers(0, 63),
    bit=st.integers(0, 31),
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=64, max_size=64),
)
@settings(max_examples=60, deadline=None)
def test_any_single_bit_that_differs_is_found_and_its_tensor_named(place: int, bit: int, values: list[float]) -> None:
    weight = torch.tensor(values, dtype=torch.float32)
    struck = weight.clone()
    bits = struck.view(torch.int32)
    bits[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    sound, broken = Ranks(None), Ranks(None)
    compare_ranks(Holder(sound, weight))  # type: ignore[arg-type]
    compare_ranks(Holder(broken, struck))  # type: ignore[arg-type]
    with pytest.raises(RanksDiffer, match=r"model\.b\.weight on rank 1$"):
        compare_ranks(Holder(Ranks(broken.mine), weight))  # type: ignore[arg-type]


def test_hashes_of_states_on_the_cpu_come_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAdam counts on the CPU, and torch.stack on CUDA refuses tensors of two devices."""

    def stack(hashes: list[torch.Tensor]) -> None:
        assert {one.device.type for one in hashes} == {"meta"}
        raise StopIteration

    monkeypatch.setattr(torch, "hash_tensor", lambda tensor: torch.zeros((), dtype=torch.uint64, device=tensor.device))
    monkeypatch.setattr(torch, "stack", stack)
    with pytest.raises(StopIteration):
        compare_ranks(Holder(Ranks(None), torch.ones(2, device="meta")))  # type: ignore[arg-type]


def test_ranks_are_compared_at_each_interval_and_before_each_save(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(loop, "compare_ranks", lambda strategy: compared.append("compared"))
    monkeypatch.setattr(Watchdog, "progress", lambda self, doing: compared.append(doing))
    overrides = ["train.steps=8", "checkpoint.interval=6", "guards.weights_interval=3", "optimizer=adamw"]
    assert run(tiny(corpus, tmp_path, *overrides)) == 0
    doing = [compared[place - 1] for place, what in enumerate(compared) if what == "compared"]
    assert doing == ["at step 3, sequence 0 of 8", "saving after step 6", "saving after step 8"]


def test_a_single_process_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "replicated_tensors", lambda strategy: pytest.fail("hashed"))
    holder = Holder(Ranks(None), torch.ones(1))
    holder.distributed = Distributed(0, 0, 1, torch.device("cpu"))  # type: ignore[assignment]
    compare_ranks(holder)  # type: ignore[arg-type]
