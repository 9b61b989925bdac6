"""Where a study's runs are: at work under runs/, and, when they have ended, as compact records to keep.

runs/<study>/<trial>/                  at work: checkpoints, full metrics (not committed)
results/<study>/runs/<trial>/          the record to keep: configuration, environment, summary, thinned metrics
results/<study>/study.json             the index that `analysis` reads
results/<study>/study.yaml             the study as it was run
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from studies.plan import Outcome, Plan, Trial, expected_trials, plan
from studies.spec import StudySpec, load_spec
from training.config import ConfigurationError
from training.records import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    RecordError,
    json_line,
    metrics_content,
    parse_line,
    read_summary,
    write_atomically,
)

INDEX_FILE = "study.json"
SPEC_FILE = "study.yaml"
# Lines kept of a record: enough for every figure, a few kilobytes a run.
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

    def record(self, trial: Trial) -> Path:
        return self.records / "runs" / trial.name

    def run(self, trial: Trial) -> Path:
        return self.work / trial.name


def outcomes(places: Places) -> dict[str, Outcome]:
    """The trials that have ended, by name, from their records; a run that ended at work and was not kept yet counts
    too."""
    found: dict[str, Outcome] = {}
    for root in (places.work, places.records / "runs"):
        if not root.is_dir():
            continue
        for directory in root.iterdir():
            outcome = read_outcome(directory)
            if outcome is not None:
                found[directory.name] = outcome
    return found


def read_outcome(directory: Path) -> Outcome | None:
    """How the run in a directory ended; None where it has not, or was preempted or failed and can be run again.

    Raises:
        RecordError: its summary cannot be read, or is damaged.
    """
    summary = read_summary(directory)
    if summary is not None and summary["status"] == "diverged":
        return Outcome("diverged", math.inf)
    if summary is None or summary["status"] != "completed":
        return None
    loss = summary.get("final_val_loss")
    if loss is None:
        raise RecordError(f"{directory / SUMMARY_FILE} is damaged: a completed run has a final_val_loss")
    return Outcome("completed", float(loss))


def keep(trial: Trial, places: Places) -> None:
    """Copy an ended run's record to where it is kept, with thinned metrics, and free the checkpoints' space at work.

    The summary goes last: a record with a summary is complete.
    """
    source, target = places.run(trial), places.record(trial)
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, ENVIRONMENT_FILE):
        write_atomically(target / name, (source / name).read_bytes())
    write_atomically(target / METRICS_FILE, thin_metrics(source / METRICS_FILE, trial.phase))
    write_atomically(target / SUMMARY_FILE, (source / SUMMARY_FILE).read_bytes())
    shutil.rmtree(source / "checkpoints", ignore_errors=True)


def thin_metrics(path: Path, phase: str) -> bytes:
    """All eval and event lines; of train and hessian lines a few at equal distances, the last one always."""
    lines = metrics_content(path).splitlines()
    kinds = [parse_line(line, path, number)["kind"] for number, line in enumerate(lines, start=1)]
    kept: set[int] = {index for index, kind in enumerate(kinds) if kind in ("eval", "event")}
    for kind, limit in (("train", _TRAIN_LINES[phase]), ("hessian", _HESSIAN_LINES[phase])):
        places = [index for index, one in enumerate(kinds) if one == kind]
        if limit and places:
            step = max(1, -(-len(places) // limit))
            kept.update(places[::-1][::step])
    return b"".join(lines[index] + b"\n" for index in sorted(kept))


def write_index(spec: StudySpec, plan: Plan, places: Places) -> Path:
    """study.json: what `analysis` needs to know of the study beyond its records."""
    places.records.mkdir(parents=True, exist_ok=True)
    path = places.records / INDEX_FILE
    lines = [json_line(_entry(trial)) for trial in plan.trials]
    head = json.dumps(_head(spec, plan), indent=1)[:-2]
    trials = ",\n".join(f"  {line}" for line in lines)
    write_atomically(path, f'{head},\n "trials": [\n{trials}\n ]\n}}\n')
    return path


def write_spec(spec: StudySpec, known: Mapping[str, Outcome], places: Places) -> Path:
    """study.yaml: the study as it is run.

    Raises:
        ConfigurationError: reported runs are on record, and the seeds or the level were changed since, or some of these
            runs left out.
    """
    path = places.records / SPEC_FILE
    if path.is_file():
        before = load_spec(path)
        trials = plan(before, known).trials
        reported = [(t.arm, t.model, t.horizon) for t in trials if t.phase == "reporting" and t.name in known]
        changed = _changed_after_looking(before, spec) or _left_out(reported, spec)
        if reported and changed:
            raise ConfigurationError(
                f"{spec.name}: {changed} after reported runs were seen; what is reported is fixed beforehand. "
                f"Restore it as in {path}, or begin a study of another name"
            )
    places.records.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=110)
    write_atomically(path, content)
    return path


def _changed_after_looking(before: StudySpec, after: StudySpec) -> str:
    """What must not change and did, in words; empty if nothing did. New models, arms and ablations may come."""
    for model, spec in before.models.items():
        if model in after.models and after.models[model].seeds != spec.seeds:
            return f"models.{model}.seeds went from {list(spec.seeds)} to {list(after.models[model].seeds)}"
    if after.level != before.level:
        return f"level went from {before.level:g} to {after.level:g}"
    return "" if after.baseline == before.baseline else f"baseline went from {before.baseline} to {after.baseline}"


def _left_out(reported: Iterable[tuple[str, str, int]], after: StudySpec) -> str:
    """The first cell with runs on record that a study no longer reports, in words."""
    kept = {(arm, model, horizon) for arm, model, horizon, phase in expected_trials(after) if phase == "reporting"}
    gone = next((cell for cell in reported if cell not in kept), None)
    return "" if gone is None else f"{gone[0]} on {gone[1]} at {gone[2]:,} steps was left out"


def _head(spec: StudySpec, plan: Plan) -> dict[str, Any]:
    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for (tuned, model, horizon), trials in plan.budgets.items():
        budgets.setdefault(tuned, {}).setdefault(model, {})[str(horizon)] = trials
    arms: dict[str, Any] = {}
    for name, arm in spec.arms.items():
        arms[name] = {
            "role": "arm",
            "method": spec.tuning.method,
            "search": {key: _plain(space.model_dump(mode="json")) for key, space in arm.search.items()},
            "budget": spec.tuning.trials if arm.search else None,
            "budgets": budgets.get(name, {}),
        }
    for name, ablation in spec.ablations.items():
        arms[name] = {"role": "ablation", "of": ablation.of, "varies": list(ablation.varies)}
    seeds = sorted({seed for model in spec.models.values() for seed in model.seeds})
    return {
        "name": spec.name,
        "description": spec.description,
        "baseline": spec.baseline,
        "level": spec.level,
        "seeds": {"tuning": list(spec.tuning.seeds), "reporting": seeds},
        "finished": plan.finished,
        "trials_at_most": sum(expected_trials(spec).values()),
        "arms": arms,
    }


def _entry(trial: Trial) -> dict[str, Any]:
    return {
        "arm": trial.arm,
        "phase": trial.phase,
        "model": trial.model,
        "horizon": trial.horizon,
        "seed": trial.seed,
        "values": dict(trial.values),
        "run": f"runs/{trial.name}",
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value is not False}
