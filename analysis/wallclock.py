"""Wall-clock time of training, from the ledger, and the reference-time model that a shared machine's noise cannot
touch.

Training time is what forward and backward passes, curvature passes, optimizer steps and waiting for data take.
Evaluation, checkpoints and compilation are booked apart: a run that evaluates more often did not train slower.
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
# The same computation under every optimizer, so that one measurement per model serves all arms.
SHARED_KINDS = ("forward_backward", "data")


def training_seconds(run: RecordedRun) -> float:
    """Measured seconds of training: the ledger's training kinds, or the record's total where it has no ledger."""
    ledger = _ledger(run)
    if not ledger:
        return run.total("seconds")
    return float(sum(ledger.get(kind, {}).get("seconds", 0.0) for kind in TRAINING_KINDS))


class _File(Form):
    seconds: dict[str, dict[str, dict[str, float]]]
    source: str


@dataclass(frozen=True)
class ReferenceTimes:
    """Seconds for one occurrence of each kind of work, by model and arm, measured where nothing else ran.

    `seconds[model][arm][kind]`; kinds that do not depend on the optimizer hold the same number in every arm.
    """

    seconds: Mapping[str, Mapping[str, Mapping[str, float]]]
    source: str

    def training_seconds(self, run: RecordedRun, arm: str) -> float | None:
        """What the run's counts cost at the reference times; None where the model, arm or a kind was not measured."""
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
        """Read what `save` has written.

        Raises:
            RecordError: it cannot be read, or is damaged.
        """
        content = read_object(path, _File)
        if content is None:
            raise RecordError(f"{path} is missing")
        return cls(seconds=content["seconds"], source=content["source"])


def reference_times(runs: Iterable[tuple[str, RecordedRun]], source: str) -> ReferenceTimes:
    """Reference times from (arm, run) pairs that had the machine to themselves.

    Within a run the ledger gives the mean cost of a kind; over the runs of a cell the median is taken. Kinds that do
    not depend on the optimizer are taken over the runs of all arms of a model.
    """
    costs: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, run in runs:
        for kind, entry in _ledger(run).items():
            if kind in TRAINING_KINDS and entry.get("count"):
                by_kind = costs.setdefault(run.model, {}).setdefault(arm, {})
                by_kind.setdefault(kind, []).append(entry["seconds"] / entry["count"])
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
