"""The page of benchmarks shows what the committed records say, and says so where a target is missed."""

import json
from pathlib import Path

from benchmarks import page


def test_the_page_is_made_from_the_committed_records() -> None:
    part = page.PAGE.read_text().partition(f"<!-- {page.PART}:begin -->")[2].partition(f"<!-- {page.PART}:end -->")[0]
    assert part.strip() == page.tables(page.RESULTS)


def test_a_missed_target_is_called_so(tmp_path: Path) -> None:
    record = json.loads((page.RESULTS / "optimizer_step.json").read_text())
    record["steps"]["Sophia"]["ratio"] = 0.96
    record["steps"]["Lion"]["ratio"] = 0.70
    (tmp_path / "optimizer_step.json").write_text(json.dumps(record))
    lines = page.tables(tmp_path).splitlines()
    assert next(line for line in lines if line.startswith("| Sophia |")).endswith("| ≤ 0.95 | **falls short** |")
    assert next(line for line in lines if line.startswith("| Lion |")).endswith("| ≤ 0.80 | pass |")
