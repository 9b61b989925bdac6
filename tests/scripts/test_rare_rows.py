"""How far rows move: by hand, and of runs from end to end."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts import rare_rows


def test_a_row_that_keeps_its_direction_moves_by_the_sum_of_the_rates() -> None:
    rates = [0.1, 0.2, 0.3]
    before = np.zeros((2, 4))
    steady = sum(rates) * np.array([1.0, -1.0, 1.0, -1.0])
    back_and_forth = (0.1 - 0.2 + 0.3) * np.ones(4)
    moved = rare_rows.moved_by(before, np.stack([steady, back_and_forth]), sum(rates))
    np.testing.assert_allclose(moved, [1.0, 1 / 3])


def test_the_script_measures_four_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rare_rows, "BETWEEN", 2)
    small = ("model.n_layer=1", "model.n_embd=16", "model.n_head=1", "train.steps=8", "train.sequence_length=32")
    quick = (
        "train.compile=false",
        "train.precision=fp32",
        "eval.tokens=512",
        "tokenizer.vocab_size=300",
        "model.block_size=32",
    )
    places = ("--work", str(tmp_path / "runs"), "--output", str(tmp_path / "out"))
    assert rare_rows.main([*small, *quick, f"data.directory={tmp_path / 'tokens'}", *places]) == 0
    table = pd.read_csv(tmp_path / "out" / "rare_rows.csv")
    assert list(dict.fromkeys(table.arm)) == list(rare_rows.ARMS)
    assert (tmp_path / "out" / "rare_rows.png").stat().st_size > 1000
    assert table.groupby("arm").tokens.sum().eq(300).all()  # every token is in one bin
    assert table.moved.between(0, 1.1).all()  # weight decay adds a little
    sophia = table[table.arm != "adamw"]
    assert sophia.whole_rate.between(0, 1).all()
    assert table[table.arm == "adamw"].whole_rate.isna().all()
    by_eps = sophia.groupby("arm").whole_rate.mean()
    assert by_eps["sophiag_eps12"] > by_eps["sophiag"]  # a larger ε shortens steps
