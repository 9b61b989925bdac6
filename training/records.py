"""The run record on disk: what a run writes, and all that analysis needs to read it.

    <run>/config.yaml       the resolved configuration
    <run>/environment.json  versions, git, hardware, hash of the data manifest and of the initial weights
    <run>/metrics.jsonl     one JSON object a line, "kind": "train" | "eval" | "hessian" | "event"
    <run>/summary.json      status, final and best validation loss, totals, the ledger by kind
    <run>/checkpoints/

Importing this module needs neither torch nor Hydra.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import check_nesting, open_regular, problem, read_json, read_regular, write_atomically

Status = Literal["completed", "diverged", "preempted", "failed"]

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# A run's small files have some kilobytes, a study's index a megabyte, the metrics of a million steps 300.
CONFIG_BYTES = 4 << 20
_JSON_BYTES = 256 << 20
_METRICS_BYTES = 4 << 30

# libyaml reads a thousand configurations in a second, the Python parser takes ten.
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecordError(RuntimeError):
    """A run record that is missing, damaged or another run's. The message names the file."""


def checkpoint_name(step: int) -> str:
    """Name a checkpoint's directory in `<run>/checkpoints`, and an export's in `<run>/exports`."""
    return f"step-{step:08d}"


def json_line(values: Mapping[str, Any]) -> str:
    """One strict JSON object; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_json_value(values), separators=(",", ":"), allow_nan=False)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_value(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(member) for member in value]
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, the keys of overrides; lists count as values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Form(BaseModel):
    """What a file must hold to be read; besides it may hold anything."""

    model_config = ConfigDict(strict=True)


# Files of earlier versions lack some of what a run writes.
class Environment(Form):
    started: str | None = None  # ISO 8601, UTC
    slurm_job: str | None = None  # the last one that started or resumed the run; absent in earlier records
    versions: dict[str, Any] = {}
    git: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    world_size: int | None = None
    data_manifest_sha256: str | None = None
    initial_weights_sha256: str | None = None


class _Entry(Form):
    tokens: float
    flops: float
    seconds: float
    count: int


class Summary(Form):
    status: Status
    final_val_loss: float | None = None
    final_val_bits_per_byte: float | None = None
    best_val_loss: float | None = None
    steps: int | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    ledger: dict[str, _Entry] = {}
    peak_memory_bytes: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read."""

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any] | None

    @classmethod
    def open(cls, directory: str | Path) -> "RunRecord":
        """Read the small files of a run record; `metrics()` and `metrics_path` give the rest.

        Raises RecordError if the directory has no config.yaml, or a file cannot be read or is damaged (named).
        """
        root = Path(directory)
        environment = read_object(root / ENVIRONMENT_FILE, Environment)
        return cls(root, read_config(root), environment or {}, read_summary(root))

    @property
    def metrics_path(self) -> Path:
        return self.directory / METRICS_FILE

    def metrics(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl in order, of the given kinds or of all.

        Raises:
            RecordError: the file cannot be read, or a line is no JSON object of a kind and a step (named by number); an
                unfinished last line is left out.
        """
        for number, line in enumerate(io.BytesIO(metrics_content(self.metrics_path)), start=1):
            if not line.endswith(b"\n"):
                return
            values = parse_line(line, self.metrics_path, number)
            if not kinds or values["kind"] in kinds:
                yield values


def find_runs(roots: Iterable[str | Path]) -> list[Path]:
    """Run directories at or below the roots, not in hidden directories; a run directory has a config.yaml and metrics.

    Raises:
        FileNotFoundError: a root does not exist.
    """
    places = [Path(root) for root in roots]
    refuse_no_directory(places)
    found = {
        path.parent
        for root in places
        for path in root.rglob(METRICS_FILE)
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    return sorted(directory for directory in found if os.path.lexists(directory / CONFIG_FILE))


def refuse_no_directory(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError for a path that is not a directory."""
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such directory; give run directories, or directories that hold them")


def find_run_directories(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Of paths such as a shell makes of `runs/*`: the run directories, and what else there is.

    Raises:
        FileNotFoundError: a path does not exist, or none is a run directory.
    """
    runs: list[Path] = []
    others: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such directory; give run directories, for example runs/*")
        (runs if (path / CONFIG_FILE).is_file() else others).append(path)
    if not runs:
        raise FileNotFoundError(
            f"no run record among {', '.join(map(str, others))}; give run directories, for example runs/*"
        )
    return runs, others


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of metrics.jsonl. RecordError if it is no JSON object of a kind and a step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}:{number} is not JSON: {error}; restore the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or type(values.get("step")) is not int:
        raise RecordError(f"{path}:{number} is not an object with a kind and a step; restore the file")
    return values


def read_config(directory: Path) -> dict[str, Any]:
    """The resolved configuration of a run directory. RecordError if there is none, or it is no readable mapping."""
    values = read_mapping(directory / CONFIG_FILE)
    if values is None:
        raise RecordError(
            f"{directory} is not a run record: {CONFIG_FILE} is missing; give a run directory, runs/<name>"
        )
    return values


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading into RecordError. If there is no file, leave the block."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {problem(error)}") from error


def read_mapping(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None without a file. RecordError if it is not a readable mapping."""
    mapping: dict[str, Any] | None = None
    with _reading(path):
        try:
            content = read_regular(path, CONFIG_BYTES)
            values = yaml.load(content, Loader=_YAML_LOADER)
            check_nesting(values, len(content))
        # PyYAML constructs numbers and dates from any text that is tagged as one, and lets errors of all kinds through.
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise RecordError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise RecordError(f"{path} cannot be read: expected a mapping, found {type(values).__name__}")
        mapping = values
    return mapping


def read_summary(directory: Path) -> dict[str, Any] | None:
    """summary.json of a run directory; None for a run that has not ended. RecordError if it is damaged or unreadable."""
    return read_object(directory / SUMMARY_FILE, Summary)


def read_object(path: Path, form: type[Form]) -> dict[str, Any] | None:
    """The JSON object in a file, with all of its keys; None without a file.

    Raises RecordError if it cannot be read, or lacks something of its form.
    """
    values: dict[str, Any] | None = None
    with _reading(path):
        values = read_json(path, _JSON_BYTES)
        form.model_validate(values)
    return values


def require(form: type[Form], values: Any, path: Path | str) -> None:
    """Raise RecordError where the values of a file lack something of its form."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        raise RecordError(f"{path} is damaged: {problem(error)}") from error


def metrics_content(path: Path) -> bytes:
    """The content of a metrics.jsonl; empty without a file. RecordError if it cannot be read."""
    content = b""
    with _reading(path):
        content = read_regular(path, _METRICS_BYTES)
    return content


def sha256_of_start(path: Path, size: int) -> str:
    """The hash of a file's first `size` bytes; of none without a file."""
    digest = hashlib.sha256()
    if path.exists():
        with open_regular(path) as file:
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


class MetricsWriter:
    """Appends lines to metrics.jsonl; each line reaches the operating system immediately, the disk at `sync()`.

    The file is a new one each time: what another process, which takes itself for the run's, still writes to the old one
    is in no record.

    Args:
        directory: the run directory.
        resume_at: the size in bytes of metrics.jsonl at the checkpoint that the run resumes from; what lies beyond is
            cut off and kept aside in metrics.cut-<n>.jsonl. None begins an empty file.
    """

    def __init__(self, directory: Path, resume_at: int | None = None) -> None:
        self.path = directory / METRICS_FILE
        kept = b"" if resume_at is None else self._cut(resume_at)
        write_atomically(self.path, kept)
        self._file = self.path.open("ab", buffering=0)
        self._size = len(kept)
        self._hash = hashlib.sha256(kept)

    def _cut(self, size: int) -> bytes:
        """The lines up to there; those beyond are kept aside."""
        lines = metrics_content(self.path)  # none in a run that was killed before its first
        if len(lines) < size:
            raise RecordError(
                f"{self.path} has {len(lines)} bytes, but the checkpoint was saved at {size}: lines are missing; "
                "restore the file, or start over with overwrite=true"
            )
        if beyond := lines[size:]:
            taken = [p.name for p in self.path.parent.glob("metrics.cut-*.jsonl")]
            number = next(n for n in range(1, len(taken) + 2) if f"metrics.cut-{n}.jsonl" not in taken)
            write_atomically(self.path.with_name(f"metrics.cut-{number}.jsonl"), beyond)
        return lines[:size]

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line, whole or not at all. Raises OSError with the path if the disk is full or gone."""
        content = json_line(values).encode() + b"\n"
        line, before = memoryview(content), self._size
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, f"{self.path} cannot be written: {error.strerror}") from error
        self._size = before + len(content)
        self._hash.update(content)

    @property
    def sha256(self) -> str:
        """Of what has been written so far."""
        return self._hash.hexdigest()

    def sync(self) -> int:
        """Flush to the disk and return the size in bytes.

        Raises:
            OSError: the disk does not take it, or the file at its path is no longer the one that was written.
        """
        os.fsync(self._file.fileno())
        found = self.path.lstat() if self.path.exists() else None
        if not found or found.st_size != self._size or not os.path.samestat(found, os.fstat(self._file.fileno())):
            raise OSError(errno.ESTALE, f"{self.path} was replaced, removed or changed by another process")
        return self._size

    def close(self) -> None:
        self._file.close()


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    write_atomically(directory / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))


def write_environment(directory: Path, environment: Mapping[str, Any]) -> None:
    write_atomically(directory / ENVIRONMENT_FILE, json.dumps(_json_value(environment), indent=2) + "\n")


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    write_atomically(directory / SUMMARY_FILE, json.dumps(_json_value(summary), indent=2) + "\n")
