"""The run record on disk: what a run writes, and the functions that analysis needs to read it.

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

from data.files import check_nesting, open_regular, problem, read_json, read_regular, sync_directory

Status = Literal["completed", "diverged", "preempted", "failed"]

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# A run's small files take kilobytes, a study's index a megabyte, the metrics of a million steps 300 MB.
CONFIG_BYTES = 4 << 20
_JSON_BYTES = 256 << 20
_METRICS_BYTES = 4 << 30

# libyaml reads a thousand configurations in a second, the Python parser takes ten.
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecordError(RuntimeError):
    """A run record is missing, damaged or belongs to another run. The message names the file."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary file, flush it to disk and rename it: even after a crash of the machine, a reader sees the old
    file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.unlink(missing_ok=True)  # left by a killed process with the same pid
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def json_line(values: Mapping[str, Any]) -> str:
    """Format strict JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(
        {key: _json_value(value) for key, value in values.items()}, separators=(",", ":"), allow_nan=False
    )


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_value(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(member) for member in value]
    return value


class Form(BaseModel):
    """The keys that a file must hold; it may hold others as well."""

    model_config = ConfigDict(strict=True)


# Files of earlier versions lack some of what a run writes.
class _Environment(Form):
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


class _Summary(Form):
    status: Status
    final_val_loss: float | None = None
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

        Raises:
            RecordError: the directory has no config.yaml, or a file cannot be read or is damaged (named).
        """
        root = Path(directory)
        environment = read_object(root / ENVIRONMENT_FILE, _Environment)
        return cls(root, read_config(root), environment or {}, read_summary(root))

    @property
    def metrics_path(self) -> Path:
        return self.directory / METRICS_FILE

    def metrics(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl in order, of the given kinds or all. An unfinished last line is skipped.

        Raises:
            RecordError: the file cannot be read, or a line is not a JSON object with a kind and a step (the message has
                its number).
        """
        for number, line in enumerate(io.BytesIO(metrics_content(self.metrics_path)), start=1):
            if not line.endswith(b"\n"):
                return
            values = parse_line(line, self.metrics_path, number)
            if not kinds or values["kind"] in kinds:
                yield values


def find_runs(roots: Iterable[str | Path]) -> list[Path]:
    """Return the run directories (those with config.yaml and metrics) at or anywhere below the roots, sorted.

    Raises:
        FileNotFoundError: a root does not exist.
    """
    found: set[Path] = set()
    places = [Path(root) for root in roots]
    refuse_no_directory(places)
    for root in places:
        found.update(path.parent for path in root.rglob(METRICS_FILE) if os.path.lexists(path.parent / CONFIG_FILE))
    return sorted(found)


def refuse_no_directory(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError for a path that is not a directory."""
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such directory; give run directories, or directories that hold them")


def find_run_directories(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Split paths, such as a shell's expansion of `runs/*`, into run directories and others.

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
    """Parse a line of metrics.jsonl.

    Raises:
        RecordError: it is not a JSON object with a kind and a step.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}:{number} is not JSON: {error}; restore the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or type(values.get("step")) is not int:
        raise RecordError(f"{path}:{number} is not an object with a kind and a step; restore the file")
    return values


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run directory.

    Raises:
        RecordError: the file is missing, cannot be read, or is not a mapping.
    """
    path = directory / CONFIG_FILE
    try:
        content = read_regular(path, CONFIG_BYTES)
        values = yaml.load(content, Loader=_YAML_LOADER)
        check_nesting(values, len(content))
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(
            f"{directory} is not a run record: {CONFIG_FILE} is missing; give a run directory, runs/<name>"
        ) from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    # PyYAML constructs numbers and dates from any text tagged as one, and lets all kinds of errors through.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path} cannot be read: expected a mapping, found {type(values).__name__}")
    return values


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return summary.json of a run directory; None if the run has not ended.

    Raises:
        RecordError: it cannot be read, or is damaged.
    """
    return read_object(directory / SUMMARY_FILE, _Summary)


def read_object(path: Path, form: type[Form]) -> dict[str, Any] | None:
    """Return the JSON object in a file, with all of its keys; None if there is no file.

    Raises:
        RecordError: it cannot be read, or does not match its form.
    """
    try:
        values: dict[str, Any] = read_json(path, _JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {problem(error)}") from error
    require(form, values, path)
    return values


def require(form: type[Form], values: Any, path: Path) -> None:
    """Raise RecordError if the values of a file do not match its form."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        raise RecordError(f"{path} is damaged: {problem(error)}") from error


def metrics_content(path: Path) -> bytes:
    """Return the content of a metrics.jsonl; empty if there is no file.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        return read_regular(path, _METRICS_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {problem(error)}") from error


def sha256_of_start(path: Path, size: int) -> str:
    """Return the hash of a file's first `size` bytes; of no bytes if there is no file."""
    digest = hashlib.sha256()
    if path.exists():
        with open_regular(path) as file:
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


class MetricsWriter:
    """Appends lines to metrics.jsonl; each line reaches the operating system immediately, the disk at `sync()`.

    Each writer creates a new file, so that a stale process of the same run writes to the old one, outside the record.

    Args:
        directory: the run directory.
        resume_at: size in bytes of metrics.jsonl at the checkpoint from which the run resumes. Later lines are moved to
            metrics.cut-<n>.jsonl. None starts an empty file.
    """

    def __init__(self, directory: Path, resume_at: int | None = None) -> None:
        self.path = directory / METRICS_FILE
        kept = b"" if resume_at is None else self._cut(resume_at)
        write_atomically(self.path, kept)
        self._file = self.path.open("ab", buffering=0)
        self._size = len(kept)
        self._hash = hashlib.sha256(kept)

    def _cut(self, size: int) -> bytes:
        """Return the first `size` bytes and move the rest to metrics.cut-<n>.jsonl."""
        lines = metrics_content(self.path)  # empty in a run that was killed before its first line
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
        """Append a line, completely or not at all.

        Raises:
            OSError: the disk is full or gone; the message names the file.
        """
        content = json_line(values).encode() + b"\n"
        line, before = memoryview(content), self._size
        try:
            while line:  # a disk that is filling up may accept a part
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, f"{self.path} cannot be written: {error.strerror}") from error
        self._size = before + len(content)
        self._hash.update(content)

    @property
    def sha256(self) -> str:
        """Hash of what has been written so far."""
        return self._hash.hexdigest()

    def sync(self) -> int:
        """Flush to the disk and return the size in bytes.

        Raises:
            OSError: the flush fails, or the file at the path is no longer the one that was written.
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
