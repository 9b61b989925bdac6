"""The shards of prepared tokens are read whole and compared with their hashes on demand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts import prepare_data
from tests.training.runs import prepare_corpus
from training.compose import compose
from training.corpus import token_directory_of


def verify(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *overrides, "--verify"])
    return prepare_data.main()


def test_verify_finds_a_flipped_bit_that_opening_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = prepare_corpus(tmp_path)
    assert verify(overrides, monkeypatch) == 0
    assert "train: " in capsys.readouterr().out
    shard = token_directory_of(compose(overrides)) / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1  # another token of the vocabulary
    shard.write_bytes(content)
    assert verify(overrides, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{shard} is damaged: its sha256 is " in said
    assert "prepare it again" in said
    os.remove(shard)
    assert verify(overrides, monkeypatch) == 2
    assert f"{shard} cannot be read: No such file" in capsys.readouterr().err
