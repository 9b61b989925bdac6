"""What is measured: the validation split, without dropout, each of its tokens once, and when."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data.batches import Batch
from data.dataset import TokenDataset
from data.manifest import load_manifest
from data.tokenizers import TOKENIZER_FILE, load_tokenizer
from models import GPT2
from tests.training.runs import prepare_corpus
from training.architectures import model_shape
from training.compose import compose
from training.config import RunConfig
from training.corpus import open_corpus, token_directory_of
from training.distributed import Distributed
from training.evaluation import bits_per_byte, validation_loss
from training.loop import TrainingState, evaluation_due
from training.records import RunRecord
from training.reliability.checkpoints import newest_valid
from training.run import _token_bytes

Train = Callable[..., RunRecord]
DROPOUT = ["model.dropout=0.4", "train.steps=6", "optimizer=adamw", "optimizer.lr=3e-3"]
# 31 whole windows of 32 tokens and one of 8, in seven forwards of five windows, the last with three of padding alone.
PADDED = ["eval.tokens=1000", "eval.micro_batch_size=5"]


def losses(record: RunRecord) -> list[float]:
    return [line["loss"] for line in record.metrics("train")]


def loss_of_a_plain_model(record: RunRecord, split: str, tokens: int) -> float:
    """The mean cross entropy of the first so many tokens of a split, under the weights that the run has saved last."""
    config = RunConfig.model_validate(record.config)
    directory, manifest = open_corpus(config, Distributed(0, 0, 1, torch.device("cpu")))
    checkpoint, _ = newest_valid(record.directory / "checkpoints")
    assert checkpoint is not None
    model = GPT2(model_shape(config.model, manifest.vocab_size)).eval()
    model.load_state_dict({name: checkpoint.tensor(f"model.{name}") for name in model.state_dict()})
    stream = np.zeros((1, tokens + 1), np.int64)
    TokenDataset(directory, split).read(np.array([0]), stream[:, :-1], stream[:, 1:])
    total, length = 0.0, config.train.sequence_length
    with torch.no_grad():
        for start in range(0, tokens, length):
            window = torch.from_numpy(stream[:, start : min(start + length, tokens) + 1])
            logits = model.logits(window[:, :-1])[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return total / tokens


def test_the_validation_loss_is_the_mean_over_the_validation_tokens_without_dropout_or_padding(train: Train) -> None:
    record = train("run", *DROPOUT, *PADDED, "eval.interval=3")
    evaluated = list(record.metrics("eval"))
    assert [(line["step"], line["val_tokens"]) for line in evaluated] == [(0, 1000), (3, 1000), (6, 1000)]
    expected = loss_of_a_plain_model(record, "validation", 1000)
    assert evaluated[-1]["val_loss"] == pytest.approx(expected, abs=1e-5)
    # Another number of tokens, or another split, would be seen.
    assert abs(expected - loss_of_a_plain_model(record, "train", 1000)) > 1e-3
    assert abs(expected - loss_of_a_plain_model(record, "validation", 992)) > 1e-4


def test_bits_per_byte_count_the_bytes_of_the_predicted_text(train: Train) -> None:
    record = train("bits", "optimizer=adamw", "train.steps=3", "eval.tokens=1000", "eval.micro_batch_size=5")
    directory, manifest = open_corpus(
        RunConfig.model_validate(record.config), Distributed(0, 0, 1, torch.device("cpu"))
    )
    stream = np.zeros((1, 1001), np.int64)
    TokenDataset(directory, "validation").read(np.array([0]), stream[:, :-1], stream[:, 1:])
    text = load_tokenizer(directory).decode_bytes(stream[0, 1:][stream[0, 1:] != manifest.tokenizer.end_of_text])
    first, last = record.metrics("eval")
    for line in (first, last):
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] * 1000 / math.log(2) / len(text), rel=1e-12)
    assert record.summary is not None
    assert record.summary["final_val_bits_per_byte"] == last["val_bits_per_byte"]


def test_a_run_without_its_tokenizer_has_no_bits_per_byte(tmp_path: Path) -> None:
    corpus = prepare_corpus(tmp_path)
    config = compose(corpus)
    manifest = load_manifest(token_directory_of(config))
    assert _token_bytes(manifest, token_directory_of(config))[1] is None
    (token_directory_of(config) / TOKENIZER_FILE).unlink()
    lengths, reason = _token_bytes(manifest, token_directory_of(config))
    assert lengths is None
    assert "cannot be read" in str(reason)
    assert bits_per_byte(3.0, None) is None


def test_evaluation_leaves_the_training_with_dropout_as_it_was(train: Train) -> None:
    often, once = (train(f"every{n}", *DROPOUT, f"eval.interval={n}") for n in (2, 100))
    assert losses(often) == losses(once)
    # What dropout draws is of the model's seed.
    states = []
    for record in (often, train("other", *DROPOUT, "eval.interval=100", "seeds.model=1")):
        checkpoint, _ = newest_valid(record.directory / "checkpoints")
        assert checkpoint is not None
        states.append(checkpoint.tensor("rng.cpu.0"))
    assert not torch.equal(*states)


@pytest.mark.parametrize("interrupted", [False, True])
def test_dropout_is_off_in_an_evaluation_and_on_after_it_however_it_ends(*, interrupted: bool) -> None:
    model = torch.nn.Linear(1, 1)
    modes = []
    said: list[str] = []

    def forward(tokens: torch.Tensor, targets: torch.Tensor) -> SimpleNamespace:
        modes.append(model.training)
        return SimpleNamespace(loss_sum=torch.tensor(6.0))

    row = np.zeros((1, 2), np.int64)
    strategy = SimpleNamespace(
        model=model, device=torch.device("cpu"), forward=forward, distributed=Distributed(0, 0, 1, torch.device("cpu"))
    )
    windows = SimpleNamespace(batches=lambda size: iter([Batch(row, row, row[0])]), forwards=lambda size: 1)
    found = validation_loss(cast(Any, strategy), cast(Any, windows), 1, said.append, lambda problem: interrupted)
    assert found == (None if interrupted else (3.0, 2, 0))
    assert modes == ([] if interrupted else [False])
    assert said == ([] if interrupted else ["evaluating, forward 0"])
    assert model.training


def due(step: int, *, evaluated: int, interval: int = 4, steps: int = 10) -> bool:
    config = SimpleNamespace(eval=SimpleNamespace(interval=interval), train=SimpleNamespace(steps=steps))
    run = SimpleNamespace(config=config, state=TrainingState(step=step, evaluated_step=evaluated))
    return evaluation_due(cast(Any, run))


def test_evaluation_is_due_at_the_start_every_interval_and_at_the_end_and_once_at_each() -> None:
    assert [step for step in range(11) if due(step, evaluated=-1)] == [0, 4, 8, 10]
    # A resumed run is where it was when it stopped, and has evaluated there or not.
    assert not any(due(step, evaluated=step) for step in range(11))
    assert due(8, evaluated=4)


def test_the_best_and_the_final_validation_loss_are_kept_apart(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    series = iter([(5.0, 100, 400), (3.0, 100, 400), (4.0, 100, 400)])
    monkeypatch.setattr("training.loop.validation_loss", lambda *_: next(series))
    record = train("run", "optimizer=adamw", "train.steps=4", "eval.interval=2")
    assert record.summary is not None
    assert (record.summary["best_val_loss"], record.summary["final_val_loss"]) == (3.0, 4.0)


def test_a_validation_loss_of_nan_ends_the_run_and_is_never_the_best(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = iter([(5.0, 100, 400), (float("nan"), 100, 400)])
    monkeypatch.setattr("training.loop.validation_loss", lambda *_: next(series))
    record = train("run", "optimizer=adamw", "train.steps=4", "eval.interval=2", expect=3)
    assert record.summary is not None
    assert record.summary["status"] == "diverged"
    assert record.summary["best_val_loss"] == 5.0
