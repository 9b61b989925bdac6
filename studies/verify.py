"""Checks records: runs every arm once more from its committed configuration and compares the curves."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.trials import Study, Trial
from training.compose import without_removed
from training.config import ConfigurationError
from training.records import SUMMARY_FILE, RecordError, RunRecord, json_line, write_atomically

VERIFICATION_FILE = "verification.json"
TOLERANCE = 1e-3  # nats, on a machine of the same type

_TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Verification:
    """How far a run made again is from its record."""

    run: str  # the record's directory, relative to the study
    arm: str
    model: str
    steps: int
    seed: int
    lines: int  # of evaluation and training, in both
    # nats, the largest between losses of one kind and step; infinite where one run alone has a finite one, has the line at
    # all, or ended as it did
    difference: float
    recorded_on: str
    made_again_on: str

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE


def chosen(study: Study) -> list[Trial]:
    """One reported run of each arm on each model: of the shortest horizon, the first seed, completed if any is."""
    reported = [
        trial
        for trial in study.reporting
        if trial.run is not None and study.arms[trial.arm].role == "arm" and refusal(trial) is None
    ]
    first: dict[tuple[str, str], Trial] = {}
    for trial in sorted(reported, key=lambda one: (one.status != "completed", one.horizon, one.seed)):
        first.setdefault((trial.arm, trial.model), trial)
    return [first[key] for key in dict.fromkeys((trial.arm, trial.model) for trial in reported)]


def refusal(trial: Trial) -> str | None:
    """Why this version cannot run a recorded trial again; None where it can."""
    assert trial.run is not None
    try:
        without_removed(trial.run.record.config)
    except ConfigurationError as error:
        return str(error)
    return None


def verify(study: Study, work: Path, records: Path, *, tell: Callable[[str], None] = print) -> list[Verification]:
    """Run `chosen` again, as many side by side as the cores allow at the recorded number of threads, and compare.

    The result is also written to `verification.json` beside the study's index.

    Args:
        study: with its records.
        work: where the runs are made.
        records: the study's directory of records.

    Raises:
        RuntimeError: runs failed; their logs are named, and what the others have shown is written.
        ValueError: nothing has been reported yet.
    """
    trials = chosen(study)
    refused = {trial.arm: refusal(trial) for trial in study.reporting if trial.run is not None}
    for arm, reason in refused.items():
        if reason is not None:
            tell(f"{arm}: cannot be run again: {reason}")
    if not trials:
        raise ValueError(f"{study.name}: no reported run is on record; run the study first")
    failures: list[str] = []

    def once_more(trial: Trial) -> Verification | None:
        tell(f"{trial.arm} on {trial.model}, {trial.horizon:,} steps, seed {trial.seed}: begins")
        try:
            found = compare(trial, _run_again(trial, work), records)
        except (RecordError, RuntimeError) as error:
            failures.append(str(error))
            return None
        tell(f"{trial.arm} on {trial.model}: {found.difference:.2g} nats at most between {found.lines} lines")
        return found

    with ThreadPoolExecutor(_together(trials)) as pool:
        results = [found for found in pool.map(once_more, trials) if found is not None]
    if results:
        lines = ",\n".join(f" {json_line(asdict(result) | {'holds': result.holds})}" for result in results)
        write_atomically(records / VERIFICATION_FILE, f"[\n{lines}\n]\n")
    if failures:
        raise RuntimeError("; ".join(failures))
    return results


def compare(trial: Trial, again: Path, records: Path) -> Verification:
    """A recorded trial against a run made again. The record may have been thinned, the run made again has every line.

    Raises:
        RecordError: they have no line in common.
    """
    assert trial.run is not None
    before, after = trial.run.record, RunRecord.open(again)
    recorded, repeated = _losses(before), _losses(after)
    common = sorted(recorded.keys() & repeated.keys())
    if not common:
        raise RecordError(f"{again} and {before.directory} have no step in common; compare runs of one configuration")
    same_end = len(common) == len(recorded) and _status(before) == _status(after)
    return Verification(
        run=os.path.relpath(before.directory, records),
        arm=trial.arm,
        model=trial.model,
        steps=trial.horizon,
        seed=trial.seed,
        lines=len(common),
        difference=max(_distance(recorded[key], repeated[key]) for key in common) if same_end else math.inf,
        recorded_on=_machine(before),
        made_again_on=_machine(after),
    )


def unequal(results: Sequence[Verification]) -> list[str]:
    """A sentence for each run that differs by more than the tolerance."""
    return [
        f"{one.run}: {one.difference:.2g} nats from its record, more than {TOLERANCE:g}"
        + ("" if one.recorded_on == one.made_again_on else f" (recorded on {one.recorded_on}, now {one.made_again_on})")
        for one in results
        if not one.holds
    ]


def _run_again(trial: Trial, work: Path) -> Path:
    target, log = work / trial.directory.name, work / f"{trial.directory.name}.log"
    work.mkdir(parents=True, exist_ok=True)
    (target / SUMMARY_FILE).unlink(missing_ok=True)  # an earlier call's would vouch for a run that never began
    command = [sys.executable, str(_TRAIN), "--config-path", str(trial.directory.absolute())]
    command += [f"output_dir={work.absolute()}", "overwrite=true", "tracker.name=none"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads(trial))}
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if not (target / SUMMARY_FILE).is_file():
        raise RuntimeError(f"{trial.directory.name} failed with exit code {code}, see {log}")
    return target


def _together(trials: Sequence[Trial]) -> int:
    """How many of the runs fit side by side: by cores, and one at a time where there is an accelerator."""
    if any(_environment(trial).get("hardware", {}).get("gpu") for trial in trials):
        return 1
    cores = max(_threads(trial) * int(_environment(trial).get("world_size") or 1) for trial in trials)
    return max(1, (os.cpu_count() or 1) // cores)


def _environment(trial: Trial) -> dict[str, Any]:
    assert trial.run is not None
    return trial.run.record.environment


def _threads(trial: Trial) -> int:
    return int(_environment(trial).get("hardware", {}).get("threads") or 1)


def _status(record: RunRecord) -> str:
    return str((record.summary or {}).get("status", "unfinished"))


def _machine(record: RunRecord) -> str:
    hardware = record.environment.get("hardware", {})
    return (
        f"{hardware.get('gpu') or hardware.get('cpu') or 'an unknown machine'}, threads {hardware.get('threads', '?')}"
    )


def _losses(record: RunRecord) -> dict[tuple[str, int], float]:
    losses: dict[tuple[str, int], float] = {}
    for line in record.metrics("eval", "train"):
        loss = line.get("val_loss" if line["kind"] == "eval" else "loss")
        losses[str(line["kind"]), int(line["step"])] = math.nan if loss is None else float(loss)
    return losses


def _distance(one: float, other: float) -> float:
    """Between two losses; runs that are not finite at the same place agree."""
    if math.isfinite(one) != math.isfinite(other):
        return math.inf
    return abs(one - other) if math.isfinite(one) else 0.0
