"""The ledger books every cost under its kind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

import training.loop
import training.reliability.checkpoints
from models import GPT2, GPT2Config
from training.config import Estimator, SophiaConfig
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.recording.ledger import CompilationClock, Ledger
from training.records import RunRecord
from training.strategies.ddp import DDP


class Clock:
    """A clock for the ledger that only selected operations advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._patch = monkeypatch
        monkeypatch.setattr("training.recording.ledger.time", SimpleNamespace(perf_counter=lambda: self.now))

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def takes(self, seconds: float, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.passes(seconds)
            return original(*arguments, **named)

        self._patch.setattr(owner, name, timed)


def compile_something(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Call torch.compile's callbacks without compiling."""
    told = CallbackArgs(CallbackTrigger.DYNAMO, "0/0")
    callback_handler.run_start_callbacks(told)
    meanwhile()
    callback_handler.run_end_callbacks(told)


def test_compilation_is_booked_apart_in_every_run_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study runs its trials in one process and resets the compiler in between, which removes the callbacks."""
    clock = Clock(monkeypatch)
    for _ in range(3):
        torch._dynamo.reset()
        ledger = Ledger(torch.device("cpu"), CompilationClock.installed())
        with ledger.measure("forward_backward"):
            clock.passes(1)
            compile_something(lambda: clock.passes(5))
        assert ledger.entries["compilation"].count == 1
        assert ledger.entries["compilation"].seconds == pytest.approx(5)
        assert ledger.seconds == pytest.approx(1)


def test_a_clock_installed_twice_counts_once() -> None:
    clock = CompilationClock.installed()
    assert CompilationClock.installed() is clock
    before = clock.count
    compile_something()
    assert clock.count == before + 1


# A model of two layers of width 32 with a padded vocabulary of 384, on sequences of 16 tokens. The forward of a token:
TRUNK = 2 * 2 * 12 * 32**2 + 4 * 2 * 16 * 32
FORWARD = TRUNK + 2 * 384 * 32
# Three steps of eight sequences in micro-batches of four, a refresh from four sequences before steps 1 and 3;
# evaluations after 0, 2 and 3 steps, of 300 tokens in three forwards each; checkpoints after 2 and 3.
BILLED = [
    *("model.n_layer=2", "model.n_embd=32", "train.sequence_length=16", "train.steps=3"),
    *("train.global_batch_size=8", "train.micro_batch_size=4", "eval.interval=2", "eval.tokens=300"),
    *("eval.micro_batch_size=8", "checkpoint.interval=2"),
]
REFRESHED = ["optimizer.hessian_interval=2", "optimizer.batch_fraction=0.5"]
OWN_FORWARD = [*REFRESHED, "train.shared_forward=false"]
FISHER = ["optimizer.estimator=empirical_fisher", *REFRESHED]
DIFFERENCES = ["optimizer.estimator=hutchinson_differences", *REFRESHED]
#: Overrides; for a refresh: FLOPs per token, seconds (one for each forward and each backward), and the number of gradients
#: summed over the ranks.
REFRESHES: dict[str, tuple[list[str], int, int, int]] = {
    "none": (["optimizer=adamw"], 0, 0, 0),
    "shared_forward": (["optimizer=sophiag", *REFRESHED], 2 * TRUNK, 1, 1),
    "gnb": (["optimizer=sophiag", *OWN_FORWARD], 3 * FORWARD, 2, 1),
    "empirical_fisher": (["optimizer=sophiag", *FISHER], 3 * FORWARD, 2, 1),
    "differences": (["optimizer=sophiah", *DIFFERENCES], 6 * FORWARD, 4, 2),
    # The backwards are autograd's own, which take no time here, and the products are summed outside the strategy.
    "hutchinson": (["optimizer=sophiah", *REFRESHED], 9 * FORWARD, 1, 0),
}


@pytest.mark.parametrize("refresh", REFRESHES)
def test_tokens_flops_seconds_and_bytes_are_booked_under_what_they_were_spent_on(
    train: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch, refresh: str
) -> None:
    clock = Clock(monkeypatch)
    clock.takes(1, GPT2, "forward")
    clock.takes(1, DDP, "backward")
    clock.takes(10, training.loop, "next_batch")
    clock.takes(100, DDP, "step")
    clock.takes(1000, training.reliability.checkpoints, "save")
    monkeypatch.setattr(DDP, "bytes_communicated", lambda self, micro_batches: 100 + micro_batches)
    overrides, flops, seconds, sums = REFRESHES[refresh]
    record = train("run", *BILLED, *overrides)
    assert record.summary is not None
    refreshes = 2 if flops else 0
    forward_backward = {"tokens": 3 * 128, "flops": 3 * 128 * 3 * FORWARD, "seconds": 3 * 2 * (1 + 1), "count": 3}
    curvature = {
        "tokens": refreshes * 64,
        "flops": refreshes * 64 * flops,
        "seconds": refreshes * seconds,
        "count": refreshes,
    }
    assert record.summary["ledger"] == {
        "forward_backward": forward_backward,
        "curvature": curvature,
        "optimizer": {"tokens": 0, "flops": 0, "seconds": 3 * 100, "count": 3},
        "data": {"tokens": 0, "flops": 0, "seconds": 3 * 10, "count": 3},
        "evaluation": {"tokens": 3 * 300, "flops": 3 * 300 * FORWARD, "seconds": 3 * 3, "count": 3},
        "checkpoint": {"tokens": 0, "flops": 0, "seconds": 2 * 1000, "count": 2},
        "compilation": {"tokens": 0, "flops": 0, "seconds": 0, "count": 0},
    }
    assert record.summary["flops"] == forward_backward["flops"] + curvature["flops"]
    assert record.summary["seconds"] == forward_backward["seconds"] + curvature["seconds"] + 300 + 30
    # A step's line includes the cost of the refresh before it.
    first, second, last = record.metrics("train")
    assert first["flops"] == 128 * 3 * FORWARD + 64 * flops
    assert second["tokens_per_second"] == 128 / (10 + 2 * (1 + 1) + 100)
    assert (last["flops"], last["seconds"]) == (record.summary["flops"], record.summary["seconds"])
    assert record.summary["shared_forwards"] == (2 if refresh == "shared_forward" else 0)
    assert record.summary["bytes_communicated"] == 3 * (100 + 2) + refreshes * sums * (100 + 1)


@pytest.mark.parametrize(
    ("estimator", "all_reduces"),
    [("gnb", 1), ("empirical_fisher", 1), ("hutchinson", 1), ("hutchinson_differences", 2)],
)
def test_a_refresh_on_two_ranks_sends_each_gradient_once_and_of_differences_twice(
    estimator: Estimator, all_reduces: int
) -> None:
    config = SophiaConfig(name="sophiag", lr=1e-3, gamma=0.05, estimator=estimator)
    shape = GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16, block_size=12)
    with torch.device("meta"):
        model = GPT2(shape)
    strategy = DDP(Distributed(0, 0, 2, torch.device("cpu")), bf16=False, compile_model=False)
    strategy.model = model
    # Each of two ranks sends half of a buffer twice; a float32 has four bytes.
    expected = all_reduces * 4 * sum(p.numel() for p in model.parameters())
    assert CurvaturePass(config, 0, 8, 1).bytes_communicated(strategy) == expected
