"""The benchmark of growth flags quadratic costs and not linear ones, and runs a family end to end."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scaling

SIZES = [1e3, 2e3, 4e3, 8e3]


def test_a_linear_cost_with_a_fixed_price_is_not_flagged() -> None:
    found = scaling.fit(SIZES, [1.0 + size / 1e3 for size in SIZES])
    assert found["slope"] < 1
    assert not found["super_linear"]


def test_a_quadratic_cost_is_flagged_with_its_slope() -> None:
    found = scaling.fit(SIZES, [size**2 for size in SIZES])
    assert found["slope"] == pytest.approx(2)
    assert found["super_linear"]


def test_a_cost_that_turns_quadratic_at_the_end_is_flagged() -> None:
    found = scaling.fit(SIZES, [1e3, 1.1e3, 1.2e3, 1.2e3 * 4])
    assert found["slope"] < 1
    assert found["super_linear"]


def test_records_made_for_timing_are_read_and_the_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        scaling, "families", lambda device: {"analysis": lambda: scaling.analyses(counts=(4, 8), lines=20)}
    )
    monkeypatch.setattr(scaling.hardware, "keep_memory_mapped", lambda: True)
    output = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--rounds", "1", "--device", "cpu", "--output", str(output)])
    assert scaling.main() == 0
    row = json.loads(output.read_text())["families"]["analysis"]
    assert row["sizes"] == [4, 8]
    assert len(row["seconds"]) == 2
    assert "8 runs" in capsys.readouterr().out
