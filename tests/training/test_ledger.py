"""What the ledger books where."""

from __future__ import annotations

import time

import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

from training.ledger import CompilationClock, Ledger


def compile_something(seconds: float) -> None:
    """What torch.compile tells its callbacks, without compiling."""
    told = CallbackArgs(CallbackTrigger.DYNAMO, "0/0")
    callback_handler.run_start_callbacks(told)
    time.sleep(seconds)
    callback_handler.run_end_callbacks(told)


def test_compilation_is_booked_apart_in_every_run_of_a_process() -> None:
    """A study runs its trials in one process and resets the compiler in between, which forgets who listens."""
    for _ in range(3):
        torch._dynamo.reset()
        ledger = Ledger(torch.device("cpu"), CompilationClock.installed())
        with ledger.measure("forward_backward"):
            compile_something(0.05)
        assert ledger.entries["compilation"].count == 1
        assert 0.05 <= ledger.entries["compilation"].seconds < 0.5
        assert ledger.seconds < 0.05


def test_a_clock_asked_for_twice_counts_once() -> None:
    clock = CompilationClock.installed()
    assert CompilationClock.installed() is clock
    before = clock.count
    compile_something(0.0)
    assert clock.count == before + 1
