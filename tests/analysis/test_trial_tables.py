"""A study's tables reproduce every record exactly, pandas reads each in one line, and damage is reported."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.trial_tables import (
    CURVES_FILE,
    TRIALS_FILE,
    TrialRow,
    by_trial,
    checked,
    read_curves,
    read_trials,
    write_trials,
)
from analysis.trials import load_study
from tests.analysis.synthetic import write_run, write_study
from training.records import RecordError, RunRecord

RESULTS = Path(__file__).resolve().parents[2] / "results"
SUMMARY = {"status": "completed", "final_val_loss": 1.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "synthetic", models={"tiny": 1e6})


def row(**config: Any) -> TrialRow:
    return TrialRow("t", "adamw", "tuning", "tiny", 8, 1, {"name": "t", "seed": 1, **config}, {}, SUMMARY)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
keys = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
trees = st.recursive(
    scalars, lambda members: st.lists(members, max_size=3) | st.dictionaries(keys, members, max_size=3)
)


@given(st.dictionaries(keys, trees, max_size=4))
def test_a_configuration_reads_back_with_its_types(tmp_path_factory: pytest.TempPathFactory, section: Any) -> None:
    written = row(section={"of": section})
    directory = tmp_path_factory.getbasetemp()
    write_trials(directory, [checked(written)])
    (read,) = read_trials(directory)
    assert repr(read.config["section"]["of"]) == repr(written.config["section"]["of"])


def test_a_record_that_a_row_cannot_hold_is_refused() -> None:
    with pytest.raises(RecordError, match=r"t: trials\.csv cannot represent its record"):
        checked(row(optimizer={"a.b": 1}))


def test_every_record_reads_back_exactly(tmp_path: Path) -> None:
    record = RunRecord.open(write_run(tmp_path / "run", optimizer="sophiag", steps=7, evaluations=3))
    whole = TrialRow("run", "s", "reporting", "tiny", 7, 1, record.config, record.environment, record.summary)
    write_trials(tmp_path, [whole, TrialRow("next", "s", "reporting", "tiny", 7, 2)])
    read, missing = read_trials(tmp_path)
    assert (read, missing.summary) == (whole, None)
    assert (read.line, missing.line) == (2, 3)


def test_pandas_reads_both_tables_in_a_line_each_with_a_type_for_each_column(study: Path) -> None:
    trials = pd.read_csv(study / "trials.csv")
    curves = pd.read_parquet(study / "curves.parquet")
    assert (trials.horizon.dtype, trials.seed.dtype) == ("int64", "int64")
    for column in ("final_val_loss", "seconds", "seconds.curvature", "flops", "optimizer.lr", "optimizer.betas[0]"):
        assert trials[column].dtype == "float64", column
    assert curves.step.dtype == "int64"
    assert {str(curves[name].dtype) for name in ("loss", "val_loss", "seconds", "flops", "grad_norm")} == {"float64"}
    for table in (trials, curves):
        for name in table.select_dtypes(["object", "str"]):
            texts = [value for value in table[name].dropna() if isinstance(value, str)]
            assert not any(text.startswith(("{", "[")) for text in texts), f"{name} holds JSON"
    ends = curves[curves.kind == "eval"].groupby("trial").val_loss.last()
    assert (trials.set_index("trial").final_val_loss - ends).abs().max() == 0


@pytest.mark.parametrize("name", ["cpu_scale", "cpu_embeddings", "challenge"])
def test_committed_tables_are_whole_and_small(name: str) -> None:
    rows = read_trials(RESULTS / name)
    assert {row.trial for row in rows} == set(by_trial(read_curves(RESULTS / name)))
    assert all(row.config["name"] == row.trial and row.config["train"]["steps"] == row.horizon for row in rows)
    assert sum((RESULTS / name / file).stat().st_size for file in (TRIALS_FILE, CURVES_FILE)) < 4e6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut in a row": (TRIALS_FILE, cut, r"trials.csv:\d+ is damaged: \d+ cells, expected \d+"),
    "no text": (TRIALS_FILE, lambda path: path.write_bytes(b"\xff\xfe"), "trials.csv is damaged"),
    "empty": (TRIALS_FILE, lambda path: path.write_text(""), "trials.csv:0 is damaged: it has no column trial"),
    "a horizon that is no number": (TRIALS_FILE, replaced(",tiny,50,", ",tiny,many,"), r"trials.csv:2 .*horizon"),
    "a status of its own": (TRIALS_FILE, replaced(",completed,", ",fine,"), r"trials.csv:2 is damaged: status"),
    "a loss that is a text": (TRIALS_FILE, replaced(",completed,", ",completed,low"), r"trials.csv:2 .*final_val_loss"),
    "a column twice": (
        TRIALS_FILE,
        replaced("trial,arm,", "arm,arm,trial,"),
        "trials.csv:1 is damaged: two columns have the same name",
    ),
    "a trial twice": (
        TRIALS_FILE,
        lambda path: path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n"),
        "a trial has two rows",
    ),
    "an arm of another study": (TRIALS_FILE, replaced(",lion,reporting,", ",tiger,reporting,"), "has no arm 'tiger'"),
    "curves cut": (CURVES_FILE, cut, "curves.parquet is damaged"),
    "a bit of the curves": (CURVES_FILE, flip, "curves.parquet is damaged"),
    "no curves": (CURVES_FILE, Path.unlink, "curves.parquet has no lines of tiny-adamw"),
    "another table": (
        CURVES_FILE,
        lambda path: pd.DataFrame({"trial": ["a"]}).to_parquet(path),
        "curves.parquet is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_named_and_not_used(study: Path, tmp_path: Path, damage: str) -> None:
    for name in ("study.yaml", TRIALS_FILE, CURVES_FILE):
        shutil.copy(study / name, tmp_path / name)
    name, act, words = DAMAGES[damage]
    act(tmp_path / name)
    with pytest.raises(RecordError, match=words) as caught:
        load_study([tmp_path])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
