"""The benchmark of a large report runs end to end, on few runs."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import page, reading


def test_a_report_of_a_few_runs_is_timed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "ORIGINALS", 4)
    output = tmp_path / "reading.json"
    monkeypatch.setattr(sys, "argv", ["reading.py", "--runs", "6", "--lines", "20", "--output", str(output)])
    assert reading.main() == 0
    assert "6 runs of 20 lines" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["runs"] == 6
    assert 0 < record["seconds"] < 120
    assert record["peak_memory_bytes"] > 5 * 10**7
    assert "`scripts/report.py` on 6 runs of 20 lines" in page.tables(tmp_path)
