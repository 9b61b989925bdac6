"""How far rows move, of runs from end to end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pandas as pd
import pytest
import torch

from scripts import rare_rows
from training.compose import compose
from training.reliability.checkpoints import Checkpoint


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
    assert table.straight.between(0, 1.1).all()  # weight decay adds a little
    sophia = table[table.arm.isin(["sophiag_eps12", "sophiag_eps6"])]
    assert sophia.whole_rate.between(0, 1).all()
    assert table[~table.arm.isin(sophia.arm)].whole_rate.isna().all()
    for arm, own in table.groupby("arm"):
        recorded = json.loads((tmp_path / "runs" / str(arm) / "summary.json").read_text())["final_val_loss"]
        mean = (own.loss * own.targets)[own.targets > 0].sum() / own.targets.sum()
        assert mean == pytest.approx(recorded, rel=1e-3)  # the table has four digits


@pytest.mark.parametrize(("eps", "shares"), [(1e-12, [0.5, 1.0]), (2.0, [0.5, 0.75]), (4.0, [0.25, 0.25])])
def test_entries_move_by_the_whole_rate_where_the_momentum_reaches_the_denominator(
    eps: float, shares: list[float]
) -> None:
    tensors = {
        "exp_avg": torch.tensor([[1.0, -2.0, 3.0, -4.0], [-1.0, 2.0, -3.0, 4.0]]),
        "hessian": torch.tensor([[6.0, 6.0, 6.0, 6.0], [0.0, -1.0, 0.0, 0.0]]),  # γh = 3, and none
    }
    saved = SimpleNamespace(tensor=lambda name: tensors[name.rpartition(".")[2]])
    config = compose(["optimizer=sophiag", "optimizer.gamma=0.5", f"optimizer.eps={eps}"])
    assert rare_rows.whole_rate(config, cast(Checkpoint, saved)).tolist() == shares
