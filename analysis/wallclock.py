"""Wall-clock time of training from the ledger, and a reference-time model without the noise of a shared machine.

Training time is the time of forward and backward passes, curvature passes, optimizer steps and waiting for data.
Evaluation, checkpoints and compilation are separate: a run that evaluates more often did not train more slowly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from analysis.runs import RecordedRun
from data.files import write_atomically
from training.records import Form, RecordError, read_object

TRAINING_KINDS = ("forward_backward", "curvature", "optimizer", "data")
# The same computation under every optimizer: one measurement per model serves all arms.
SHARED_KINDS = ("forward_backward", "data")


def training_seconds(run: RecordedRun) -> float:
    """Return the measured seconds of training: the ledger's training kinds, or the record's total without a ledger."""
    if not run.ledger:
        return run.total("seconds")
    return float(sum(run.ledger.get(kind, {}).get("seconds", 0.0) for kind in TRAINING_KINDS))


def seconds_per_occurrence(run: RecordedRun, kind: str) -> float | None:
    """Return the mean measured seconds of one occurrence of a kind of work; None without any."""
    entry = run.ledger.get(kind, {})
    return entry["seconds"] / entry["count"] if entry.get("count") else None


class ReferenceTimes(Form):
    """Seconds for one occurrence of each kind of work, by model and arm, measured on an idle machine.

    `seconds[model][arm][kind]`; kinds that do not depend on the optimizer have the same number in every arm.
    """

    source: str
    seconds: dict[str, dict[str, dict[str, float]]]

    def training_seconds(self, run: RecordedRun, arm: str) -> float:
        """Return the run's counts times the reference times; NaN if the model, arm or a kind was not measured."""
        costs = self.seconds.get(run.model, {}).get(arm)
        if costs is None or not run.ledger:
            return math.nan
        counts = {kind: run.ledger[kind]["count"] for kind in TRAINING_KINDS if kind in run.ledger}
        return sum(count * costs.get(kind, math.nan) for kind, count in counts.items() if count)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ReferenceTimes:
        """Read a file written by `save`. RecordError if it is missing, unreadable or damaged."""
        content = read_object(path, cls)
        if content is None:
            raise RecordError(f"{path} is missing")
        return cls.model_validate(content)


def reference_times(runs: Iterable[tuple[str, RecordedRun]], source: str) -> ReferenceTimes:
    """Return reference times from (arm, run) pairs measured on an idle machine.

    A run's ledger gives the mean cost of each kind; the result is the median over the runs of a cell, or over all arms
    of a model for kinds that do not depend on the optimizer.
    """
    costs: dict[tuple[str, str, str], list[float]] = {}
    for arm, run in runs:
        for kind in TRAINING_KINDS:
            if (cost := seconds_per_occurrence(run, kind)) is not None:
                costs.setdefault((run.model, arm, kind), []).append(cost)
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    for model, arm, kind in costs:
        arms = {other for _, other, _ in costs} if kind in SHARED_KINDS else {arm}
        cost = median(cost for other in arms for cost in costs.get((model, other, kind), []))
        seconds.setdefault(model, {}).setdefault(arm, {})[kind] = cost
    return ReferenceTimes(source=source, seconds=seconds)
