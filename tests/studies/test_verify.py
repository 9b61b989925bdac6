"""A record against a run made again: what counts as the same, and what is named."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis.records import load_run
from analysis.trials import Arm, Study, Trial
from studies.verify import TOLERANCE, chosen, compare, refusal, unequal, verify
from training.records import RecordError


def record(directory: Path, losses: Mapping[int, float | None], threads: int = 1) -> Path:
    """A run with an evaluation and a train line at each step."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(
        "name: run\nseed: 1\nmodel: {}\noptimizer: {name: adamw}\ntrain: {steps: 8}\n"
    )
    hardware = {"cpu": "some processor", "threads": threads}
    (directory / "environment.json").write_text(json.dumps({"hardware": hardware}))
    lines: list[dict[str, Any]] = []
    for step, loss in losses.items():
        counters = {"step": step, "tokens": step, "flops": step, "seconds": 1.0 * step}
        lines += [{"kind": "train", **counters, "loss": loss}, {"kind": "eval", **counters, "val_loss": loss}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "summary.json").write_text(json.dumps({"status": "completed", "final_val_loss": 1.0}))
    return directory


def trial(directory: Path) -> Trial:
    return Trial("adamw", "reporting", "gpt2_nano", 8, 1, {}, directory, load_run(directory))


def study_of(*trials: Trial) -> Study:
    return Study("study", "adamw", {"adamw": Arm("adamw")}, trials, seeds=(1,))


def test_the_largest_difference_counts_whatever_the_kind_of_line(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: 1.0}))
    again = record(tmp_path / "again", {2: 9.0, 4: 2.0, 6: 9.0, 8: 1.0 + TOLERANCE / 2})
    found = compare(kept, again, tmp_path)
    assert (found.run, found.lines) == ("kept", 4), "lines that the record was thinned by do not count"
    assert found.difference == pytest.approx(TOLERANCE / 2)
    assert found.holds
    assert not unequal([found])

    other = compare(kept, record(tmp_path / "other", {4: 2.0, 8: 1.002}, threads=2), tmp_path)
    assert not other.holds
    (line,) = unequal([other])
    assert line.startswith("kept: 0.002 nats from its record")
    assert "recorded on some processor, threads 1, now some processor, threads 2" in line


def test_a_loss_that_is_not_finite_agrees_with_its_like_alone(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: None}))
    assert compare(kept, record(tmp_path / "same", {4: 2.0, 8: None}), tmp_path).difference == 0
    finite = compare(kept, record(tmp_path / "finite", {4: 2.0, 8: 1.0}), tmp_path)
    assert finite.difference == math.inf
    assert unequal([finite])


@pytest.mark.parametrize("end", ["preempted", "completed"])
def test_a_run_that_ended_early_does_not_vouch_for_the_rest(tmp_path: Path, end: str) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: 1.0}))
    short = record(tmp_path / "short", {4: 2.0})
    (short / "summary.json").write_text(json.dumps({"status": end, "final_val_loss": 2.0}))
    found = compare(kept, short, tmp_path)
    assert (found.lines, found.difference) == (2, math.inf)
    whole = record(tmp_path / "whole", {4: 2.0, 8: 1.0})
    (whole / "summary.json").write_text(json.dumps({"status": end, "final_val_loss": 1.0}))
    assert compare(kept, whole, tmp_path).holds == (end == "completed")


def test_what_an_earlier_call_left_does_not_vouch_for_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [trial(record(tmp_path / "runs" / name, {8: 1.0})) for name in ("one", "two")]
    for name in ("one", "two"):
        record(tmp_path / "work" / name, {8: 1.0})
    train = tmp_path / "train.py"
    train.write_text(
        "import pathlib, shutil, sys\n"
        "source = pathlib.Path(sys.argv[2])\n"
        "if source.name == 'two': sys.exit(2)\n"
        "shutil.copytree(source, pathlib.Path(sys.argv[3].removeprefix('output_dir=')) / source.name, dirs_exist_ok=True)\n"
    )
    monkeypatch.setattr("studies.verify._TRAIN", train)
    monkeypatch.setattr("studies.verify.chosen", lambda _: trials)
    with pytest.raises(RuntimeError, match=r"^two failed with exit code 2, see .*two\.log$"):
        verify(study_of(*trials), tmp_path / "work", tmp_path, tell=lambda _: None)
    (written,) = json.loads((tmp_path / "verification.json").read_text())
    assert (written["run"], written["difference"], written["holds"]) == ("runs/one", 0.0, True)


def test_what_this_version_cannot_run_again_is_named_and_not_run(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {8: 1.0}))
    config = tmp_path / "kept" / "config.yaml"
    config.write_text(config.read_text().replace("{name: adamw}", "{name: sophiag, label_draws: 1, warm_start: 4}"))
    refused = trial(tmp_path / "kept")
    assert (refusal(kept), chosen(study_of(kept))) == (None, [kept])
    assert chosen(study_of(refused)) == []
    told: list[str] = []
    with pytest.raises(ValueError, match="no reported run"):
        verify(study_of(refused), tmp_path / "work", tmp_path, tell=told.append)
    (line,) = told
    assert re.fullmatch(r"adamw: cannot be run again: optimizer\.warm_start=4: removed .* commit [0-9a-f]+ .*", line)


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0}))
    with pytest.raises(RecordError, match="no step in common"):
        compare(kept, record(tmp_path / "again", {8: 2.0}), tmp_path)
