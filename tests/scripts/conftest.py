"""One tiny run for the tests of the scripts that use a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from downstream.inference import TrainedModel, open_trained
from training.compose import compose
from training.corpus import source_of, token_directory_of, tokenizer_of
from training.launching import command

# Characters of one to four bytes: more than a vocabulary of 300 has tokens for, so that some are made of several.
WORDS = ("the", "light", "of", "day", "was", "grey", "and", "nobody", "spoke", "é", "中文", "1984", "🙂", "ßpiel")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of three steps on prepared tokens, with checkpoints at steps 2 and 3, and a context of 32 tokens."""
    root = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    documents = [f"{number}. " + " ".join(generator.choice(WORDS, 30)) + "." for number in range(150)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    overrides = [
        "name=tiny",
        f"output_dir={root}/runs",
        "data=text",
        f"data.paths=[{root}/corpus.jsonl]",
        f"data.directory={root}/tokens",
        "data.validation.fraction=0.2",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
        "model=gpt2_nano",
        "model.block_size=32",
        "optimizer.lr=0.01",
        "train.steps=3",
        "train.global_batch_size=4",
        "train.sequence_length=32",
        "train.precision=fp32",
        "train.compile=false",
        "train.device=cpu",
        "eval.interval=3",
        "eval.tokens=256",
        "checkpoint.interval=2",
    ]
    config = compose(overrides)
    prepare(source_of(config), tokenizer_of(config), token_directory_of(config), workers=1)
    return overrides


@pytest.fixture(scope="session")
def tiny_run(tiny: list[str]) -> Path:
    """The directory of that run."""
    assert command.main(tiny) == 0
    config = compose(tiny)
    return Path(config.output_dir) / config.run_name


@pytest.fixture(scope="session")
def trained(tiny_run: Path) -> TrainedModel:
    return open_trained(tiny_run)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> object:
    """Check that a command was refused: exit code 2 and one line; returns the line."""

    def check(code: int) -> str:
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return check
