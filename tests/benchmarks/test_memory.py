"""The benchmark of memory: a real step of a small model, measured and held against the arithmetic."""

import json
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import PAGE, RESULTS, TOLERANCE, Case, check, markdown, measured_peaks, page_table
from planning.plan import planned_shape
from training.distributed import Distributed

TINY = "model=gpt2_nano tokenizer=bpe tokenizer.vocab_size=1024 train.sequence_length=64 train.global_batch_size=16"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    committed: dict[str, Any] = json.loads((RESULTS / "memory.json").read_text())
    return committed


@pytest.mark.parametrize(
    "overrides",
    [
        "train.precision=fp32 optimizer=adamw train.micro_batch_size=8",
        "train.precision=bf16 optimizer=sophiag train.micro_batch_size=4",
    ],
)
def test_planned_memory_is_within_the_tolerance_of_a_real_step(overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.SIZES, "tiny", TINY)
    case = Case("tiny", 1, f"strategy=ddp {overrides}")
    config = case.config()
    peaks = measured_peaks(config, planned_shape(config), Distributed(0, 0, 1, torch.device("cpu")))
    record = check(case, peaks)
    assert set(record["planned_by_phase"]) == set(peaks)
    assert abs(record["planned_over_measured"] - 1) <= TOLERANCE
    table = markdown({"command": "", "sizes": {"tiny": TINY}, "cases": [record]})
    assert table.splitlines()[-1].endswith(f"| {record['planned_over_measured']:.3f} |")


def test_the_page_and_the_table_are_made_from_the_committed_record(record: dict[str, Any]) -> None:
    assert (RESULTS / "memory.md").read_text(encoding="utf-8") == markdown(record)
    assert page_table(record).strip() in PAGE.read_text(encoding="utf-8")


def test_the_arithmetic_is_within_the_tolerance_of_the_committed_measurements(record: dict[str, Any]) -> None:
    assert all(abs(case["planned_over_measured"] - 1) <= TOLERANCE for case in record["cases"])
    for case in record["cases"][::5]:  # the arithmetic as it is now
        now = check(Case(case["size"], case["ranks"], case["overrides"]), case["measured_by_phase"])
        assert now == case
