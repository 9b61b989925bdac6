"""Atomic writes and bounded reads.

Files are written to a temporary name, synced and renamed, so a reader sees the old file or the new one, never half of
one. Reads refuse FIFOs, devices, directories and files above a size limit.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import DataError

# This project's files are nested at most ten deep; Python's recursive functions fail near a thousand.
_DEEPEST = 100


@contextmanager
def written_beside(path: Path) -> Iterator[BufferedRandom]:
    """Open `.<name>.<process id>.partial` for writing and reading; on a clean exit, sync it and rename it to `path`.

    On an exception, remove the partial file and leave `path` untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process with the same id
        with BufferedRandom(partial.open("xb+", buffering=0), 1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_directory(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that a reader sees whole or not at all, also after a crash of the machine."""
    with written_beside(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory durable, if its filesystem can (some network filesystems cannot).

    Raises:
        OSError: the disk is full, gone or broken.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def entries(directory: Path, own: Mapping[str, str | None]) -> list[tuple[Path, bool]]:
    """The sorted entries of a directory, each with whether its name matches one of `own`.

    Args:
        own: maps a pattern of names to the pattern of the names inside such a directory, or to None if anything may be
            in it. Directories with an inner pattern are listed too.
    """
    found = []
    for path in sorted(directory.iterdir()):
        patterns = [inside for name, inside in own.items() if re.fullmatch(name, path.name)]
        found.append((path, bool(patterns)))
        if any(patterns) and path.is_dir() and not path.is_symlink():
            found += [(member, bool(re.fullmatch(str(patterns[0]), member.name))) for member in sorted(path.iterdir())]
    return found


def cannot_use(error: OSError, path: Path) -> DataError:
    """The error for something at or below `path` that cannot be accessed."""
    return DataError(f"{error.filename or path}: {error.strerror or error}; check the path and its permissions")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device or a directory.
    """
    return open(path, "rb", opener=_regular)


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # without it, opening a FIFO waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a directory, a FIFO or a device, not a regular file", path)
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, or reading fails.
        ValueError: it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size:,} bytes; the limit is {limit:,}")
        return file.read(limit)


def read_json(path: Path, limit: int) -> Any:
    """The JSON value in a regular file of at most `limit` bytes.

    Raises:
        OSError: as `read_regular`.
        ValueError: it is too large, not UTF-8, not JSON, or nested too deeply for recursive functions.
    """
    content = read_regular(path, limit)
    try:
        values = json.loads(content.decode())
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    check_nesting(values, len(content))
    return values


def check_nesting(value: Any, size: int) -> None:
    """Refuse parsed JSON or YAML of `size` bytes that is nested too deeply or expands through YAML aliases.

    Raises:
        ValueError: it is refused.
    """
    level = [value]
    for _ in range(_DEEPEST):
        members = (m.values() if isinstance(m, dict) else m for m in level if isinstance(m, (dict, list)))
        level = [member for of_one in members for member in of_one]
        if not level:
            return
        if len(level) > size:  # each value has at least one byte
            raise ValueError("its aliases expand to more values than it has bytes")
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def problem(error: ValueError) -> str:
    """What is wrong with a file's content, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key or 'its content'}: {first['msg']}"
    return " ".join(str(error).split())


def why_not_written(error: OSError) -> tuple[str, str]:
    """The reason for a failed write, and its remedy ("" if there is none)."""
    parent = Path(os.fsdecode(error.filename)).parent if isinstance(error.filename, (str, bytes)) else None
    if error.errno == errno.ENOENT and parent is not None and parent.is_dir():  # as in /proc
        return f"{parent} takes no new files", ""
    remedies = {errno.ENOSPC: "free space", errno.EDQUOT: "free space", errno.EFBIG: "raise ulimit -f"}
    remedies |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "correct the permissions")
    return error.strerror or str(error), remedies.get(error.errno or 0, "")


def cannot_write(error: OSError, directory: Path) -> DataError:
    """The error for a failed write to `directory`."""
    reason, remedy = why_not_written(error)
    again = f"{remedy} and rerun the same command to resume"
    return DataError(
        f"{error.filename or directory} cannot be written: {reason}; {again if remedy else 'choose another data.directory='}"
    )


def take_usual_mode(path: Path) -> None:
    """Give a file the permissions of any new file here. safetensors leaves its files to their owner alone."""
    usual = path.with_name(f".{path.name}.partial")
    usual.touch()
    shutil.copymode(usual, path)
    usual.unlink()


def canonical_json(content: Any) -> bytes:
    """The canonical bytes of a JSON value, for hashing: sorted keys, no spaces, UTF-8."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
