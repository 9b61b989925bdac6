"""Comparing a record with its rerun: what counts as equal, and what is reported."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis.runs import load_run
from analysis.trial_tables import TrialRow, write_trials
from analysis.trials import RecordedTrial, load_study
from scripts.study import main as study_command
from studies.verify import TOLERANCE, chosen, compare, unequal, verify
from tests.analysis.synthetic import write_study
from training.records import RecordError, RunRecord


def record(directory: Path, losses: Mapping[int, float | None], threads: int = 1) -> Path:
    """A run with an evaluation and a train line at each step."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(
        "name: run\nseed: 1\nmodel: {name: gpt2_nano}\noptimizer: {name: adamw}\ntrain: {steps: 8}\n"
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


def trial(directory: Path) -> RecordedTrial:
    run = load_run(directory)
    return RecordedTrial("adamw", "reporting", "gpt2_nano", 8, 1, {}, run.origin, run)


def test_the_largest_difference_counts_whatever_the_kind_of_line(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: 1.0}))
    again = record(tmp_path / "again", {2: 9.0, 4: 2.0, 6: 9.0, 8: 1.0 + TOLERANCE / 2})
    found = compare(kept, again)
    assert (found.trial, found.lines) == ("kept", 4), "lines that the record was thinned by do not count"
    assert found.difference == pytest.approx(TOLERANCE / 2)
    assert found.final_difference == 0, "both summaries say 1.0"
    assert found.holds
    assert not unequal([found])

    other = compare(kept, record(tmp_path / "other", {4: 2.0, 8: 1.002}, threads=2))
    assert not other.holds
    (line,) = unequal([other])
    assert line.startswith("kept: 0.002 nats from its record")
    assert "recorded on some processor, threads 1, now some processor, threads 2" in line


def test_a_loss_that_is_not_finite_agrees_with_its_like_alone(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: None}))
    assert compare(kept, record(tmp_path / "same", {4: 2.0, 8: None})).difference == 0
    finite = compare(kept, record(tmp_path / "finite", {4: 2.0, 8: 1.0}))
    assert finite.difference == math.inf
    assert unequal([finite])


@pytest.mark.parametrize("end", ["preempted", "completed"])
def test_a_run_that_ended_early_does_not_vouch_for_the_rest(tmp_path: Path, end: str) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0, 8: 1.0}))
    short = record(tmp_path / "short", {4: 2.0})
    (short / "summary.json").write_text(json.dumps({"status": end, "final_val_loss": 2.0}))
    found = compare(kept, short)
    assert (found.lines, found.difference) == (2, math.inf)
    whole = record(tmp_path / "whole", {4: 2.0, 8: 1.0})
    (whole / "summary.json").write_text(json.dumps({"status": end, "final_val_loss": 1.0}))
    assert compare(kept, whole).holds == (end == "completed")


def test_an_old_summary_does_not_hide_a_failed_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [trial(record(tmp_path / "runs" / name, {8: 1.0})) for name in ("one", "two")]
    rows = []
    for name in ("one", "two"):
        kept = RunRecord.open(record(tmp_path / "work" / name, {8: 1.0}))
        config = kept.config | {"name": name}
        rows.append(TrialRow(name, "adamw", "reporting", "gpt2_nano", 8, 1, config, kept.environment, kept.summary))
    write_trials(tmp_path, rows)
    train = tmp_path / "train.py"
    train.write_text(
        "import pathlib, shutil, sys, yaml\n"
        "name = yaml.safe_load((pathlib.Path(sys.argv[2]) / 'config.yaml').read_text())['name']\n"
        "if name == 'two': sys.exit(2)\n"
        "target = pathlib.Path(sys.argv[3].removeprefix('output_dir=')) / name\n"
        f"shutil.copytree({str(tmp_path / 'runs')!r} + '/' + name, target, dirs_exist_ok=True)\n"
    )
    monkeypatch.setattr("studies.verify._TRAIN", train)
    with pytest.raises(RuntimeError, match=r"^two failed with exit code 2, see .*two\.log$"):
        verify(trials, tmp_path / "work", tmp_path, log=lambda _: None)
    (written,) = json.loads((tmp_path / "verification.json").read_text())
    assert (written["trial"], written["difference"], written["holds"]) == ("one", 0.0, True)
    earlier = [written | {"difference": 0.5}, written | {"trial": "earlier"}]
    (tmp_path / "verification.json").write_text(json.dumps(earlier))
    verify(trials[:1], tmp_path / "work", tmp_path, log=lambda _: None)
    assert json.loads((tmp_path / "verification.json").read_text()) == [written, earlier[1]]


@pytest.mark.parametrize("allowed", [False, True])
def test_reruns_may_run_the_code_that_records_name_only_if_the_command_line_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    write_study(tmp_path / "cpu_scale", models={"tiny": 1e6})
    (tmp_path / "train.py").write_text(f"import sys; open('{tmp_path}/words', 'a').write(' '.join(sys.argv) + '\\n')")
    monkeypatch.setattr("studies.verify._TRAIN", tmp_path / "train.py")
    words = ["verify", "study=cpu_scale", *["allow_code=true"] * allowed]
    assert study_command([*words, f"--records={tmp_path}", f"--work={tmp_path}/work"]) == 1
    commands = (tmp_path / "words").read_text().splitlines()
    assert len(commands) == 3
    assert all(("allow_code=true" in command.split()) == allowed for command in commands)


def test_trials_to_run_again_are_named_or_one_of_each_arm(tmp_path: Path) -> None:
    study = load_study([write_study(tmp_path / "synthetic", models={"tiny": 1e6})])
    assert [one.arm for one in chosen(study)] == ["adamw", "lion", "sophiag"]
    last = study.trials[-1].origin.name
    assert [one.origin.name for one in chosen(study, [last])] == [last]
    with pytest.raises(ValueError, match="nowhere: no such trial on record"):
        chosen(study, ["nowhere"])


def test_a_trial_that_this_version_cannot_run_is_named_with_the_commit_to_use(tmp_path: Path) -> None:
    kept = RunRecord.open(record(tmp_path / "kept", {8: 1.0}))
    config = kept.config | {"name": "kept", "optimizer": {"name": "sophiag", "warm_start": 4}}
    write_trials(
        tmp_path, [TrialRow("kept", "adamw", "reporting", "gpt2_nano", 8, 1, config, kept.environment, kept.summary)]
    )
    with pytest.raises(RuntimeError, match=r"^kept: optimizer\.warm_start=4: removed .* commit [0-9a-f]+ "):
        verify([trial(tmp_path / "kept")], tmp_path / "work", tmp_path, log=lambda _: None)


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    kept = trial(record(tmp_path / "kept", {4: 2.0}))
    with pytest.raises(RecordError, match="no step in common"):
        compare(kept, record(tmp_path / "again", {8: 2.0}))
