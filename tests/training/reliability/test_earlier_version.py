"""Records, tokens and checkpoints of version 0.1 still load, resume and give the same curve.

version_0.1/ was written at commit 3b433fa: runs/ has two runs preempted after a checkpoint at step 10, whole/ the records of the
same runs without an interruption.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from downstream.inference import open_trained
from tests.training.runs import curve, run, summary, tiny
from training.records import RunRecord

VERSION = Path(__file__).with_name("version_0.1")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "earlier"
    shutil.copytree(VERSION, directory)
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
def test_a_run_resumes_and_follows_the_curve_of_the_earlier_version(earlier: Path, optimizer: str) -> None:
    corpus = [
        *("data=text", "data.paths=[corpus.jsonl]", "data.directory=tokens", "data.validation.fraction=0.2"),
        *("tokenizer=bpe", "tokenizer.vocab_size=300"),
    ]
    shape = ["model.n_embd=16", "model.n_layer=1", "model.block_size=16"]
    assert run(tiny(corpus, Path("runs"), f"optimizer={optimizer}", *shape, name=optimizer)) == 0
    assert summary(earlier / "runs" / optimizer)["status"] == "completed"
    now, then = (curve(earlier / place / optimizer) for place in ("runs", "whole"))
    of_sophia = ("hessian_norm", "momentum_norm") if optimizer == "sophiag" else ()
    for key in ("loss", "val_loss", "lr", "grad_norm", *of_sophia):
        values = [[line[key] for line in lines if key in line] for lines in (now, then)]
        assert values[1]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key
    assert [(line["kind"], line["step"]) for line in now] == [(line["kind"], line["step"]) for line in then]


@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
def test_a_checkpoint_loads_as_a_model(earlier: Path, optimizer: str) -> None:
    trained = open_trained(Path("runs") / optimizer)
    assert (trained.step, trained.config.optimizer.name) == (10, optimizer)


@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
def test_a_record_is_read(earlier: Path, optimizer: str) -> None:
    record = RunRecord.open(earlier / "whole" / optimizer)
    assert len(list(record.metrics("train"))) == 24
