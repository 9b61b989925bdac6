"""The benchmark of the optimizer step runs, compares every arm with fused AdamW and writes what it prints."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import optimizer_step


def test_the_table_is_written_with_ratios_targets_and_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = {"empty_cache_seconds": 3.0, "full_cache_seconds": 1.0}
    monkeypatch.setattr(optimizer_step, "measure_cold_start", lambda device: cold)
    output = tmp_path / "results" / "optimizer_step.json"
    arguments = ["--model", "tiny", "--rounds", "3", "--slow", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["optimizer_step.py", *arguments])
    assert optimizer_step.main() == 0
    results = json.loads(output.read_text())
    assert results["steps"]["AdamW, fused"]["ratio"] == 1
    assert set(optimizer_step.TARGETS) < set(results["steps"])
    assert results["hardware"]["cpu"]
    assert results["cold_start"] == cold
    assert "Optimizer step" in capsys.readouterr().out
