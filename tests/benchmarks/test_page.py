"""The page of benchmarks shows the committed records and marks missed targets."""

import json
from pathlib import Path

from benchmarks import page


def test_the_page_is_made_from_the_committed_records() -> None:
    assert page.tables(page.RESULTS).strip() in page.PAGE.read_text()


def test_a_missed_target_is_marked(tmp_path: Path) -> None:
    record = json.loads((page.RESULTS / "optimizer_step.json").read_text())
    record["steps"]["Sophia"]["ratio"] = 0.96
    record["steps"]["Lion"]["ratio"] = 0.70
    (tmp_path / "optimizer_step.json").write_text(json.dumps(record))
    lines = page.tables(tmp_path).splitlines()
    assert next(line for line in lines if line.startswith("| Sophia |")).endswith("| ≤ 0.95 | **falls short** |")
    assert next(line for line in lines if line.startswith("| Lion |")).endswith("| ≤ 0.80 | pass |")
