"""A run without progress prints its stacks and ends; a run with progress never does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import lines, run, run_in_child, summary, tiny
from training.distributed import Distributed
from training.exits import EXIT_FAILED
from training.reliability import watchdog
from training.reliability.watchdog import Watchdog

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
SECONDS = "guards.hang_minutes=0.05"  # 3 s
SLOW = ["train.steps=1", "schedule.warmup_steps=0", "train.micro_batch_size=1", "train.shared_forward=false"]


def hang_in_step(step: int) -> None:
    """An endless loop."""
    from training import loop

    original = loop.forward_backward

    def endless(run, batch, *rest):
        while run.state.step == step - 1:
            time.sleep(0.01)
        return original(run, batch, *rest)

    loop.forward_backward = endless


def hang_in_data(step: int) -> None:
    """A data disk that stops answering: the reading thread waits, and so does the loop."""
    from data.batches import Batches

    original = Batches.at

    def dead(self, at, out=None):
        if at == step:
            os.read(os.pipe()[0], 1)
        return original(self, at, out)

    Batches.at = dead  # type: ignore[method-assign]


def hang_with_the_interpreters_lock(step: int) -> None:
    """No Python thread can run, including the watchdog's."""
    import ctypes

    from training import loop

    watchdog.PEERS_SECONDS = 0.5
    original = loop.forward_backward

    def holding(run, batch, *rest):
        if run.state.step == step - 1:
            time.sleep(1)  # the watchdog has armed its timer
            ctypes.PyDLL(None).sleep(60)  # PyDLL, unlike CDLL, keeps the lock
        return original(run, batch, *rest)

    loop.forward_backward = holding


@pytest.mark.parametrize(
    ("hang", "doing", "shown"),
    [
        (hang_in_step, "at step 5", "in endless"),
        (hang_in_data, "waiting for the batch of step 5", "in dead"),
    ],
)
def test_a_hang_shows_the_stacks_and_ends_the_run(
    hang, doing: str, shown: str, corpus: list[str], tmp_path: Path
) -> None:
    overrides = tiny(corpus, tmp_path, SECONDS, "checkpoint.interval=2")
    assert run_in_child(overrides, hang, 5, errors=tmp_path / "errors") == EXIT_FAILED
    said = (tmp_path / "errors").read_text()
    assert f"s while {doing}" in said
    assert "if this was slow but no hang, give more than guards.hang_minutes=0.05" in said
    assert shown in said
    assert shown in (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()
    (event,) = lines(tmp_path / "run", "event")
    assert (event["event"], event["step"]) == ("hang", 4)
    assert summary(tmp_path / "run")["status"] == "failed"
    assert doing in summary(tmp_path / "run")["reason"]
    assert run([*overrides, "guards.hang_minutes=10"]) == 0  # a failed run is unfinished and resumes


def test_a_process_whose_interpreter_is_held_ends_too(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path, SECONDS)
    assert run_in_child(overrides, hang_with_the_interpreters_lock, 5, errors=tmp_path / "errors") == 1
    said = (tmp_path / "errors").read_text()
    assert "Timeout" in said
    assert "in holding" in said


def test_progress_keeps_a_slow_run_alive(tmp_path: Path) -> None:
    with Watchdog(4.0, ALONE, tmp_path) as dog:
        for part in range(9):
            dog.progress(f"part {part}")
            time.sleep(0.5)
    assert list(tmp_path.iterdir()) == []


def test_saves_and_curvature_passes_are_progress(corpus: list[str], tmp_path: Path) -> None:
    """Each part takes half of the time that may pass without progress, a save or a pass several times it."""
    overrides = tiny(corpus, tmp_path, SECONDS, *SLOW)
    assert run_in_child(overrides, slow_parts) == 0


def slow_parts() -> None:
    from training.curvature import CurvaturePass
    from training.strategies.ddp import DDP

    reported, pieces = CurvaturePass._reported, DDP.pieces

    def slowly(parts: Iterator[Any], longest: int) -> Iterator[Any]:
        for number, part in enumerate(parts):
            time.sleep(1.2 if number < longest else 0)
            yield part

    CurvaturePass._reported = lambda self, parts: slowly(reported(self, parts), 4)  # type: ignore[method-assign]
    DDP.pieces = lambda self: slowly(pieces(self), 4)  # type: ignore[method-assign]


def test_the_watchdog_stops_with_the_run(tmp_path: Path) -> None:
    with Watchdog(1.0, ALONE, tmp_path) as dog:
        dog.progress("little")
    assert not dog._thread.is_alive()


def test_null_disables_the_watchdog(tmp_path: Path) -> None:
    with Watchdog(None, ALONE, tmp_path) as dog:
        dog.progress("anything")
    assert not hasattr(dog, "_thread")
