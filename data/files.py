"""Durable files: written beside their place, synced, renamed.

A reader sees the old file or the new one, never a half of one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
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
        with BufferedRandom(partial.open("wb+", buffering=0), 1 << 20) as file:
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
