"""The page of benchmarks shows the committed records and marks missed targets."""

import json
from pathlib import Path

from benchmarks import page
from benchmarks.training_step import ARMS


def test_the_page_is_made_from_the_committed_records() -> None:
    assert page.tables(page.RESULTS).strip() in page.PAGE.read_text()
    record, larger = (json.loads((page.RESULTS / f"training_step_{size}.json").read_text()) for size in ("30m", "124m"))
    assert page.speed(record, larger) in page.README.read_text()


def test_readmes_line_names_the_arms_that_were_measured() -> None:
    seconds = {"here": 1.5, "here, default allocator": 2.0, "plain": 3.0, "transformers": 5.0}
    group = {name: {"median_seconds": value} for name, value in seconds.items()}
    record = {"groups": [{"here": {"median_seconds": 9.0}}, group], "hardware": {"device": "cuda", "gpu": "H100"}}
    larger = {
        "groups": [
            {"here": {"median_seconds": 4.0}, "plain, memory kept": {"median_seconds": 5.0}},
            {"here, default allocator": {"median_seconds": 5.0}, "transformers": {"median_seconds": 8.0}},
        ]
    }
    line = page.speed(record, larger).splitlines()[0]
    assert line.startswith("A training step of a GPT-2 of 30M parameters takes 2.00 s here (H100, bf16, AdamW).")
    assert "transformers' GPT2LMHeadModel takes 2.5 and a plain GPT-2 as in nanoGPT 1.5 times as long" in line
    assert "transformers takes 1.6 and the plain model takes 1.2 times as long." in line
    assert "shortens the step of 30M to 1.50 s" in line
    assert {ARMS[name].kept for name in ("here, default allocator", *page.PEERS) if name in ARMS} == {False}


def test_a_missed_target_is_marked(tmp_path: Path) -> None:
    record = json.loads((page.RESULTS / "optimizer_step.json").read_text())
    record["steps"]["Sophia"]["ratio"] = 0.96
    record["steps"]["Lion"]["ratio"] = 0.70
    (tmp_path / "optimizer_step.json").write_text(json.dumps(record))
    lines = page.tables(tmp_path).splitlines()
    assert next(line for line in lines if line.startswith("| Sophia |")).endswith("| ≤ 0.95 | **falls short** |")
    assert next(line for line in lines if line.startswith("| Lion |")).endswith("| ≤ 0.80 | pass |")
