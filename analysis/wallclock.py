"""Wall-clock time of training from the ledger, and a reference-time model without the noise of a shared machine.

Training time is the time of forward and backward passes, curvature passes, optimizer steps and waiting for data.
Evaluation, checkpoints and compilation are separate: a run that evaluates more often did not train more slowly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from analysis.runs import RecordedRun
from data.files import write_atomically
from training.records import Form, RecordError, read_object

TRAINING_KINDS = ("forward_backward", "curvature", "optimizer", "data")
# The same computation under every optimizer: one measurement per model serves all arms.
SHARED_KINDS = ("forward_backward", "data")


def training_seconds(run: RecordedRun) -> float:
    """Return the measured seconds of training: the ledger's training kinds, or the record's total without a ledger."""
    ledger = _ledger(run)
    if not ledger:
        return run.total("seconds")
    return float(sum(ledger.get(kind, {}).get("seconds", 0.0) for kind in TRAINING_KINDS))


def seconds_per_occurrence(run: RecordedRun, kind: str) -> float | None:
    """Return the mean measured seconds of one occurrence of a kind of work; None without any."""
    entry = _ledger(run).get(kind, {})
    return float(entry["seconds"]) / entry["count"] if entry.get("count") else None


class _File(Form):
    seconds: dict[str, dict[str, dict[str, float]]]
    source: str


@dataclass(frozen=True)
class ReferenceTimes:
    """Seconds for one occurrence of each kind of work, by model and arm, measured on an idle machine.

    `seconds[model][arm][kind]`; kinds that do not depend on the optimizer have the same number in every arm.
    """

    seconds: Mapping[str, Mapping[str, Mapping[str, float]]]
    source: str

    def training_seconds(self, run: RecordedRun, arm: str) -> float | None:
        """Return the run's counts times the reference times; None if the model, arm or a kind was not measured."""
        costs = self.seconds.get(run.model, {}).get(arm)
        ledger = _ledger(run)
        if costs is None or not ledger:
            return None
        total = 0.0
        for kind in TRAINING_KINDS:
            count = ledger.get(kind, {}).get("count", 0)
            if count and kind not in costs:
                return None
            total += count * costs.get(kind, 0.0)
        return total

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps({"source": self.source, "seconds": self.seconds}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ReferenceTimes:
        """Read a file written by `save`.

        Raises:
            RecordError: it cannot be read or is damaged.
        """
        content = read_object(path, _File)
        if content is None:
            raise RecordError(f"{path} is missing")
        return cls(seconds=content["seconds"], source=content["source"])


def reference_times(runs: Iterable[tuple[str, RecordedRun]], source: str) -> ReferenceTimes:
    """Return reference times from (arm, run) pairs measured on an idle machine.

    A run's ledger gives the mean cost of each kind; the result is the median over the runs of a cell, or over all arms
    of a model for kinds that do not depend on the optimizer.
    """
    costs: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, run in runs:
        for kind in TRAINING_KINDS:
            if (cost := seconds_per_occurrence(run, kind)) is not None:
                costs.setdefault(run.model, {}).setdefault(arm, {}).setdefault(kind, []).append(cost)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for model, arms in costs.items():
        shared = {
            kind: median(cost for by_kind in arms.values() for cost in by_kind.get(kind, []))
            for kind in SHARED_KINDS
            if any(kind in by_kind for by_kind in arms.values())
        }
        result[model] = {
            arm: {kind: shared.get(kind, median(values)) for kind, values in by_kind.items()}
            for arm, by_kind in arms.items()
        }
    return ReferenceTimes(result, source)


def _ledger(run: RecordedRun) -> dict[str, dict[str, Any]]:
    summary = run.summary or {}
    ledger: dict[str, dict[str, Any]] = summary.get("ledger") or {}
    return ledger
