"""A trace of the steps that were asked for."""

import errno
import json
from collections.abc import Callable
from typing import Any

import pytest

from training.recording import profiling
from training.records import RunRecord


def test_a_trace_has_the_steps_after_those_that_are_left_out(train: Callable[..., RunRecord]) -> None:
    record = train(
        "run", "optimizer=adamw", "train.steps=4", "profile.enabled=true", "profile.after=1", "profile.steps=2"
    )
    events = json.loads((record.directory / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    # Counted from 0, as the profiler does.
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert "aten::" in (record.directory / "profile" / "table.txt").read_text()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    train: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Any, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(profiling, "write_atomically", full)
    record = train(
        "run", "optimizer=adamw", "train.steps=4", "profile.enabled=true", "profile.after=1", "profile.steps=2"
    )
    assert record.summary is not None
    assert record.summary["status"] == "completed"
    assert "profile/table.txt cannot be written: No space left on device" in capfd.readouterr().err
