"""One prepared corpus for all tests of whole runs, and runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runs import prepare_corpus, run
from training.records import RunRecord


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that choose a small prepared corpus."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(corpus: list[str]) -> list[str]:
    """Overrides of a run of 12 steps of 8 sequences of 32 tokens."""
    return [
        *corpus,
        "model=gpt2_nano",
        "model.n_embd=32",
        "train.steps=12",
        "train.global_batch_size=8",
        "train.sequence_length=32",
        "train.precision=fp32",
        "train.compile=false",
        "train.device=cpu",
        "eval.interval=4",
        "eval.tokens=1024",
        "schedule.warmup_steps=1",
        "checkpoint.interval=5",
    ]


@pytest.fixture
def train(tiny: list[str], tmp_path: Path) -> Callable[..., RunRecord]:
    """Run `name` under overrides, here; its exit code is checked, its record returned."""

    def trained(name: str, *overrides: str, expect: int = 0) -> RunRecord:
        assert run([*tiny, f"output_dir={tmp_path}", f"name={name}", *overrides]) == expect
        return RunRecord.open(tmp_path / name)

    return trained
