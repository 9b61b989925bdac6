"""A study's trials as two tables; pandas reads each in one line.

    results/<study>/trials.csv        a row per trial: its place in the study, result, configuration and environment
    results/<study>/curves.parquet    a row for each kept line of its metrics

A row of trials.csv is the whole record of a run except its curves. The columns, in order:

    trial, arm, phase, model, horizon, seed   the trial's place in the study
    status, final_val_loss, seconds, …        summary.json
    seconds.<kind>, flops.<kind>, …           its ledger
    optimizer.lr, optimizer.betas[0], …       config.yaml, by the keys of the command line
    environment.git.commit, …                 environment.json

An empty cell means that the record lacks the key, `null` that the key has no value. Floats read back exactly. Text that
would read as another type is in quotation marks.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data.files import problem, read_regular, write_atomically
from training.records import Environment, RecordError, Summary

TRIALS_FILE = "trials.csv"
CURVES_FILE = "curves.parquet"

Phase = Literal["tuning", "reporting", "set aside"]  # set aside: recorded, but no longer in the study file

MISSING = "missing"  # the status of a planned trial that has not finished

_GROUPS = ("study", "summary", "ledger", "config", "environment")  # of columns
_STUDY = ("trial", "arm", "phase", "model", "horizon")
_LEDGER = ("seconds", "flops", "tokens", "count")
# The keys of a configuration without a dot. `name` has a column only if it is not the trial's.
_PLAIN_KEYS = ("name", "seed", "output_dir", "resume", "overwrite")
_PARTS = re.compile(r"[^.\[\]]+|\[\d+\]")
_WORDS: Mapping[str, Any] = {"null": None, "True": True, "False": False}
_LIMIT = 1 << 30  # maximum bytes of a table, a hundred times the size of a thousand trials

_OF_LINE = ("kind", "step", "tokens", "flops", "seconds", "held_back", "decades")  # not of one kind of parameters

CURVES_SCHEMA = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # train, eval, hessian, event
        pa.field("step", pa.int64(), nullable=False),
        ("tokens", pa.int64()),
        *((name, pa.float64()) for name in ("flops", "seconds", "loss", "lr", "grad_norm")),
        ("clipped_norm", pa.bool_()),
        ("tokens_per_second", pa.float64()),
        ("unclipped_fraction", pa.float64()),
        ("skipped", pa.bool_()),
        ("val_loss", pa.float64()),
        ("val_tokens", pa.int64()),
        ("val_bits_per_byte", pa.float64()),
        ("parameters", pa.string()),  # of a hessian row: all, or those of one kind
        *((name, pa.float64()) for name in ("hessian_norm", "momentum_norm", "positive_fraction", "gamma")),
        ("held_back", pa.bool_()),
        ("histogram", pa.list_(pa.int64())),
        ("decades", pa.list_(pa.int64())),
        ("event", pa.string()),
        ("reason", pa.string()),
    ]
)


_LATER = ("val_bits_per_byte",)  # columns that tables of earlier versions lack


@dataclass(frozen=True, config=ConfigDict(strict=True))
class TrialRow:
    """A row of trials.csv. An unfinished trial has no configuration, environment or summary."""

    trial: str
    arm: str
    phase: Phase
    model: str
    horizon: Annotated[int, Field(gt=0)]  # steps
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    line: int = field(default=0, compare=False)  # line number in the file


def checked(row: TrialRow) -> TrialRow:
    """Return the row. RecordError if its record has something that trials.csv cannot represent."""
    if _row({key: _value(_text(value)) for key, value in _cells(row).items()}) != row:
        raise RecordError(f"{row.trial}: {TRIALS_FILE} cannot represent its record, for example a key with a dot")
    return row


def write_trials(directory: Path, rows: Sequence[TrialRow]) -> None:
    """Write trials.csv from `checked` rows."""
    cells = [_cells(row) for row in rows]
    columns = _in_order({name: None for written in cells for name in written})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for written in cells:
        writer.writerow([_text(written[name]) if name in written else "" for name in columns])
    write_atomically(directory / TRIALS_FILE, text.getvalue())


def read_trials(directory: Path) -> list[TrialRow]:
    """Read the rows of trials.csv; none without a file. RecordError, with the line, if it is damaged or unreadable."""
    path = directory / TRIALS_FILE
    content = _read(path)
    if content is None:
        return []
    rows: list[TrialRow] = []
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is damaged: {error}; restore the file") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(lines, [])
        if lacking := [name for name in (*_STUDY, "seed", "status") if name not in columns]:
            raise ValueError(f"it has no column {lacking[0]}")
        if len({*columns}) < len(columns):
            raise ValueError("two columns have the same name")
        for line in lines:
            if len(line) != len(columns):
                raise ValueError(f"{len(line)} cells, expected {len(columns)}")
            cells = {name: _value(text) for name, text in zip(columns, line, strict=True) if text}
            row = _row({"status": "", **cells}, lines.line_num)
            if row.summary is not None:
                Summary.model_validate(row.summary)
                Environment.model_validate(row.environment)
            rows.append(row)
    except csv.Error as error:
        raise RecordError(f"{path}:{lines.line_num} is damaged: {error}; restore the file") from error
    except ValueError as error:
        raise RecordError(f"{path}:{lines.line_num} is damaged: {problem(error)}; restore the file") from error
    if len({row.trial for row in rows}) < len(rows):
        raise RecordError(f"{path} is damaged: a trial has two rows; restore the file")
    return rows


def curves_of(trial: str, lines: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Convert lines of metrics.jsonl to rows of curves.parquet; a hessian line gives one row per kind of parameters.

    Raises RecordError if a value does not have its column's type.
    """
    rows: list[Mapping[str, Any]] = []
    for line in lines:
        parts = {"all": line, **line.get("by_kind", {})} if line["kind"] == "hessian" else {None: line}
        rows += [{**line, **part, "parameters": name, "trial": trial} for name, part in parts.items()]
    try:
        return pa.Table.from_pylist(rows, schema=CURVES_SCHEMA)
    except (pa.ArrowException, OverflowError) as error:
        told = " ".join(str(error).split())
        raise RecordError(f"{trial}: {CURVES_FILE} cannot represent its metrics: {told}") from error


def lines_of(curves: pa.Table) -> Iterator[dict[str, Any]]:
    """Invert `curves_of` for the rows of one trial: yield lines as in metrics.jsonl, with what the table keeps of them."""
    line: dict[str, Any] | None = None
    for row in curves.to_pylist():
        values = {key: value for key, value in row.items() if value is not None and key not in ("trial", "parameters")}
        if row["parameters"] not in (None, "all") and line is not None:
            own = {key: value for key, value in values.items() if key not in _OF_LINE}
            line.setdefault("by_kind", {})[row["parameters"]] = own
            continue
        if line is not None:
            yield line
        line = values
    if line is not None:
        yield line


def write_curves(directory: Path, tables: Sequence[pa.Table]) -> None:
    """Write curves.parquet."""
    content = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), content, compression="zstd", write_page_checksum=True)
    write_atomically(directory / CURVES_FILE, content.getvalue())


def read_curves(directory: Path) -> pa.Table:
    """Read curves.parquet; an empty table without a file. RecordError if it is damaged or unreadable."""
    path = directory / CURVES_FILE
    content = _read(path)
    if content is None:
        return CURVES_SCHEMA.empty_table()
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        for name in _LATER:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), CURVES_SCHEMA.field(name).type))
        return table.select(CURVES_SCHEMA.names).cast(CURVES_SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise RecordError(f"{path} is damaged: {' '.join(str(error).split())}; restore the file") from error


def by_trial(curves: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each trial, in order."""
    found: dict[str, list[pa.Table]] = {}
    stretches = pc.run_end_encode(curves["trial"].combine_chunks())
    start = 0
    for trial, end in zip(stretches.values.to_pylist(), stretches.run_ends.to_pylist(), strict=True):
        found.setdefault(trial, []).append(curves.slice(start, end - start))
        start = end
    return {trial: pa.concat_tables(parts) for trial, parts in found.items()}


def _cells(row: TrialRow) -> dict[str, Any]:
    """Return the values of a row by column."""
    cells: dict[str, Any] = {name: getattr(row, name) for name in _STUDY}
    summary: dict[str, Any] = {"status": MISSING} if row.summary is None else dict(row.summary)
    ledger: dict[str, Any] = summary.pop("ledger", {}) or {}
    cells |= leaves(summary)
    for kind, entry in ledger.items():
        cells |= {f"{what}.{kind}": value for what, value in entry.items()}
    config = {key: value for key, value in row.config.items() if (key, value) != ("name", row.trial)}
    cells |= {"seed": row.seed} | leaves(config)
    return cells | (leaves({"environment": row.environment}) if row.environment else {})


def _row(cells: Mapping[str, Any], line: int = 0) -> TrialRow:
    """Build a row from values by column. ValueError if one is missing or has the wrong type."""
    row = TrialRow(**{name: cells[name] for name in (*_STUDY, "seed") if name in cells}, line=line)
    if cells["status"] == MISSING:
        return row
    parts: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for name, value in cells.items():
        parts[_group(name)][name] = value
    ledger: dict[str, dict[str, Any]] = {}
    for name, value in parts["ledger"].items():
        what, _, kind = name.partition(".")
        ledger.setdefault(kind, {})[what] = value
    return replace(
        row,
        config={"name": row.trial, **_tree(parts["config"])},
        environment=_tree(parts["environment"]).get("environment", {}),
        summary=_tree(parts["summary"]) | ({"ledger": ledger} if ledger else {}),
    )


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the values by column: {"a": {"b": [1, 2]}} -> {"a.b[0]": 1, "a.b[1]": 2}; an empty dict or list is a leaf."""
    if isinstance(tree, Mapping) and (tree or not path):
        members = {f"{path}.{key}" if path else str(key): value for key, value in tree.items()}
    elif isinstance(tree, (list, tuple)) and tree:
        members = {f"{path}[{index}]": value for index, value in enumerate(tree)}
    else:
        return {path: tree}
    return {name: leaf for key, value in members.items() for name, leaf in leaves(value, key).items()}


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `leaves`."""
    root: dict[str | int, Any] = {}
    for path, value in leaves.items():
        *parents, last = (int(part[1:-1]) if part[0] == "[" else part for part in _PARTS.findall(path))
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return {str(key): _listed(value) for key, value in root.items()}


def _listed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    members = {key: _listed(value) for key, value in node.items()}
    if members and all(isinstance(key, int) for key in members):
        return [members[index] for index in sorted(members)]
    return members


def _text(value: Any) -> str:
    """Format a value as the text of a cell."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return repr(value)
    text = str(value)
    if isinstance(value, str) and (not text.isprintable() or not text or text[0] == '"' or _value(text) != text):
        return json.dumps(text)
    return text


def _value(text: str) -> Any:
    """Parse the text of a cell. ValueError if a quotation mark is not closed."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] == '"' or text in ("[]", "{}"):
        return json.loads(text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _in_order(names: Iterable[str]) -> list[str]:
    """Sort columns in the order of the module's docstring, with sections of the configuration together."""
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name in names:
        groups["study" if name == "seed" else _group(name)].append(name)
    sections = list(dict.fromkeys(name.partition(".")[0] for name in groups["config"]))
    groups["config"].sort(key=lambda name: sections.index(name.partition(".")[0]))
    groups["ledger"].sort(key=lambda name: _LEDGER.index(name.partition(".")[0]))
    return [name for group in groups.values() for name in group]


def _group(name: str) -> str:
    """Return what a column is part of."""
    head, _, rest = name.partition(".")
    if name in _STUDY:
        return "study"
    if head in _LEDGER and rest:
        return "ledger"
    if head == "environment" and rest:
        return "environment"
    return "config" if rest or name in _PLAIN_KEYS else "summary"


def _read(path: Path) -> bytes | None:
    try:
        return read_regular(path, _LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {error}") from error
