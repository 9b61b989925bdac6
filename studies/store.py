"""Storage of a study's trials: run directories under runs/, and tables of finished trials under results/.

runs/<study>/<trial>/           a run: checkpoints, every metric line (not committed)
results/<study>/study.yaml      the study as run; `plan` holds what was derived from it
results/<study>/trials.csv      a row per trial (analysis/trial_tables.py)
results/<study>/curves.parquet  its metric lines, thinned

`compact` adds finished runs to the tables at the end of `study.py run`. A finished run counts as recorded in either
place, so nothing is lost if the process is killed.
"""

import fcntl
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from analysis.runs import unaligned_stride
from analysis.trial_tables import (
    TrialRow,
    checked,
    curves_of,
    read_curves,
    read_trials,
    write_curves,
    write_trials,
)
from analysis.trials import PLAN, STUDY_FILE
from data.files import write_atomically
from studies.expansion import Expansion, Outcome, Trial, expand, expected_trials
from studies.spec import StudySpec, load_spec
from training.config import ConfigurationError
from training.records import SUMMARY_FILE, RecordError, RunRecord, read_summary

LOCK_FILE = ".lock"
# Lines kept per run: enough for every figure, in a few kilobytes.
_TRAIN_LINES = {"tuning": 30, "reporting": 100}
_HESSIAN_LINES = {"tuning": 0, "reporting": 8}


@dataclass(frozen=True)
class Places:
    """The two directories of a study."""

    work: Path  # runs/<study>
    records: Path  # results/<study>

    @classmethod
    def of(cls, study: str, work: Path = Path("runs"), records: Path = Path("results")) -> "Places":
        return cls(work / study, records / study)

    def run(self, trial: Trial) -> Path:
        return self.work / trial.name


def outcomes(places: Places) -> dict[str, Outcome]:
    """Return the outcomes of finished trials by name, from the tables and from run directories."""
    damaged: list[RecordError] = []
    found = _at_work(places, damaged) | _in_tables(read_trials(places.records))
    if damaged:
        raise damaged[0]
    return found


def read_outcome(directory: Path) -> Outcome | None:
    """Return the outcome of the run in a directory; None if it is unfinished, preempted or failed.

    Raises:
        RecordError: its summary cannot be read or is damaged.
    """
    return _outcome(read_summary(directory), directory / SUMMARY_FILE)


def compact(spec: StudySpec, places: Places) -> list[str]:
    """Add finished runs to the tables, and write study.yaml and trials.csv for the current study.

    A lock serialises concurrent calls. A trial that is no longer in the study keeps its row, marked "set aside".

    Returns:
        The trials that were added.

    Raises:
        ConfigurationError: reported runs are on record, and the seeds or the level changed since, or some of these runs
            are no longer in the study.
        RecordError: a table or a run is damaged; the other runs are added first.
    """
    with _locked(places.records):
        rows = {row.trial: row for row in read_trials(places.records)}
        ended = _in_tables(rows.values())
        damaged: list[RecordError] = []
        known = _at_work(places, damaged) | ended
        _refuse_changes_after_looking(spec, known, rows.values(), places.records / STUDY_FILE)
        current = expand(spec, known)
        taken: dict[str, TrialRow] = {}
        curves: list[pa.Table] = []
        for trial in current.trials:
            if trial.name in known and trial.name not in ended:
                try:
                    record = RunRecord.open(places.run(trial))
                    lines = curves_of(trial.name, thinned(record.metrics(), trial.phase))
                    taken[trial.name] = checked(_planned(trial, record))
                    curves.append(lines)
                except RecordError as error:
                    damaged.append(error)
        planned = [
            replace(taken.get(trial.name) or rows.get(trial.name) or _planned(trial), phase=trial.phase)
            for trial in current.trials
        ]
        names = {trial.name for trial in current.trials}
        aside = [replace(row, phase="set aside") for row in rows.values() if row.trial not in names and row.summary]
        if taken:
            # A trial is recorded once it has a row. Write its lines first: lines without a row, from a process that was
            # killed in between, are ignored.
            before = read_curves(places.records)
            before = before.filter(pc.is_in(before["trial"], pa.array(list(ended), pa.string())))
            write_curves(places.records, [before, *curves])
        _write_spec(spec, current, places.records / STUDY_FILE)
        write_trials(places.records, [*planned, *aside])
    for trial in current.trials:
        if trial.name in taken:
            free(trial, places)
    if damaged:
        raise damaged[0]
    return list(taken)


def free(trial: Trial, places: Places) -> None:
    """Delete the checkpoints of a finished tuning run. Reported runs keep their weights."""
    if trial.phase == "tuning":
        shutil.rmtree(places.run(trial) / "checkpoints", ignore_errors=True)


def thinned(lines: Iterable[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """Keep all eval and event lines, and equally spaced train and hessian lines including the last."""
    listed = list(lines)
    kept = {index for index, line in enumerate(listed) if line["kind"] in ("eval", "event")}
    for kind, limit in (("train", _TRAIN_LINES[phase]), ("hessian", _HESSIAN_LINES[phase])):
        of_kind = [index for index, line in enumerate(listed) if line["kind"] == kind]
        if limit and of_kind:
            kept.update(of_kind[::-1][:: unaligned_stride(len(of_kind), limit)])
    return [listed[index] for index in sorted(kept)]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: the file system has no locks (%s): two commands that add trials at once would lose some",
                directory,
                error.strerror,
            )
        yield


def _in_tables(rows: Iterable[TrialRow]) -> dict[str, Outcome]:
    found = {row.trial: _outcome(row.summary, row.trial) for row in rows}
    return {trial: outcome for trial, outcome in found.items() if outcome is not None}


def _at_work(places: Places, damaged: list[RecordError]) -> dict[str, Outcome]:
    """Return the outcomes of finished runs, and add the errors of those that cannot be read to `damaged`."""
    found: dict[str, Outcome] = {}
    for directory in sorted(places.work.iterdir()) if places.work.is_dir() else ():
        try:
            outcome = read_outcome(directory)
        except RecordError as error:
            damaged.append(RecordError(f"{error}; restore the file, or remove {directory} to run the trial again"))
            continue
        if outcome is not None:
            found[directory.name] = outcome
    return found


def _outcome(summary: Mapping[str, Any] | None, where: Path | str) -> Outcome | None:
    if summary is not None and summary["status"] == "diverged":
        return Outcome("diverged", math.inf)
    if summary is None or summary["status"] != "completed":
        return None
    loss = summary.get("final_val_loss")
    if loss is None:
        raise RecordError(f"{where} is damaged: a completed run without final_val_loss")
    return Outcome("completed", float(loss))


def _planned(trial: Trial, record: RunRecord | None = None) -> TrialRow:
    row = TrialRow(trial.name, trial.arm, trial.phase, trial.model, trial.horizon, trial.seed)
    if record is None:
        return row
    return replace(row, config=record.config, environment=record.environment, summary=record.summary)


def _refuse_changes_after_looking(
    spec: StudySpec, known: Mapping[str, Outcome], rows: Iterable[TrialRow], path: Path
) -> None:
    if not path.is_file():
        return
    before = load_spec(path)
    trials = expand(before, known).trials
    reported = [(t.arm, t.model, t.horizon) for t in trials if t.phase == "reporting" and t.name in known]
    # Tuning seeds are never reported, so that a row with a reported seed was looked at, whatever became of it.
    seeds = {(model, seed) for model, one in before.models.items() for seed in one.seeds}
    looked = bool(reported) or any(row.summary and (row.model, row.seed) in seeds for row in rows)
    changed = _changed(before, spec) or _left_out(reported, spec)
    if looked and changed:
        raise ConfigurationError(
            f"{spec.name}: {changed} after results were reported; restore it as in {path}, or start a study with another "
            "name"
        )


def _changed(before: StudySpec, after: StudySpec) -> str:
    """Describe a change that is not allowed; empty if there is none. New models, arms and ablations are allowed."""
    for model, spec in before.models.items():
        if model in after.models and after.models[model].seeds != spec.seeds:
            return f"models.{model}.seeds changed from {list(spec.seeds)} to {list(after.models[model].seeds)}"
    for name, arm in before.arms.items():
        if name in after.arms and after.arms[name].seeds != arm.seeds:
            return f"arms.{name}.seeds changed from {arm.seeds or 'all'} to {after.arms[name].seeds or 'all'}"
    if after.level != before.level:
        return f"level changed from {before.level:g} to {after.level:g}"
    return "" if after.baseline == before.baseline else f"baseline changed from {before.baseline} to {after.baseline}"


def _left_out(reported: Iterable[tuple[str, str, int]], after: StudySpec) -> str:
    """Describe the first recorded cell that the study no longer reports; empty if there is none."""
    kept = {(arm, model, horizon) for arm, model, horizon, phase in expected_trials(after) if phase == "reporting"}
    gone = next((cell for cell in reported if cell not in kept), None)
    return "" if gone is None else f"{gone[0]} on {gone[1]} at {gone[2]:,} steps was removed"


def _write_spec(spec: StudySpec, current: Expansion, path: Path) -> None:
    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for (arm, model, horizon), trials in current.budgets.items():
        budgets.setdefault(arm, {}).setdefault(model, {})[str(horizon)] = trials
    seeds: dict[str, dict[str, dict[str, int]]] = {}
    expected = expected_trials(spec)
    for (arm, model, horizon, phase), trials in expected.items():
        if phase == "reporting":
            seeds.setdefault(arm, {}).setdefault(model, {})[str(horizon)] = trials
    values = spec.model_dump(mode="json", exclude_defaults=True)
    values[PLAN] = {"trials_at_most": sum(expected.values()), "budgets": budgets, "seeds": seeds}
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, width=110))
