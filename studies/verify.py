"""Verify a study's records: rerun trials from their rows and compare the curves with the recorded ones."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.runs import RecordedRun
from analysis.trial_tables import TrialRow, read_trials
from analysis.trials import VERIFICATION_FILE, RecordedTrial, Study
from data.files import write_atomically
from training.compose import without_removed
from training.config import ConfigurationError
from training.records import SUMMARY_FILE, RecordError, RunRecord, json_line, write_config

TOLERANCE = 1e-3  # nats, on a machine of the same type

_TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Verification:
    """The difference between a rerun trial and its record."""

    trial: str
    arm: str
    model: str
    steps: int
    seed: int
    lines: int  # eval and train lines in both
    # nats, the largest difference between losses of the same kind and step; infinite if only one run has the line or a
    # finite loss in it, or if their statuses differ
    difference: float
    final_difference: float  # nats, of the final validation losses
    recorded_on: str
    rerun_on: str

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE


def chosen(study: Study, names: Sequence[str] = ()) -> list[RecordedTrial]:
    """Return the named trials, by default one reported run of each arm on each model.

    The default is the first seed at the shortest horizon, a completed run if there is one.

    Raises:
        ValueError: no recorded trial has this name, or no reported run is on record.
    """
    known = {trial.origin.name: trial for trial in study.trials if trial.run is not None}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]}: no such trial on record; give names from the column trial of trials.csv")
    if names:
        return [known[name] for name in names]
    reported = [trial for trial in study.reporting if trial.run is not None and study.arms[trial.arm].role == "arm"]
    if not reported:
        raise ValueError(f"{study.name}: no reported run is on record; run the study first")
    first: dict[tuple[str, str], RecordedTrial] = {}
    for trial in sorted(reported, key=lambda one: (one.status != "completed", one.horizon, one.seed)):
        first.setdefault((trial.arm, trial.model), trial)
    return [first[key] for key in dict.fromkeys((trial.arm, trial.model) for trial in reported)]


def verify(
    trials: Sequence[RecordedTrial],
    work: Path,
    records: Path,
    *,
    allow_code: bool = False,
    log: Callable[[str], None] = print,
) -> list[Verification]:
    """Rerun trials from their rows and compare. Runs in parallel as far as cores and recorded threads allow.

    The results are also added to `verification.json` next to the study's tables, in place of older ones of the same trials.

    Args:
        trials: the result of `chosen`.
        work: directory for the reruns.
        records: the study's directory of records.
        allow_code: whether to import the optimizers that the records name (`optimizer.factory`).

    Raises:
        RuntimeError: runs failed. The message names their logs; the results of the others are written.
    """
    rows = {row.trial: row for row in read_trials(records)}
    failures: list[str] = []

    def once_more(trial: RecordedTrial) -> Verification | None:
        log(f"{trial.arm} on {trial.model}, {trial.horizon:,} steps, seed {trial.seed}: started")
        try:
            found = compare(trial, _run_again(rows[trial.origin.name], work, allow_code=allow_code))
        except (ConfigurationError, RecordError, RuntimeError) as error:
            failures.append(f"{trial.origin.name}: {error}" if isinstance(error, ConfigurationError) else str(error))
            return None
        log(f"{trial.arm} on {trial.model}: largest difference {found.difference:.2g} nats over {found.lines} lines")
        return found

    with ThreadPoolExecutor(_together(trials)) as pool:
        results = [found for found in pool.map(once_more, trials) if found is not None]
    if results:
        found = {line["trial"]: line for line in verified(records)}
        found |= {result.trial: asdict(result) | {"holds": result.holds} for result in results}
        lines = ",\n".join(f" {json_line(line)}" for line in found.values())
        write_atomically(records / VERIFICATION_FILE, f"[\n{lines}\n]\n")
    if failures:
        raise RuntimeError("; ".join(failures))
    return results


def verified(records: Path) -> list[dict[str, Any]]:
    """Return the lines of `verification.json`, none from a damaged file, which a report names."""
    try:
        lines = json.loads((records / VERIFICATION_FILE).read_text(encoding="utf-8"))
        return [line for line in lines if isinstance(line["trial"], str)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def compare(trial: RecordedTrial, again: Path) -> Verification:
    """Compare a recorded trial, whose lines may be thinned, with its rerun.

    Raises:
        RecordError: they have no line in common.
    """
    assert trial.run is not None
    before, after = trial.run, RunRecord.open(again)
    recorded, repeated = _recorded_losses(before), _losses(after)
    common = sorted(recorded.keys() & repeated.keys())
    if not common:
        raise RecordError(f"{again} and {trial.origin.name} have no step in common; compare runs of one configuration")
    same_end = len(common) == len(recorded) and before.status == (after.summary or {}).get("status")
    return Verification(
        trial=trial.origin.name,
        arm=trial.arm,
        model=trial.model,
        steps=trial.horizon,
        seed=trial.seed,
        lines=len(common),
        difference=max(_distance(recorded[key], repeated[key]) for key in common) if same_end else math.inf,
        final_difference=_distance(_final(before.summary), _final(after.summary)) if same_end else math.inf,
        recorded_on=_machine(before.environment),
        rerun_on=_machine(after.environment),
    )


def unequal(results: Sequence[Verification]) -> list[str]:
    """Return a sentence for each run that differs by more than the tolerance."""
    return [
        f"{one.trial}: {one.difference:.2g} nats from its record, more than {TOLERANCE:g}"
        + ("" if one.recorded_on == one.rerun_on else f" (recorded on {one.recorded_on}, now {one.rerun_on})")
        for one in results
        if not one.holds
    ]


def _run_again(row: TrialRow, work: Path, *, allow_code: bool) -> Path:
    without_removed(row.config)  # raises for a removed key, naming the commit to use
    target, log = work / row.trial, work / f"{row.trial}.log"
    given = work / "configurations" / row.trial
    given.mkdir(parents=True, exist_ok=True)
    write_config(given, row.config)
    (target / SUMMARY_FILE).unlink(missing_ok=True)  # an old summary would hide a run that fails to start
    command = [sys.executable, str(_TRAIN), "--config-path", str(given.absolute())]
    command += [f"output_dir={work.absolute()}", "overwrite=true", "tracker.name=none"]
    command += ["allow_code=true"] * allow_code
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads(row.environment))}
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if not (target / SUMMARY_FILE).is_file():
        raise RuntimeError(f"{row.trial} failed with exit code {code}, see {log}")
    return target


def _together(trials: Sequence[RecordedTrial]) -> int:
    """Return how many runs fit in parallel, by cores; one at a time on an accelerator."""
    environments = [trial.run.environment for trial in trials if trial.run is not None]
    if any(environment.get("hardware", {}).get("gpu") for environment in environments):
        return 1
    cores = max(_threads(environment) * int(environment.get("world_size") or 1) for environment in environments)
    return max(1, (os.cpu_count() or 1) // cores)


def _threads(environment: Mapping[str, Any]) -> int:
    return int(environment.get("hardware", {}).get("threads") or 1)


def _machine(environment: Mapping[str, Any]) -> str:
    hardware = environment.get("hardware", {})
    return (
        f"{hardware.get('gpu') or hardware.get('cpu') or 'an unknown machine'}, threads {hardware.get('threads', '?')}"
    )


def _recorded_losses(run: RecordedRun) -> dict[tuple[str, int], float]:
    curves = {"eval": (run.evaluations, "val_loss"), "train": (run.training, "loss")}
    return {
        (kind, int(step)): float(loss)
        for kind, (curve, column) in curves.items()
        for step, loss in zip(curve.steps, curve[column], strict=True)
    }


def _losses(record: RunRecord) -> dict[tuple[str, int], float]:
    losses: dict[tuple[str, int], float] = {}
    for line in record.metrics("eval", "train"):
        loss = line.get("val_loss" if line["kind"] == "eval" else "loss")
        losses[str(line["kind"]), int(line["step"])] = math.nan if loss is None else float(loss)
    return losses


def _final(summary: Mapping[str, Any] | None) -> float:
    loss = (summary or {}).get("final_val_loss")
    return math.nan if loss is None else float(loss)


def _distance(one: float, other: float) -> float:
    """Return the difference of two losses; it is 0 if neither is finite."""
    if math.isfinite(one) != math.isfinite(other):
        return math.inf
    return abs(one - other) if math.isfinite(one) else 0.0
