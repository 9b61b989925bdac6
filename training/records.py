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
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data.files import sync_directory

Status = Literal["completed", "diverged", "preempted", "failed"]

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# libyaml reads a thousand configurations in a second, the Python parser takes ten.
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecordError(RuntimeError):
    """A run record that is missing, damaged or another run's. The message names the file."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old file or the new one, never a part, also after a
    crash of the machine."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.unlink(missing_ok=True)  # of a killed process with this number
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def json_line(values: Mapping[str, Any]) -> str:
    """One strict JSON object; NaN and infinities, which JSON lacks, become null."""
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
            RecordError: the directory has no config.yaml, or a file cannot be parsed (named).
        """
        root = Path(directory)
        config = root / CONFIG_FILE
        if not config.is_file():
            raise RecordError(f"{root} is no run record: {CONFIG_FILE} is missing; give a run directory, runs/<name>")
        try:
            loaded = yaml.load(config.read_text(), Loader=_YAML_LOADER)
        except yaml.YAMLError as error:
            raise RecordError(f"{config} cannot be parsed: {error}") from error
        return cls(root, loaded, _read_json(root / ENVIRONMENT_FILE) or {}, _read_json(root / SUMMARY_FILE))

    @property
    def metrics_path(self) -> Path:
        return self.directory / METRICS_FILE

    def metrics(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl in order, of the given kinds or of all.

        Raises:
            RecordError: a line is no JSON object (named by number); an unfinished last line is left out.
        """
        if not self.metrics_path.exists():
            return
        with self.metrics_path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{self.metrics_path}:{number} is no JSON: {error}") from error
                if not kinds or values.get("kind") in kinds:
                    yield values


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise RecordError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path} holds a {type(values).__name__} where an object is expected")
    return values


class MetricsWriter:
    """Appends lines to metrics.jsonl; each line reaches the operating system at once, the disk at `sync()`.

    The file is a new one each time: what another process, which takes itself for the run's, still writes to the old one
    is in no record.

    Args:
        directory: the run directory.
        resume_at: the size in bytes of metrics.jsonl at the checkpoint that the run resumes from; what lies beyond is
            cut off and kept aside in metrics.cut-<n>.jsonl. None begins an empty file.
    """

    def __init__(self, directory: Path, resume_at: int | None = None) -> None:
        self.path = directory / METRICS_FILE
        write_atomically(self.path, b"" if resume_at is None else self._cut(resume_at))
        self._file = self.path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def _cut(self, size: int) -> bytes:
        """The lines up to there; those beyond are kept aside."""
        lines = self.path.read_bytes() if self.path.exists() else b""  # killed before its first line
        if len(lines) < size:
            raise RecordError(
                f"{self.path} has {len(lines)} bytes, the checkpoint was saved at {size}: lines are missing; "
                "start anew with overwrite=true or restore the file"
            )
        if beyond := lines[size:]:
            taken = [p.name for p in self.path.parent.glob("metrics.cut-*.jsonl")]
            number = next(n for n in range(1, len(taken) + 2) if f"metrics.cut-{n}.jsonl" not in taken)
            write_atomically(self.path.with_name(f"metrics.cut-{number}.jsonl"), beyond)
        return lines[:size]

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line, whole or not at all.

        Raises:
            OSError: the disk is full or gone; the file names itself.
        """
        line = memoryview(json_line(values).encode() + b"\n")
        before = self._size
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, f"{self.path} cannot be written: {error.strerror}") from error
        self._size = os.fstat(self._file.fileno()).st_size

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
