"""Trackers mirror the record, and never stop or slow a run or leak its key."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import yaml

from analysis.comparison import Ratio
from analysis.guards import Finding
from analysis.results import Results, analyse
from analysis.trial_tables import by_trial, lines_of, read_curves, read_trials
from analysis.trials import load_study
from scripts.publish import main as publish
from studies import publication
from tests.analysis.synthetic import write_study
from tests.training.runs import curve, lines, run, run_in_child, summary, tiny
from tests.training.wandb_files import wandb_records, wandb_rows, wandb_values
from training.compose import compose
from training.recording import trackers
from training.recording.trackers import BackgroundTracker, Tracker, scalars

# Unlike anything that a file has by chance.
KEY = "5ec4e7" * 6 + "abcd"


def mirrored(run_directory: Path) -> list[dict[str, Any]]:
    """Return the record's lines as a tracker should have them."""
    return [
        {axis: line[axis] for axis in trackers.AXES if axis in line} | scalars(line)
        for line in lines(run_directory, "train", "eval", "hessian")
    ]


def test_offline_wandb_has_what_its_tables_and_parallel_coordinates_need(corpus: list[str], tmp_path: Path) -> None:
    """Group, job type, tags, the resolved configuration with plain numbers, and the record's totals."""
    group = ["tracker.group=small-tiny", "tracker.tags=[small,tuning]"]
    assert run(tiny(corpus, tmp_path, "tracker=wandb", "optimizer=sophiag", *group)) == 0
    (begun,) = [record.run for record in wandb_records(tmp_path / "run") if record.HasField("run")]
    assert (begun.run_group, begun.job_type) == ("small-tiny", "sophiag")
    assert {"sophiag", "small", "tuning"} <= set(begun.tags)
    config, shown = wandb_values(tmp_path / "run")
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    optimizer = config["optimizer"]
    assert [optimizer.pop("beta1"), optimizer.pop("beta2")] == recorded["optimizer"]["betas"]
    assert {key: config[key] for key in recorded} == recorded
    totals = {key: value for key, value in summary(tmp_path / "run").items() if isinstance(value, (int, float, str))}
    assert {"final_val_loss", "tokens", "flops", "seconds", "status"} <= totals.keys()
    assert {key: shown[key] for key in totals} == totals


def test_a_replaced_run_is_a_new_one_of_wandb_and_a_resumed_run_the_same(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path, "tracker=wandb", "train.steps=4", "checkpoint.interval=2")

    def ids() -> set[str]:
        # A name taken already, in the same second, gets a number.
        return {path.name.split("-")[3] for path in (tmp_path / "run").glob("wandb/offline-run-*")}

    assert run(overrides) == 0
    first = ids()
    (tmp_path / "run" / "summary.json").unlink()
    assert run(overrides) == 0
    assert ids() == first
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 2
    assert run([*overrides, "overwrite=true"]) == 0
    assert len(ids()) == 1
    assert ids() != first

    config, began = compose(overrides), {"initial_weights_sha256": "0"}
    assert trackers.WandbRun.of(config, began).identity == f"run/{config.identity_hash()}/0", "that of version 0.1"


def test_wandb_has_the_published_losses_as_flat_lines_over_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = compose(["model=gpt2_medium", "data=openwebtext", "tokenizer=gpt2"])
    run = trackers.WandbRun.of(config, {"initial_weights_sha256": "0"})
    tracker = trackers.WandbTracker(run, config.tracker, tmp_path, pytest.fail)
    for step in range(3):
        axes = {"step": step, "tokens": 100 * step, "flops": step, "seconds": 1.0 * step}
        if step:
            tracker.log({"kind": "train", **axes, "loss": 3.0})
        tracker.log({"kind": "eval", **axes, "val_loss": 3.0 - step})
    tracker.finish({"status": "completed"})
    paper = {"reference/paper/adamw": 2.691, "reference/paper/lion": 2.678, "reference/paper/sophiah": 2.645}
    rows = wandb_rows(tmp_path)
    found = [{key: value for key, value in row.items() if key.startswith("reference/")} for row in rows]
    assert found == [paper if "val/loss" in row else {} for row in rows]
    assert [row["tokens"] for row in rows if "val/loss" in row] == [0, 100, 200]
    metrics = [record.metric for record in wandb_records(tmp_path) if record.HasField("metric")]
    assert ("reference/*", "tokens") in [(metric.glob_name, metric.step_metric) for metric in metrics]


@pytest.mark.parametrize(
    "override",
    ["model=gpt2_small data=sample", "model=gpt2_small data=openwebtext tokenizer=bpe tokenizer.vocab_size=999"],
)
def test_a_run_on_another_corpus_has_no_published_losses(override: str) -> None:
    of_the_paper, other = ["model=gpt2_small", "data=openwebtext", "tokenizer=gpt2"], override.split()
    assert trackers.published_losses(compose(of_the_paper).model_dump())
    assert trackers.published_losses(compose(other).model_dump()) == {}


def test_a_completed_run_with_artifacts_uploads_a_run_directory(corpus: list[str], tmp_path: Path) -> None:
    steps = ["train.steps=4", "eval.interval=4", "checkpoint.interval=2"]
    assert run(tiny(corpus, tmp_path, "tracker=wandb", "tracker.artifacts=true", *steps)) == 0
    logged = [record.request.log_artifact.artifact for record in wandb_records(tmp_path / "run")]
    logged += [record.artifact for record in wandb_records(tmp_path / "run") if record.HasField("artifact")]
    (artifact,) = [one for one in logged if one.name]
    assert (artifact.type, sorted(artifact.aliases)) == ("model", ["latest", "step-4"])
    assert json.loads(artifact.metadata)["final_val_loss"] == summary(tmp_path / "run")["final_val_loss"]
    files = {entry.path for entry in artifact.manifest.contents}
    whole = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {path for path in whole if not path.startswith(("wandb/", ".", "checkpoints/step-00000002"))}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "small", models={"tiny": 1e6})


@pytest.fixture(scope="module")
def results(study: Path) -> Results:
    return analyse(load_study([study]))


def test_a_study_is_published_as_runs_with_its_curves_and_again_as_the_same_runs(
    study: Path, results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publication, "analyse", lambda study: results)
    rows = [row for row in read_trials(study) if row.arm == "sophiag" and row.phase == "reporting"][:2]
    monkeypatch.setattr(publication, "read_trials", lambda directory: rows)
    for _ in range(2):
        assert publish([str(study), "tracker=wandb", "tracker.tags=[cpu]"]) == 0
        assert "3 runs: wandb sync" in capsys.readouterr().out
        assert len(list(study.glob("wandb/offline-run-*"))) == 3
    settings = compose(["tracker=wandb", "tracker.tags=[cpu]"]).tracker
    curves = by_trial(read_curves(study))
    for row in rows:
        described = publication.of_trial("synthetic", row, publication.content_hash(curves[row.trial]), settings, "1")
        (begun,) = [one.run for one in wandb_records(study, described.id) if one.HasField("run")]
        assert (begun.run_group, begun.job_type) == (f"synthetic-{row.model}", "sophiag")
        assert {"synthetic", "reporting", "cpu"} <= set(begun.tags)
        found = [{k: v for k, v in line.items() if k[0] != "_"} for line in wandb_rows(study, described.id)]
        lines_of_trial = [line for line in lines_of(curves[row.trial]) if line["kind"] != "event"]
        assert found == [
            {axis: line[axis] for axis in trackers.AXES if axis in line} | scalars(line) for line in lines_of_trial
        ]


def test_a_changed_curve_replaces_the_trials_run_and_a_column_without_values_does_not(
    study: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "analyse", lambda study: results)
    (row,) = [row for row in read_trials(study) if row.arm == "sophiag" and row.phase == "reporting"][:1]
    monkeypatch.setattr(publication, "read_trials", lambda directory: [row])
    curve = by_trial(read_curves(study))[row.trial]
    changed = curve.slice(1)
    wider = curve.append_column("later", pa.nulls(curve.num_rows))
    published, revisions = [], []
    for one in (curve, wider, changed):
        monkeypatch.setattr(publication, "by_trial", lambda curves, one=one: {row.trial: one})
        assert publish([str(study), "tracker=wandb"]) == 0
        published.append({path.name.split("-")[3] for path in study.glob("wandb/offline-run-*")})
        page = (study / "wandb" / publication.REPORT_FILE).read_text()
        revisions.append(re.findall(r"revision.{0,200}?([0-9a-f]{12})", page, re.DOTALL)[0])
    first, again, other = published
    assert first == again
    assert len(other) == 2, "the trial and the comparison"
    assert len(first & other) == 1
    assert revisions[0] == revisions[1] != revisions[2]


def test_the_report_page_has_the_papers_panels_for_each_size_beside_published_losses(
    study: Path, results: Results
) -> None:
    of_the_paper = {"data": {"name": "openwebtext"}, "tokenizer": {"name": "gpt2"}}
    rows = [replace(row, config={**row.config, **of_the_paper}) for row in read_trials(study)]
    for row in rows:
        row.config["model"] = {**row.config["model"], "name": "gpt2_small"}
    page = publication.report_page(results, rows, compose(["tracker=wandb"]).tracker, None, "1")
    blocks = page._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)["blocks"]
    panels = [
        panel["config"]
        for block in blocks
        for panel in block.get("metadata", {}).get("panelBankSectionConfig", {}).get("panels", [])
    ]
    titles = {panel.get("chartTitle") for panel in panels}
    for title in ("over tokens", "over step", "over model FLOPs", "over training seconds"):
        assert f"Validation loss {title}" in titles
    assert {"Unclipped fraction", "Final loss over γ and β2", "Searches"} <= titles
    assert any(str(title).startswith("Final loss over k") for title in titles)
    assert any(str(title).startswith("AdamW's steps over the arm's") for title in titles)
    curve = next(panel for panel in panels if panel.get("chartTitle") == "Validation loss over tokens")
    assert {"val/loss", "reference/paper/adamw", "reference/paper/sophiag"} <= set(curve["metrics"])
    assert "cell" in json.dumps(curve["groupBy"]), "a mean over runs of different lengths is no curve"


def test_the_page_has_the_doubts_of_the_report_and_no_number_for_a_censored_end(study: Path, results: Results) -> None:
    doubts = [
        Finding("seeds", "serious", "Planned seeds have not ended", "Seed 3."),
        Finding("code", "note", "A note", ""),
    ]
    (first, *others) = results.verdicts
    assert first.paper is not None
    censored = Ratio(1.3, 1.1, 1.35, 0.95, high_censored=True)
    verdicts = [replace(first, paper=replace(first.paper, ratio=censored)), *others]
    under_way = replace(results.study, finished=False)
    doubted = replace(results, study=under_way, findings=doubts, verdicts=verdicts)
    page = publication.report_page(doubted, [], compose(["tracker=wandb"]).tracker, None, "1")
    told = [block.text for block in page.blocks if hasattr(block, "text")]
    assert {under_way.under_way, "Serious: Planned seeds have not ended. Seed 3."} <= {*told}
    assert not any("A note" in text for text in told)
    values = publication.comparison(doubted)
    name = f"speedup_steps/{first.model}/{first.arm}"
    assert (values[name], values[f"{name}/low"]) == (1.3, 1.1)
    assert f"{name}/high" not in values


def test_a_page_replaces_the_one_of_the_same_title(
    study: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb_workspaces.reports.v2 import Report

    page = publication.report_page(results, [], compose(["tracker=wandb"]).tracker, None, "1")
    saved: list[str] = []
    addresses = {page.title: "https://wandb/page--earlier"}
    monkeypatch.setattr(publication, "report_url", lambda entity, project, title: addresses.get(title))
    monkeypatch.setattr(Report, "from_url", lambda url: SimpleNamespace(id=url.rpartition("--")[2]))
    monkeypatch.setattr(Report, "save", lambda self: saved.append(self.id))
    monkeypatch.setattr(Report, "url", property(lambda self: f"saved {self.id}"))
    assert publication._save(page, ("me", "sophia")) == "saved earlier"
    assert saved == ["earlier"]


def test_publishing_elsewhere_than_to_wandb_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, said in (
        ([], "tracker=none: only W&B"),
        (["optimizer.lr=1"], "optimizer.lr=1: expected tracker=wandb"),
    ):
        assert publish([str(study), *overrides]) == 2
        assert said in capsys.readouterr().err


def as_an_agent_does(parameters: Path) -> None:
    """The environment that `wandb agent` gives a sweep's run."""
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "agents01",
        "WANDB_PROJECT": "of-the-sweep",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
    }
    os.environ.pop("WANDB_SERVICE", None)


def test_a_run_of_a_sweep_has_the_id_and_the_project_of_its_agent(corpus: list[str], tmp_path: Path) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.001\n")
    overrides = tiny(corpus, tmp_path, "tracker=wandb", "optimizer.lr=0.001")
    assert run_in_child(overrides, as_an_agent_does, parameters, errors=tmp_path / "errors") == 0
    (begun,) = [record.run for record in wandb_records(tmp_path / "run") if record.HasField("run")]
    assert (begun.run_id, begun.sweep_id, begun.project) == ("agents01", "sweep123", "of-the-sweep")
    assert begun.display_name == "run"
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_rows(tmp_path / "run")]
    assert rows == mirrored(tmp_path / "run")
    said = (tmp_path / "errors").read_text()
    assert "Ignoring" not in said
    assert "tracker=wandb" not in said


def test_tensorboard_holds_the_record(corpus: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tiny(corpus, tmp_path, "tracker=tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines(tmp_path / "run", "train", "eval", "hessian"):
        for name, value in scalars(line).items():
            expected.setdefault(name, []).append((line["step"], pytest.approx(float(value), rel=1e-6)))
    assert found == expected


def test_mirrored_names() -> None:
    line = {"kind": "eval", "step": 3, "tokens": 1, "flops": 1, "seconds": 0.1, "val_loss": 2.0, "by": {"mlp": 1}}
    assert scalars(line) == {"val/loss": 2.0, "val/by/mlp": 1}
    assert scalars({"kind": "train", "loss": None, "skipped": True}) == {"train/skipped": True}


class Recording(Tracker):
    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def log(self, line: Mapping[str, Any]) -> None:
        self.seen.append(line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.seen.append(summary)


class Broken(Recording):
    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def log(self, line: Mapping[str, Any]) -> None:
        super().log(line)
        if len(self.seen) == self.at:
            raise self.error


class Hanging(Recording):
    abandoned = False

    def log(self, line: Mapping[str, Any]) -> None:
        threading.Event().wait()

    def abandon(self) -> None:
        self.abandoned = True


DONE = {"status": "completed"}


def test_lines_arrive_whole_and_in_order() -> None:
    inner, warned = Recording(), []
    tracker = BackgroundTracker(lambda: inner, "test", warned.append)
    for number in range(200):
        tracker.log({"step": number})
    tracker.finish(DONE)
    assert inner.seen == [{"step": number} for number in range(200)] + [DONE]
    assert warned == []


@pytest.mark.parametrize("error", [RuntimeError("refused"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_what_a_tracker_raises_is_one_warning(error: BaseException) -> None:
    warned: list[str] = []
    tracker = BackgroundTracker(lambda: Broken(3, error), "test", warned.append)
    for number in range(10):
        tracker.log({"step": number})
    tracker.finish(DONE)
    tracker._thread.join(5)
    assert len(warned) == 1
    assert warned[0].startswith(f"tracker=test failed ({type(error).__name__}")


def test_a_tracker_that_cannot_start_is_one_warning() -> None:
    def impossible() -> Tracker:
        raise ImportError("no such package")

    warned: list[str] = []
    tracker = BackgroundTracker(impossible, "test", warned.append)
    tracker._thread.join(5)
    tracker.log({"step": 1})
    tracker.finish(DONE)
    assert warned == [
        "tracker=test failed (ImportError: no such package); the run continues without it, the record is complete"
    ]


def test_a_tracker_that_hangs_neither_slows_the_run_nor_delays_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.3)
    inner, warned = Hanging(), []
    tracker = BackgroundTracker(lambda: inner, "test", warned.append)
    began = time.monotonic()
    for number in range(1000):
        tracker.log({"step": number})
    tracker.finish(DONE)
    assert time.monotonic() - began < 30
    assert len(warned) == 1
    assert "has not finished after" in warned[0]
    assert inner.abandoned


def test_a_preempted_run_waits_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PREEMPTED_SECONDS", 0.2)
    tracker = BackgroundTracker(Hanging, "test", lambda line: None)
    tracker.log({"step": 1})
    began = time.monotonic()
    tracker.finish({"status": "preempted"})
    assert time.monotonic() - began < 10


def test_a_tracker_that_falls_too_far_behind_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 50)
    warned: list[str] = []
    tracker = BackgroundTracker(Hanging, "test", warned.append)
    for number in range(200):
        tracker.log({"step": number})
    tracker.finish(DONE)
    assert len(warned) == 1
    assert "50 lines behind" in warned[0]


def test_a_warning_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    warned: list[str] = []
    tracker = BackgroundTracker(lambda: Broken(1, RuntimeError(f"key {KEY} refused")), "test", warned.append)
    tracker.log({})
    tracker._thread.join(5)
    assert KEY not in warned[0]
    assert "<WANDB_API_KEY>" in warned[0]


def tracker_breaks(error: str) -> None:
    from training.recording import trackers

    def log(self: Any, line: Any) -> None:
        raise OSError(error)

    trackers.TensorBoardTracker.log = log  # type: ignore[method-assign]


def test_the_record_is_the_same_with_and_without_a_broken_tracker(corpus: list[str], tmp_path: Path) -> None:
    assert run(tiny(corpus, tmp_path, name="without")) == 0
    broken = tiny(corpus, tmp_path, "tracker=tensorboard", name="broken")
    assert run_in_child(broken, tracker_breaks, "down", errors=tmp_path / "errors") == 0
    assert curve(tmp_path / "broken") == curve(tmp_path / "without")
    said = (tmp_path / "errors").read_text()
    assert said.count("tracker=tensorboard failed (OSError: down)") == 1


def wandb_at_a_closed_port() -> None:
    from training.recording import trackers

    trackers.INIT_SECONDS = 2.0
    for name in ("WANDB_MODE", "WANDB_SERVICE"):  # the latter would lead to the service of the tests' own process
        os.environ.pop(name, None)
    os.environ |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}


def test_wandb_that_cannot_be_reached_is_a_warning_and_no_file_has_the_key(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path, "tracker=wandb")
    assert run_in_child(overrides, wandb_at_a_closed_port, errors=tmp_path / "errors") == 0
    said = (tmp_path / "errors").read_text()
    assert "tracker=wandb cannot be reached" in said
    assert len(lines(tmp_path / "run", "train")) == 24
    assert summary(tmp_path / "run")["status"] == "completed"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_rows(tmp_path / "run")]
    assert rows == mirrored(tmp_path / "run")
