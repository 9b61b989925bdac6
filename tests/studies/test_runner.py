"""Running a study: finished trials are skipped, unfinished ones resume, budgets and seeds are kept."""

import errno
import itertools
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from analysis.guards import inspect
from analysis.report import write_report
from analysis.results import analyse
from analysis.trial_tables import by_trial, curves_of, read_curves, read_trials, write_curves, write_trials
from analysis.trials import load_study
from studies.expansion import expand
from studies.runner import Pace, job, progress, run_study
from studies.spec import StudySpec, validate_spec
from studies.store import Places, compact, outcomes, thinned
from studies.times import measure
from tests.analysis.synthetic import noise, power_law, write_run
from tests.studies.small import small
from training.config import ConfigurationError
from training.exits import EXIT_HELD
from training.records import RecordError, RunRecord


class FakeMachine:
    """Writes the record that a run would leave, and remembers what it was asked."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.ran: list[str] = []
        self.codes: dict[str, int] = {}  # by position, where a job is to fail
        self.stop_after = stop_after

    def __call__(self, jobs: Sequence[Sequence[str]]) -> list[int]:
        return [self._run(dict(override.partition("=")[::2] for override in one)) for one in jobs]

    def _run(self, values: dict[str, str]) -> int:
        name = values["name"]
        self.ran.append(name)
        if self.stop_after is not None and len(self.ran) > self.stop_after:
            return 75
        if name in self.codes:
            return self.codes[name]
        steps, seed, optimizer = int(values["train.steps"]), int(values["seed"]), values["optimizer"]
        rate = float(values.get("optimizer.lr", 1e-3))
        loss = (
            power_law(steps * 1024)
            + 0.05 * math.log(rate / 2e-3) ** 2
            + noise(seed, steps, len(optimizer), scale=0.002)
        )
        directory = Path(values["output_dir"]) / name
        config = {"model.name": values["model"], "optimizer.lr": rate}
        if "optimizer.betas" in values:
            config["optimizer.betas"] = json.loads(values["optimizer.betas"])
        write_run(
            directory,
            optimizer=optimizer,
            seed=seed,
            steps=steps,
            final=loss,
            evaluations=5,
            config=config,
        )
        (directory / "checkpoints").mkdir()
        return 0


@pytest.fixture
def spec() -> StudySpec:
    return validate_spec(small(), "small.yaml")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.of("small", tmp_path / "runs", tmp_path / "results")


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A finished study, which no test changes."""
    root = tmp_path_factory.mktemp("whole")
    places = Places.of("small", root / "runs", root / "results")
    run_study(validate_spec(small(), "small.yaml"), places, FakeMachine(), log=silent)
    return places


@pytest.fixture
def finished(whole: Places, places: Places) -> Places:
    """A copy of it."""
    shutil.copytree(whole.work, places.work)
    shutil.copytree(whole.records, places.records)
    return places


def test_a_study_runs_to_its_end_and_a_second_call_runs_nothing(spec: StudySpec, places: Places) -> None:
    machine = FakeMachine()
    report = run_study(spec, places, machine, log=silent)
    assert report.finished
    assert report.ran == len(machine.ran) == len(set(machine.ran))
    again = FakeMachine()
    assert run_study(spec, places, again, log=silent).finished
    assert again.ran == []


def test_an_interrupted_study_resumes_and_runs_nothing_twice(spec: StudySpec, places: Places) -> None:
    first = FakeMachine(stop_after=7)
    report = run_study(spec, places, first, log=silent)
    assert report.interrupted
    assert report.ran == 7
    second = FakeMachine()
    assert run_study(spec, places, second, log=silent).finished
    assert set(first.ran[:7]).isdisjoint(second.ran)
    assert second.ran[0] == first.ran[7], "the run that was cut off is the first to go on"
    whole = FakeMachine()
    elsewhere = Places.of("small", places.work.parent / "other", places.records.parent / "other")
    run_study(spec, elsewhere, whole, log=silent)
    assert whole.ran == first.ran[:7] + second.ran


def test_a_study_resumes_from_its_records_in_a_fresh_clone(spec: StudySpec, finished: Places) -> None:
    clone = Places(finished.work.parent / "empty", finished.records)
    machine = FakeMachine()
    assert run_study(spec, clone, machine, log=silent).finished
    assert machine.ran == []


def test_a_run_that_ended_just_before_a_kill_is_kept_without_being_run_again(spec: StudySpec, places: Places) -> None:
    trial = expand(spec, {}).trials[0]
    FakeMachine()(jobs=[job(spec, trial, places)])
    machine = FakeMachine()
    run_study(spec, places, machine, log=silent)
    assert trial.name not in machine.ran
    assert trial.name in {row.trial for row in read_trials(places.records) if row.summary}


def test_no_trial_starts_after_the_time_limit(spec: StudySpec, places: Places) -> None:
    machine = FakeMachine()
    report = run_study(spec, places, machine, hours=0.0, log=silent)
    assert report.interrupted
    assert machine.ran == []


def test_a_failed_trial_stops_neither_the_others_nor_the_next_call(spec: StudySpec, places: Places) -> None:
    machine = FakeMachine()
    first = expand(spec, {}).trials[0]
    machine.codes[first.name] = 1
    said: list[str] = []
    report = run_study(spec, places, machine, log=said.append)
    assert not report.finished
    assert report.failed == (first.name,)
    assert any("failed with exit code 1" in line and ".log" in line for line in said)
    assert any(name.startswith("sophiag") for name in machine.ran)
    assert run_study(spec, places, FakeMachine(), log=silent).finished


def test_a_refused_configuration_ends_the_study_with_the_log(spec: StudySpec, places: Places) -> None:
    machine = FakeMachine()
    machine.codes[expand(spec, {}).trials[0].name] = 2
    with pytest.raises(ConfigurationError, match=r"is invalid, see .*\.log; correct the study file"):
        run_study(spec, places, machine, log=silent)


def test_seeds_cannot_change_after_reported_runs_were_seen(spec: StudySpec, finished: Places) -> None:
    values = small()
    values["models"]["gpt2_nano"]["seeds"] = [1, 2, 3, 4, 5]
    with pytest.raises(ConfigurationError, match=r"seeds changed from \[1, 2, 3\] to \[1, 2, 3, 4, 5\] after results"):
        run_study(validate_spec(values, "small.yaml"), finished, FakeMachine(), log=silent)


def test_seeds_cannot_change_once_what_was_reported_has_been_set_aside(finished: Places) -> None:
    """A search that changes sets the reported runs aside; they were seen all the same."""
    values = small()
    for arm in values["arms"].values():
        rates = arm["search"]["optimizer.lr"]["values"]
        arm["search"]["optimizer.lr"]["values"] = [1.01 * rate for rate in rates]
    compact(validate_spec(values, "small.yaml"), finished)
    values["models"]["gpt2_nano"]["seeds"] = [7, 8, 9]
    with pytest.raises(ConfigurationError, match="seeds changed from"):
        compact(validate_spec(values, "small.yaml"), finished)


def test_reported_runs_keep_their_checkpoints_and_tuning_runs_do_not(spec: StudySpec, finished: Places) -> None:
    for trial in expand(spec, outcomes(finished)).trials:
        assert (finished.run(trial) / "checkpoints").is_dir() == (trial.phase == "reporting")


def test_a_trial_that_another_process_runs_does_not_stop_the_others(spec: StudySpec, places: Places) -> None:
    machine, said = FakeMachine(), list[str]()
    first = expand(spec, {}).trials[0].name
    machine.codes[first] = EXIT_HELD
    sitting = run_study(spec, places, machine, log=said.append)
    assert sitting.ran == len(machine.ran) - 1 > 3
    assert machine.ran.count(first) == 1
    assert sitting.interrupted
    assert not sitting.failed
    assert said[-1].endswith("1 trials run in other processes; rerun the same command when they have finished")


def test_a_file_system_without_locks_is_a_warning(
    spec: StudySpec, places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("studies.store.fcntl.flock", absent)
    assert run_study(spec, places, FakeMachine(), log=silent).finished
    assert "the file system has no locks (Function not implemented)" in caplog.text


def test_what_was_reported_cannot_be_left_out_afterwards(spec: StudySpec, finished: Places) -> None:
    values = small()
    horizon = spec.horizons("sophiag", "gpt2_nano")[-1]
    values["arms"]["sophiag"]["horizons"] = list(spec.horizons("sophiag", "gpt2_nano")[:-1])
    with pytest.raises(
        ConfigurationError, match=f"sophiag on gpt2_nano at {horizon:,} steps was removed after results"
    ):
        run_study(validate_spec(values, "small.yaml"), finished, FakeMachine(), log=silent)


def test_seeds_can_change_before_any_reported_run(spec: StudySpec, places: Places) -> None:
    run_study(spec, places, FakeMachine(stop_after=2), log=silent)
    values = small()
    values["models"]["gpt2_nano"]["seeds"] = [1, 2, 3, 4, 5]
    assert run_study(validate_spec(values, "small.yaml"), places, FakeMachine(), log=silent).finished


def test_the_tables_are_what_the_analysis_reads(spec: StudySpec, finished: Places) -> None:
    study = load_study([finished.records])
    assert study.seeds == (1, 2, 3)
    assert study.arms["sophiag_k1"].of == "sophiag"
    assert study.arms["sophiag_k1"].varies == ("optimizer.hessian_interval",)
    assert study.arms["adamw"].budget == 6
    assert [study.arms["adamw"].granted("gpt2_nano", horizon) for horizon in (25, 50, 100)] == [3, 6, 3]
    assert study.arms["adamw"].granted("gpt2_micro", 50) == 3
    assert all(trial.status == "completed" for trial in study.trials)
    assert [finding.title for finding in inspect(study) if finding.severity == "serious"] == []
    assert analyse(study).verdict("sophiag", "gpt2_nano").word == "not told apart"


def test_the_recorded_budgets_include_finalists(places: Places) -> None:
    values = small()
    values["tuning"]["finalists"] = {"settings": 2, "seeds": [101, 102]}
    assert run_study(validate_spec(values, "small.yaml"), places, FakeMachine(), log=silent).finished
    study = load_study([places.records])
    assert [study.arms["adamw"].granted("gpt2_nano", horizon) for horizon in (25, 50, 100)] == [7, 10, 7]
    assert [finding.title for finding in inspect(study) if finding.guard == "budget"] == []


def test_an_interrupted_study_lists_what_is_missing(spec: StudySpec, finished: Places) -> None:
    assert load_study([finished.records]).under_way == ""
    rows = read_trials(finished.records)
    write_trials(
        finished.records,
        [row for row in rows if row.model != "gpt2_micro" and not row.arm.startswith("sophiag_")],
    )
    shutil.rmtree(finished.work)
    run_study(spec, finished, FakeMachine(stop_after=0), log=silent)
    study = load_study([finished.records])
    assert study.under_way.startswith(
        f"The study {study.name} is under way: {sum(t.run is not None for t in study.trials)} of at most"
    )
    assert study.under_way.endswith("Not reported yet: gpt2_micro; sophiag_k1 on gpt2_nano after 50 steps.")
    assert study.under_way in (write_report(analyse(study), finished.records).markdown.read_text())
    gone = ("sophiag", 50, (1, 2)), ("adamw", 50, (1,))
    rows = [
        row
        for row in read_trials(finished.records)
        if not any((row.arm, row.horizon) == (arm, steps) and row.seed in seeds for arm, steps, seeds in gone)
    ]
    write_trials(finished.records, rows)
    run_study(spec, finished, FakeMachine(stop_after=0), log=silent)
    cell = "AdamW (1 of 3 seeds), Sophia-G (2 of 3 seeds), sophiag_k1 on gpt2_nano after 50 steps"
    assert load_study([finished.records]).under_way.endswith(f"Not reported yet: gpt2_micro; {cell}.")


def test_the_level_counts_arms_whose_runs_are_to_come(places: Places) -> None:
    """An early look is not more liberal than the last one."""
    values = small()
    values["arms"]["lion"] = values["arms"]["adamw"] | {"overrides": ["optimizer=lion"]}
    spec = validate_spec(values, "small.yaml")
    assert run_study(spec, places, FakeMachine(), log=silent).finished
    assert load_study([places.records]).corrected_level("gpt2_nano") == 1 - 0.05 / 2
    write_trials(
        places.records, [row for row in read_trials(places.records) if (row.arm, row.phase) != ("lion", "reporting")]
    )
    shutil.rmtree(places.work)
    run_study(spec, places, FakeMachine(stop_after=0), log=silent)
    study = load_study([places.records])
    assert "Lion on gpt2_nano after 50 steps" in study.under_way
    assert study.corrected_level("gpt2_nano") == 1 - 0.05 / 2
    assert study.corrected_level("gpt2_micro") == 1 - 0.05


def test_more_trials_than_a_retuning_was_granted_are_found_in_the_records(spec: StudySpec, finished: Places) -> None:
    """Fewer than the full search's budget, so that only the budget of the horizon itself gives them away."""
    rows = read_trials(finished.records)
    tuned = next(row for row in rows if (row.phase, row.horizon, row.arm) == ("tuning", 100, "sophiag"))
    write_trials(finished.records, [*rows, replace(tuned, trial="another")])
    curves = read_curves(finished.records)
    own = curves.filter(pc.equal(curves["trial"], tuned.trial)).to_pylist()
    write_curves(finished.records, [curves, curves_of("another", own)])
    found = [finding.title for finding in inspect(load_study([finished.records])) if finding.guard == "budget"]
    assert "More tuning trials than granted: Sophia-G" in found


def test_tables_are_small_and_hold_every_evaluation(spec: StudySpec, finished: Places) -> None:
    trials = expand(spec, outcomes(finished)).trials
    lines = by_trial(read_curves(finished.records))
    trial = next(t for t in trials if t.phase == "reporting" and t.horizon == 100)
    full = [json.loads(line) for line in (finished.run(trial) / "metrics.jsonl").read_text().splitlines()]
    kept = lines[trial.name].to_pylist()
    for column in ("step", "tokens", "flops", "seconds", "val_loss"):
        written = [line[column] for line in full if line["kind"] == "eval"]
        assert [row[column] for row in kept if row["kind"] == "eval"] == written, "to the last digit"
    tuned = next(t for t in trials if t.phase == "tuning" and t.horizon == 100)
    assert sum(row["kind"] == "train" for row in lines[tuned.name].to_pylist()) <= 30


def test_thinned_lines_are_taken_at_equal_distances_and_the_last_is_among_them(tmp_path: Path) -> None:
    record = RunRecord.open(write_run(tmp_path / "r", optimizer="sophiag", steps=999))
    steps = [line["step"] for line in thinned(record.metrics(), "reporting") if line["kind"] == "train"]
    assert len(steps) <= 100
    assert steps[-1] == 999
    (distance,) = {b - a for a, b in itertools.pairwise(steps)}
    assert math.gcd(distance, 10) == 1, "else all lines are equally far from a refresh of h"


def test_a_study_killed_between_two_trials_loses_nothing(spec: StudySpec, places: Places) -> None:
    """Nothing of it is in the tables; the runs that ended are, after the next compaction."""

    machine = FakeMachine()

    def launch(jobs: Sequence[Sequence[str]]) -> list[int]:
        if len(machine.ran) == 3:
            os._exit(9)
        return machine(jobs)

    child = os.fork()
    if child == 0:
        run_study(spec, places, launch, log=silent)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert all(row.summary is None for row in read_trials(places.records))
    assert len(outcomes(places)) == 3
    assert len(compact(spec, places)) == 3
    assert sum(row.summary is not None for row in read_trials(places.records)) == 3
    assert set(by_trial(read_curves(places.records))) == set(outcomes(places))
    assert compact(spec, places) == [], "what is in the tables is not taken in again"


def test_a_compaction_that_is_killed_after_the_curves_leaves_no_line_twice(
    spec: StudySpec, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = expand(spec, {}).trials[0]
    FakeMachine()(jobs=[job(spec, trial, places)])
    with monkeypatch.context() as patch:
        patch.setattr("studies.store.write_trials", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compact(spec, places)
    assert compact(spec, places) == [trial.name]
    steps = [row["step"] for row in read_curves(places.records).to_pylist() if row["kind"] == "eval"]
    assert steps == sorted({*steps})


def test_concurrent_calls_do_not_overwrite_each_other(spec: StudySpec, places: Places) -> None:
    """Each at work in a place of its own, both compacting into one pair of tables, over and over."""
    trials = expand(spec, {}).trials[:1] + expand(spec, {}).trials[-1:]
    assert len({trial.name for trial in trials}) == 2
    children = []
    for number, trial in enumerate(trials):
        own = Places(places.work / str(number), places.records)
        FakeMachine()(jobs=[job(spec, trial, own)])
        child = os.fork()
        if child == 0:
            try:
                compact(spec, own)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert {row.trial for row in read_trials(places.records) if row.summary} == {trial.name for trial in trials}
    assert set(by_trial(read_curves(places.records))) == {trial.name for trial in trials}


def test_a_damaged_run_is_named_and_the_others_are_added(spec: StudySpec, places: Places) -> None:
    first, second = expand(spec, {}).trials[:1] + expand(spec, {}).trials[-1:]
    FakeMachine()(jobs=[job(spec, trial, places) for trial in (first, second)])
    (places.run(first) / "metrics.jsonl").write_text("garbage\n")
    with pytest.raises(RecordError, match=rf"{first.name}/metrics.jsonl:1 is not JSON"):
        compact(spec, places)
    assert {row.trial for row in read_trials(places.records) if row.summary} == {second.name}


def test_a_trial_that_the_study_no_longer_has_is_set_aside_and_counts_again_when_it_returns(
    spec: StudySpec, places: Places
) -> None:
    run_study(spec, places, FakeMachine(stop_after=4), log=silent)
    values = small()
    values["arms"]["adamw"]["search"]["optimizer.lr"]["values"] = [1e-4, 2e-4, 4e-4]
    compact(validate_spec(values, "small.yaml"), places)
    aside = {row.trial for row in read_trials(places.records) if row.phase == "set aside"}
    assert aside
    assert not aside & {trial.origin.name for trial in load_study([places.records]).trials}
    compact(spec, places)
    assert not [row for row in read_trials(places.records) if row.phase == "set aside"]
    machine = FakeMachine()
    run_study(spec, places, machine, log=silent)
    assert not aside & set(machine.ran)


def test_a_summary_that_cannot_be_read_is_named_and_the_other_runs_are_added(spec: StudySpec, places: Places) -> None:
    first, second = expand(spec, {}).trials[:2]
    FakeMachine()([job(spec, one, places) for one in (first, second)])
    (places.run(first) / "summary.json").write_text("")
    with pytest.raises(RecordError, match=rf"{first.name}.*restore the file, or remove .* to run the trial again"):
        compact(spec, places)
    assert [row.trial for row in read_trials(places.records) if row.summary] == [second.name]


def test_trackers_are_told_study_phase_and_arm(spec: StudySpec, places: Places) -> None:
    trial = expand(spec, {}).trials[0]
    overrides = job(spec, trial, places)
    assert "tracker.group=small-gpt2_nano" in overrides
    assert any(override.startswith("tracker.tags=") and '"tuning"' in override for override in overrides)


def test_a_resumed_trial_does_not_set_the_pace(spec: StudySpec, places: Places) -> None:
    """An earlier sitting made most of its steps."""
    first = expand(spec, {}).trials[0]
    places.run(first).mkdir(parents=True)
    lines: list[str] = []

    def launch(jobs: Sequence[Sequence[str]]) -> list[int]:
        if not machine.ran:
            places.run(first).rmdir()
        return machine(jobs)

    machine = FakeMachine(stop_after=2)
    run_study(spec, places, launch, log=lines.append)
    started = [line for line in lines if "started (" in line]
    assert ["left)" in line for line in started] == [False, False, True]


def test_the_time_left_is_told_from_what_trials_took(spec: StudySpec) -> None:
    current = expand(spec, {})
    pace = Pace()
    assert progress(spec, current, {}, pace).seconds_left is None
    pace.note([current.trials[0]], 50.0)  # fifty steps: a second each
    told = progress(spec, current, {}, pace)
    assert told.seconds_left is not None
    assert told.seconds_left > 50 * 20
    assert "left" in told.text


def test_reference_times_are_measured_in_turn_for_every_arm(
    spec: StudySpec, finished: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    machine = FakeMachine()
    times = measure(spec, finished, machine, steps=10, rounds=2, log=silent)
    arms = [name.split("-")[1] for name in machine.ran if "gpt2_nano" in name]
    assert arms == ["adamw", "sophiag"] * 2, "in turn, and without the ablation"
    assert set(times.seconds) == {"gpt2_nano", "gpt2_micro"}
    assert load_study([finished.records]).reference_times == times


def test_reference_times_leave_out_a_warm_up_that_is_longer_than_their_runs(
    finished: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    values = small()
    values["arms"]["adamw"]["overrides"].append("schedule.warmup_steps=20")
    jobs: list[list[str]] = []

    def launch(given: Sequence[Sequence[str]]) -> list[int]:
        jobs.extend(map(list, given))
        return FakeMachine()(given)

    compact(validate_spec(small(), "small.yaml"), finished)
    measure(validate_spec(values, "small.yaml"), finished, launch, steps=10, rounds=1, log=silent)
    assert jobs
    for job_ in jobs:
        assert [one for one in job_ if one.startswith("schedule.warmup_steps=")] == ["schedule.warmup_steps=null"]


def test_reference_times_are_not_measured_on_a_busy_machine(
    spec: StudySpec, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    with pytest.raises(RuntimeError, match="the machine is busy"):
        measure(spec, places, FakeMachine(), log=silent)


def test_batches_go_to_the_launcher_together(spec: StudySpec, places: Places) -> None:
    sizes: list[int] = []
    machine = FakeMachine()

    def launch(jobs: Sequence[Sequence[str]]) -> list[int]:
        sizes.append(len(jobs))
        return machine(jobs)

    report: Any = run_study(spec, places, launch, at_once=None, log=silent)
    assert report.finished
    assert max(sizes) >= 9
