"""Durable files: written beside their place, synced, renamed.

A reader sees the old file or the new one, never a half of one.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

from data.errors import DataError


@contextmanager
def written_beside(path: Path) -> Iterator[BufferedRandom]:
    """Open `<path>.<process id>.partial` for writing and reading; on a clean exit sync it and rename it to `path`.

    On an exception nothing appears at `path` and the partial file is removed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed process with this number
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


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory durable (some network filesystems refuse: they are durable or nothing is).

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
    """What lies in a directory, each with whether its name is one of `own`; sorted.

    Args:
        own: patterns of names, each with that of the names in a directory of such a name, or None where anything may
            lie in it; directories with a pattern are looked into.
    """
    found = []
    for path in sorted(directory.iterdir()):
        patterns = [inside for name, inside in own.items() if re.fullmatch(name, path.name)]
        found.append((path, bool(patterns)))
        if any(patterns) and path.is_dir() and not path.is_symlink():
            found += [(member, bool(re.fullmatch(str(patterns[0]), member.name))) for member in sorted(path.iterdir())]
    return found


def cannot_use(error: OSError, path: Path) -> DataError:
    """The error for what may not be read or written, or whose disk is broken, at or below `path`."""
    return DataError(f"{error.filename or path}: {error.strerror or error}; check the path and its permissions")


def cannot_write(error: OSError, directory: Path) -> DataError:
    """The error for a disk that is full, read-only or gone while `directory` was being written."""
    return DataError(
        f"{error.filename or directory} cannot be written: {error.strerror or error}; make room or correct the "
        "permissions and run the same command again: what was finished is kept"
    )


def canonical_json(content: Any) -> bytes:
    """The one byte string for a JSON value: sorted keys, no spaces, UTF-8. Hashes are taken of it."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_json(path: Path, content: Any) -> None:
    with written_beside(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
