"""Load runs for the analysis, from run directories or from a study's tables.

A thousand run directories of ten thousand lines load in seconds, in bounded memory: pyarrow parses metrics.jsonl column by
column, all eval lines are kept, and train lines are sampled and averaged in bins. A torn last line (the run was killed
while writing) is dropped. Of lines with the same step (the run resumed from an earlier step) the later one counts.
"""

from __future__ import annotations

import io
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray
from pydantic import Field

from analysis import escaping
from analysis.trial_tables import CURVES_FILE, TRIALS_FILE, TrialRow, by_trial
from training.records import CONFIG_FILE, Form, RecordError, RunRecord, metrics_content, parse_line, require
from training.records import flatten as flatten

Currency = Literal["steps", "tokens", "flops", "seconds"]
CURRENCIES: tuple[Currency, ...] = ("steps", "tokens", "flops", "seconds")

_COUNTERS = ("step", "tokens", "flops", "seconds")
_COLUMNS = {
    "train": ("loss", "lr", "grad_norm", "clipped_norm", "tokens_per_second", "unclipped_fraction"),
    "eval": ("val_loss",),
}
_TRAIN_POINTS = 400  # bins of a run's train lines
# Train lines to read per run, several for each bin.
_TRAIN_LINES = 2000
_TRAIN_PREFIXES = (b'{"kind":"train"', b'{"kind": "train"')
_SKIPPED_PREFIXES = (b'{"kind":"hessian"', b'{"kind": "hessian"', b'{"kind":"event"', b'{"kind": "event"')
_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("step", pa.int64()),
        ("clipped_norm", pa.bool_()),
        *((name, pa.float64()) for name in ("tokens", "flops", "seconds", "val_loss", "loss", "lr", "grad_norm")),
        *((name, pa.float64()) for name in ("tokens_per_second", "unclipped_fraction")),
    ]
)


# The parts of a configuration that the analysis needs; it may be from an earlier version.
class _Optimizer(Form):
    name: str
    lr: float | None = None
    betas: list[float] | None = None
    gamma: float | None = None
    hessian_interval: int | None = None


class _Model(Form):
    name: str = ""
    n_layer: int = 0
    n_embd: int = 0


class _Train(Form):
    steps: Annotated[int, Field(gt=0)]


class _Schedule(Form):
    final_ratio: float = 0.0


class _Config(Form):
    name: str | None = None
    seed: int
    optimizer: _Optimizer
    model: _Model
    train: _Train
    schedule: _Schedule = _Schedule()


@dataclass(frozen=True)
class Curve:
    """The lines of one kind of one run, in order of step.

    Each column has shape (n,): the cumulative costs `steps`, `tokens`, `flops` and `seconds`, and `val_loss` (nats) of
    evaluations, or the fields of train lines. A value that was not recorded, or not finite, is NaN.
    """

    columns: dict[str, NDArray[np.float64]]

    @property
    def steps(self) -> NDArray[np.float64]:
        return self["steps"]

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return self.columns[column]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Origin:
    """The source of a run: its directory, or its row in a study's trials.csv."""

    path: Path
    trial: str = ""  # of the row
    line: int = 0

    @property
    def name(self) -> str:
        return self.trial or self.path.name

    def href(self, location: Path) -> str:
        """Return the link from a page in the directory `location`."""
        return escaping.href(self.path, location) + (f"#L{self.line}" if self.line else "")


@dataclass(frozen=True)
class RecordedRun:
    """One run: its record, its evaluations, and its training curve as bin means."""

    origin: Origin
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any] | None
    evaluations: Curve
    training: Curve
    clipped_norm_share: float  # of the train lines that were read; NaN without any
    last_refresh: dict[str, Any] | None  # the last hessian line
    alarms: int  # how often it told that every coordinate had been clipped for more than a refresh interval
    alias: str = ""  # where several of the loaded runs have one name

    @property
    def name(self) -> str:
        return self.alias or str(self.config.get("name") or self.origin.name)

    @property
    def optimizer(self) -> str:
        """The optimizer group's name: "adamw", "lion", "sophiag", …; of an external one, its callable's in lower case."""
        optimizer = self.config["optimizer"]
        factory = str(optimizer.get("factory") or "")
        return factory.rpartition(":")[2].rpartition(".")[2].lower() or str(optimizer["name"])

    @property
    def model(self) -> str:
        return str(self.config["model"].get("name", "model"))

    @property
    def horizon(self) -> int:
        """Steps of the schedule, which decays fully."""
        return int(self.config["train"]["steps"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def status(self) -> str:
        """ "completed", "diverged", "preempted", "failed" or, without a summary, "unfinished"."""
        return "unfinished" if self.summary is None else str(self.summary["status"])

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @cached_property
    def final_val_loss(self) -> float:
        """Validation loss at the end of the schedule, in nats; NaN for a run that did not complete."""
        if not self.completed or len(self.evaluations) == 0:
            return float("nan")
        value = (self.summary or {}).get("final_val_loss")
        return float(value) if value is not None else float(self.evaluations["val_loss"][-1])

    @property
    def bits_per_byte(self) -> float:
        """Final validation loss in bits per byte of text; NaN if the run did not complete, or its record lacks it."""
        value = (self.summary or {}).get("final_val_bits_per_byte") if self.completed else None
        return float("nan") if value is None else float(value)

    def total(self, currency: Currency) -> float:
        """Return the run's total cost: steps, training tokens, model FLOPs (with curvature) or training seconds."""
        if self.summary is not None and self.summary.get(currency) is not None:
            return float(self.summary[currency])
        lines = self.training if len(self.training) else self.evaluations
        return float(lines[currency][-1]) if len(lines) else 0.0

    @property
    def ledger(self) -> dict[str, dict[str, float]]:
        """Tokens, FLOPs, seconds and count by kind of work; empty without a summary."""
        return (self.summary or {}).get("ledger") or {}


def load_runs(directories: Sequence[str | Path]) -> list[RecordedRun]:
    """Load runs as `load_each` does. Raises the RecordError of the first damaged one."""
    runs = []
    for run in load_each(directories):
        if isinstance(run, RecordError):
            raise run
        runs.append(run)
    return runs


def load_each(directories: Sequence[str | Path]) -> list[RecordedRun | RecordError]:
    """Load run directories in the given order; a damaged one yields its RecordError. Runs of one name are named by path.

    Two metrics files are in memory at a time.
    """

    def load(directory: str | Path) -> RecordedRun | RecordError:
        try:
            return load_run(directory)
        except RecordError as error:
            return error

    with ThreadPoolExecutor(2) as pool:  # the parser releases the GIL
        loaded = list(pool.map(load, directories))
    names = Counter(run.name for run in loaded if isinstance(run, RecordedRun))
    return [
        replace(run, alias=str(run.origin.path)) if isinstance(run, RecordedRun) and names[run.name] > 1 else run
        for run in loaded
    ]


def load_run(directory: str | Path) -> RecordedRun:
    """Load one run. RecordError if the directory has no run record, or one of its files is damaged."""
    record = RunRecord.open(directory)
    path = record.metrics_path
    content = metrics_content(path)
    lines, last_refresh = _read_metrics(content, path), last_line(content, path, "hessian")
    alarms = len(re.findall(rb'"event": ?"all_clipped"', content))
    config_place = record.directory / CONFIG_FILE
    return _run(Origin(record.directory), record, lines, last_refresh, alarms, config_place, path)


def runs_of_rows(rows: Sequence[TrialRow], curves: pa.Table, directory: Path) -> dict[str, RecordedRun]:
    """Return the runs in a study's tables by trial, without rows that have no summary.

    Raises RecordError if a configuration lacks what the analysis needs, or the curves of a trial are missing.
    """
    trials, path = directory / TRIALS_FILE, directory / CURVES_FILE
    lines = by_trial(curves)
    runs = {}
    for row in rows:
        if row.summary is None:
            continue
        if row.trial not in lines:
            raise RecordError(f"{path} has no lines of {row.trial}, but {trials} has its row; restore both files")
        own, place = lines[row.trial], f"{trials}:{row.line}"
        origin = Origin(trials, row.trial, row.line)
        alarms = own["event"].to_pylist().count("all_clipped")
        runs[row.trial] = _run(origin, row, own, _last_refresh(own), alarms, place, path)
    return runs


def _run(
    origin: Origin,
    record: RunRecord | TrialRow,
    lines: pa.Table,
    last_refresh: dict[str, Any] | None,
    alarms: int,
    config_place: Path | str,
    lines_place: Path,
) -> RecordedRun:
    config = record.config
    require(_Config, config, config_place)
    if config["optimizer"].get("decay_embeddings") is True:  # as in records from before this key existed
        del config["optimizer"]["decay_embeddings"]
    training = _curve(lines, "train", lines_place)
    clipped = training["clipped_norm"]
    return RecordedRun(
        origin=origin,
        config=config,
        environment=record.environment,
        summary=record.summary,
        evaluations=_curve(lines, "eval", lines_place),
        training=_bin_means(training),
        clipped_norm_share=float(np.nanmean(clipped)) if np.isfinite(clipped).any() else float("nan"),
        last_refresh=last_refresh,
        alarms=alarms,
    )


def _last_refresh(lines: pa.Table) -> dict[str, Any] | None:
    """Return the last hessian line of a trial, assembled from its rows."""
    rows = lines.filter(pc.equal(lines["kind"], "hessian")).to_pylist()
    whole = [row for row in rows if row["parameters"] == "all"]
    if not whole:
        return None
    parts = {row["parameters"]: row for row in rows if row["step"] == whole[-1]["step"] and row["parameters"] != "all"}
    return whole[-1] | {"by_kind": parts}


def _read_metrics(content: bytes, path: Path) -> pa.Table:
    """Parse all eval lines of a metrics.jsonl and about _TRAIN_LINES train lines; absent values are null."""
    lines = content.split(b"\n")
    # A run killed while writing leaves a torn last line without a newline.
    lines.pop()
    is_train = [line.startswith(_TRAIN_PREFIXES) for line in lines]
    train = list(itertools.compress(lines, is_train))
    # Lines with another beginning are parsed and filtered by kind.
    rest = itertools.compress(lines, map(operator.not_, is_train))
    others = [line for line in rest if line and not line.startswith(_SKIPPED_PREFIXES)]
    chosen = b"\n".join((*others, *train[:: unaligned_stride(len(train), _TRAIN_LINES)], b""))
    if not chosen.strip():
        return _SCHEMA.empty_table()
    try:
        return pa.json.read_json(
            pa.BufferReader(chosen),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=1 << 22),
            parse_options=pa.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        # NaN and Infinity, which Python writes but JSON lacks, and numbers instead of flags.
        return _read_leniently(content[: content.rfind(b"\n") + 1], path)


def unaligned_stride(count: int, limit: int) -> int:
    """Return the smallest stride that keeps at most `limit` of `count` lines and does not align with refreshes of h."""
    stride = max(1, -(-count // limit))
    while math.gcd(stride, 10) > 1:
        stride += 1
    return stride


def last_line(content: bytes, path: Path, kind: str) -> dict[str, Any] | None:
    """Return the last complete line of a kind in a metrics.jsonl, without parsing the others. RecordError if damaged."""
    content = content[: content.rfind(b"\n") + 1]
    at = max(content.rfind(f'{{"kind":{space}"{kind}"'.encode()) for space in ("", " "))
    if at < 0:
        return None
    return parse_line(content[at : content.index(b"\n", at)], path, content.count(b"\n", 0, at) + 1)


def _read_leniently(content: bytes, path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(io.BytesIO(content), start=1):
        if not line.strip():
            continue
        row = {name: value for name, value in parse_line(line, path, number).items() if name in _SCHEMA.names}
        for name, value in row.items():
            if name != "kind" and not isinstance(value, (int, float, type(None))):
                raise RecordError(f"{path}:{number}: {name} is {value!r:.40}, expected a number")
        if row.get("clipped_norm") is not None:
            row["clipped_norm"] = bool(row["clipped_norm"])
        rows.append(row)
    try:
        return pa.Table.from_pylist(rows, schema=_SCHEMA)
    except (pa.ArrowException, OverflowError) as error:
        raise RecordError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _curve(table: pa.Table, kind: str, path: Path) -> Curve:
    lines = table.filter(pc.equal(table["kind"], kind))
    if missing := [name for name in _COUNTERS if lines[name].null_count]:
        raise RecordError(f"{path} is damaged: a line of kind {kind!r} has no {missing[0]}")
    columns = {}
    for name in (*_COUNTERS, *_COLUMNS[kind]):
        values = pc.cast(lines[name], pa.float64()).to_numpy()
        columns["steps" if name == "step" else name] = np.where(np.isinf(values), np.nan, values)
    if np.any(np.diff(columns["steps"]) <= 0):
        # A resumed run may write a step again; the later line counts. Sort by step.
        _, last_from_behind = np.unique(columns["steps"][::-1], return_index=True)
        columns = {name: values[::-1][last_from_behind] for name, values in columns.items()}
    return Curve(columns)


def _bin_means(curve: Curve) -> Curve:
    """Average over bins with equal numbers of lines; counters take the last value of a bin."""
    n = len(curve)
    if n <= _TRAIN_POINTS:
        return curve
    edges = np.linspace(0, n, _TRAIN_POINTS + 1).astype(np.int64)
    starts, lasts = edges[:-1], edges[1:] - 1

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # a bin without values has no mean
            count = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
            return np.asarray(np.add.reduceat(np.nan_to_num(values), starts) / count)

    return Curve(
        {name: values[lasts] if name in CURRENCIES else mean(values) for name, values in curve.columns.items()}
    )
