"""A record against a run made again: what counts as the same, and what is named."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis.records import load_run
from analysis.trials import Trial
from studies.verify import TOLERANCE, compare, unequal
from training.records import RecordError


def record(directory: Path, losses: Mapping[int, float | None], threads: int = 1) -> Path:
    """A run with an evaluation and a train line at each step."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: run\nseed: 1\noptimizer: {name: adamw}\ntrain: {steps: 8}\n")
    hardware = {"cpu": "some processor", "threads": threads}
    (directory / "environment.json").write_text(json.dumps({"hardware": hardware}))
    lines: list[dict[str, Any]] = []
    for step, loss in losses.items():
        counters = {"step": step, "tokens": step, "flops": step, "seconds": 1.0 * step}
        lines += [{"kind": "train", **counters, "loss": loss}, {"kind": "eval", **counters, "val_loss": loss}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "summary.json").write_text(json.dumps({"status": "completed", "final_val_loss": 1.0}))
    return directory


def trial(directory: Path) -> Trial:
    return Trial("adamw", "reporting", "gpt2_nano", 8, 1, {}, directory, load_run(directory))


def test_the_largest_difference_counts_whatever_the_kind_of_line(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: 1.0}))
    again = record(tmp_path / "again", {2: 9.0, 4: 2.0, 6: 9.0, 8: 1.0 + TOLERANCE / 2})
    found = compare(kept, again, tmp_path)
    assert (found.run, found.lines) == ("kept", 4), "lines that the record was thinned by do not count"
    assert found.difference == pytest.approx(TOLERANCE / 2)
    assert found.holds
    assert not unequal([found])

    other = compare(kept, record(tmp_path / "other", {4: 2.0, 8: 1.002}, threads=2), tmp_path)
    assert not other.holds
    (line,) = unequal([other])
    assert line.startswith("kept: 0.002 nats from its record")
    assert "recorded on some processor, threads 1, now some processor, threads 2" in line


def test_a_loss_that_is_not_finite_agrees_with_its_like_alone(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: None}))
    assert compare(kept, record(tmp_path / "same", {4: 2.0, 8: None}), tmp_path).difference == 0
    finite = compare(kept, record(tmp_path / "finite", {4: 2.0, 8: 1.0}), tmp_path)
    assert finite.difference == math.inf
    assert unequal([finite])


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0}))
    with pytest.raises(RecordError, match="no step in common"):
        compare(kept, record(tmp_path / "again", {8: 2.0}), tmp_path)
