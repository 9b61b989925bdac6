"""What makes a comparison unfair, found in the records: a warning that the reader of a report sees first.

A comparison of optimizers is fair when the runs differ in the optimizer and its own hyper-parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from analysis.records import Run, flatten

# Keys (and all below them) that change nothing that is measured.
INCIDENTAL = (
    *("name", "output_dir", "resume", "overwrite", "tracker", "launcher", "checkpoint", "profile"),
    *("data.directory", "data.local_directory"),
)
# Keys that leave the loss curve alone (contract of determinism) but not the clock.
TIMING = (
    *("strategy", "train.micro_batch_size", "train.compile", "train.deterministic", "train.device"),
    *("eval.micro_batch_size", "environment.hardware"),
)
# What the arms of a comparison are.
OPTIMIZER = ("optimizer",)

Affects = Literal["loss", "seconds"]


@dataclass(frozen=True)
class Difference:
    """A key in which runs differ that should not: its value in each run, by run name."""

    key: str
    values: dict[str, Any]
    affects: Affects

    def __str__(self) -> str:
        runs_of: dict[str, list[str]] = {}
        for run, value in self.values.items():
            runs_of.setdefault(repr(value), []).append(run)
        shown = "; ".join(f"{value} in {_some(runs)}" for value, runs in runs_of.items())
        return f"{self.key}: {shown}"


class UnfairComparisonError(ValueError):
    """The runs differ in more than the optimizer; `differences` says in what."""

    def __init__(self, differences: Sequence[Difference]) -> None:
        self.differences = list(differences)
        listing = "\n".join(f"  {difference}" for difference in differences)
        super().__init__(
            f"these runs differ in more than the optimizer, so no difference between them can be put down to it:\n"
            f"{listing}\nrun the arms with the same values, or ask for a labelled comparison"
        )


def differences(runs: Sequence[Run], *, by_design: Iterable[str] = OPTIMIZER) -> list[Difference]:
    """Keys of configuration and environment in which the runs differ, apart from those that may.

    Args:
        runs: the runs that a comparison sets side by side.
        by_design: keys (with all below them) that the comparison is about, "optimizer" or "train.steps".
    """
    ignored = (*INCIDENTAL, *by_design)
    flattened = {run.name: _comparable_values(run) for run in runs}
    keys = sorted({key for values in flattened.values() for key in values if not _under(key, ignored)})
    found = []
    for key in keys:
        values = {run: flat.get(key) for run, flat in flattened.items()}
        if len({repr(value) for value in values.values()}) > 1:
            found.append(Difference(key, values, "seconds" if _under(key, TIMING) else "loss"))
    return found


def require_fair(runs: Sequence[Run], *, by_design: Iterable[str] = OPTIMIZER) -> None:
    """Raise UnfairComparisonError where `differences` finds any that affect the loss."""
    found = [difference for difference in differences(runs, by_design=by_design) if difference.affects == "loss"]
    if found:
        raise UnfairComparisonError(found)


def _comparable_values(run: Run) -> dict[str, Any]:
    values = flatten(run.config)
    environment = run.record.environment
    for key in ("data_manifest_sha256", "initial_weights_sha256", "hardware"):
        if key in environment:
            entry = environment[key]
            values.update(flatten({f"environment.{key}": entry}))
    return values


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
