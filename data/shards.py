"""Writing shards: NumPy's file format, written as a stream and visible only when complete."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data.files import written_beside
from data.manifest import Shard


class ShardWriter:
    """Writes one shard in constant memory; a context manager.

    On a clean exit the file is synced and renamed to `path`, and `shard` describes it; if no token was appended,
    there is no file and `shard` is None. On an exception nothing appears at `path`.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self.tokens = 0
        self.documents = 0
        self.shard: Shard | None = None
        self._stack = ExitStack()
        self._file: BufferedRandom | None = None

    def append(self, tokens: np.ndarray, documents: int) -> None:
        """Append (n,) token ids, in which `documents` documents end."""
        if self._file is None:
            self._file = self._stack.enter_context(written_beside(self.path))
            self._write_header(self._file)
        self._file.write(tokens.astype(self.dtype).data)
        self.tokens += tokens.size
        self.documents += documents

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or self._file is None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            # NumPy pads the header, so its length does not depend on the token count and it can be rewritten.
            self._file.seek(0)
            self._write_header(self._file)
            self._file.seek(0)
            sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()  # as read back, in the page cache
            self._file.seek(0, os.SEEK_END)
        self.shard = Shard(self.path.name, self.tokens, self.documents, sha256)

    def _write_header(self, file: BufferedRandom) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(file, header)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.npy"
