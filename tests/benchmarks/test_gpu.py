"""The benchmark for a GPU runs to its end without one, and a part that fails takes no other with it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_that_needs_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "rehearsal" / "benchmark.json").read_text())
    assert record["skipped"] == {"tests": "no CUDA device"}
    assert record["parts"].keys() == gpu.PARTS.keys() - {"tests"}
    assert record["parts"]["curvature_124m"]["estimators"].keys() == gpu.ESTIMATORS.keys()
    assert record["parts"]["training_355m"]["arms"].keys() == {"here", "plain", "transformers"}
    assert not any(part.get("skipped") for part in record["parts"].values())
    assert record["parts"]["run"]["summary"]["status"] == "completed"
    written = (tmp_path / "rehearsal" / "README.md").read_text()
    assert "A rehearsal" in written
    assert "- tests: no CUDA device" in written
    assert (tmp_path / "rehearsal" / "loss.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("part", "found"),
    [
        (lambda plan: {"value": 1}, ("done", {"value": 1})),
        (lambda plan: 1 // 0, ("failed", "ZeroDivisionError: integer division or modulo by zero")),
        (lambda plan: sys.exit(7), ("failed", "its process ended with code 7")),
        (lambda plan: time.sleep(60), ("skipped", "stopped after 1 s: time is up")),
    ],
    ids=["done", "fails", "dies", "hangs"],
)
def test_a_part_runs_in_a_process_of_its_own(
    part: object, found: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.PARTS, "part", part)  # type: ignore[arg-type]
    assert gpu.run_part("part", gpu.Plan(torch.device("cpu"), True, tmp_path), 1.0) == found


def test_what_is_missing_is_on_the_page() -> None:
    record = {"rehearsal": False, "parts": {"training_355m": TRAINING}, "skipped": {"sample": "time is up"}}
    page = list(gpu.lines(record))
    assert "- sample: time is up" in page
    assert "- training_355m, plain: OutOfMemoryError: CUDA out of memory" in page


TRAINING = {
    "batch_size": 8,
    "sequence_length": 1024,
    "flops": 1e12,
    "tokens": 8192,
    "arms": {"here": {"median_seconds": 0.1, "peak_bytes": 1e9, "first_step_seconds": 20.0}},
    "skipped": {"plain": "OutOfMemoryError: CUDA out of memory"},
}
