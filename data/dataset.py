"""One split's tokens: its shards, read as one stream.

Shards are read, not memory-mapped. If a mapped file shrinks, SIGBUS kills the process; and a page fault holds the GIL,
so a page that comes from the disk would block the training thread.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import open_regular
from data.manifest import Manifest, Shard, load_manifest, shard_remedy

# Windows are gathered in blocks of about this many tokens, and each block is cast to int64 in one go. A stored block fits
# the L2 cache, so data crosses memory once, from the page cache to the int64 arrays.
_BLOCK_TOKENS = 64 * 1024


class TokenDataset:
    """The token stream of one split of a token directory.

    Opening checks the header and the size of each shard without reading its tokens, and keeps the file open. `verify`
    reads everything.

    Args:
        directory: a prepared token directory.
        split: "train" or "validation".

    Raises:
        DataError: the directory is not prepared, or a shard is missing, truncated or has an unexpected header.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory = Path(directory)
        self.split = split
        self.manifest: Manifest = load_manifest(directory)
        self.vocab_size = self.manifest.vocab_size
        if split not in self.manifest.splits:
            raise DataError(f"split {split!r} does not exist; choose one of {', '.join(self.manifest.splits)}")
        shards = self.manifest.splits[split].shards
        self._names = [shard.file for shard in shards]
        self._dtype = self.manifest.dtype
        self._files: list[tuple[int, int]] = []  # per shard: file descriptor, offset of its tokens
        weakref.finalize(self, _close, self._files)
        for shard in shards:
            self._files.append(_open_shard(self.directory, shard, self._dtype))
        # Shard j holds positions [bounds[j], bounds[j+1]) of the stream.
        self._bounds = list(itertools.accumulate((shard.tokens for shard in shards), initial=0))

    @property
    def tokens(self) -> int:
        """Length of the stream in tokens."""
        return self._bounds[-1]

    def read(
        self,
        starts: np.ndarray,  # (b,) positions in the stream
        tokens: np.ndarray,  # (b, T) int64, written: stream[start : start + T] for each start
        targets: np.ndarray,  # (b, T) int64, written: stream[start + 1 : start + 1 + T]
    ) -> None:
        """Copy windows of the stream and their targets; windows may cross shards.

        Raises:
            DataError: a token is outside the vocabulary, or its shard was truncated or became unreadable; the message
                names the shard and the position.
            IndexError: a window lies outside the stream.
        """
        length = tokens.shape[1] + 1
        places: list[int] = starts.tolist()
        if places and (min(places) < 0 or max(places) + length > self.tokens):
            raise IndexError(f"windows of {length} tokens from {starts} lie outside a stream of {self.tokens} tokens")
        rows = max(1, _BLOCK_TOKENS // length)
        for first in range(0, len(places), rows):
            chosen = places[first : first + rows]
            block = np.frombuffer(b"".join(self._stored(chosen, length)), self._dtype).reshape(-1, length)
            if block.max() >= self.vocab_size:
                self._refuse(chosen, block)
            tokens[first : first + rows] = block[:, :-1]
            targets[first : first + rows] = block[:, 1:]

    def _stored(self, starts: list[int], length: int) -> list[bytes]:
        """The stored bytes of the windows: one read per window and shard."""
        files, bounds, size = self._files, self._bounds, self._dtype.itemsize
        parts = []
        for start in starts:
            shard, end = bisect.bisect_right(bounds, start) - 1, start + length
            while start < end:
                descriptor, offset = files[shard]
                position = start - bounds[shard]
                wanted = min(end, bounds[shard + 1]) - start
                try:
                    part = os.pread(descriptor, wanted * size, offset + position * size)
                except OSError as error:
                    raise self._unreadable(shard, position, error.strerror or str(error)) from error
                if len(part) < wanted * size:
                    raise self._unreadable(shard, position + len(part) // size, "the file ends before it")
                parts.append(part)
                start, shard = start + wanted, shard + 1
        return parts

    def _unreadable(self, shard: int, position: int, reason: str) -> DataError:
        path = self.directory / self._names[shard]
        return DataError(f"{path}: token {position} cannot be read: {reason}; {shard_remedy(self.directory)}")

    def _refuse(self, starts: list[int], windows: np.ndarray) -> None:
        row, column = np.argwhere(windows >= self.vocab_size)[0].tolist()
        position = starts[row] + column
        shard = bisect.bisect_right(self._bounds, position) - 1
        raise DataError(
            f"{self.directory / self._names[shard]} is damaged: token {position - self._bounds[shard]} is "
            f"{int(windows[row, column])}, but the vocabulary has {self.vocab_size} ids; "
            f"{shard_remedy(self.directory)}"
        )


def _open_shard(directory: Path, shard: Shard, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Open one shard; return its file descriptor and the offset of its tokens."""
    path = directory / shard.file
    try:
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            header_bytes = file.tell()
            size = os.fstat(file.fileno()).st_size
            descriptor = os.dup(file.fileno())
    except OSError as error:
        remedy = "raise the limit (ulimit -n)" if error.errno == errno.EMFILE else shard_remedy(directory)
        raise DataError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:  # NumPy parses it as Python
        raise DataError(f"{path} is damaged: not a NumPy file ({error}); {shard_remedy(directory)}") from error
    wrong = None
    expected = header_bytes + shard.tokens * dtype.itemsize
    if version != (1, 0) or shape != (shard.tokens,) or found != dtype:
        wrong = (
            f"{path} is damaged: its header says {found} of shape {shape}, the manifest {dtype} of shape "
            f"({shard.tokens},)"
        )
    elif size != expected:
        wrong = f"{path} has {size} bytes instead of {expected}"
    if wrong is not None:
        os.close(descriptor)
        raise DataError(f"{wrong}; {shard_remedy(directory)}")
    return descriptor, header_bytes


def _close(files: Sequence[tuple[int, int]]) -> None:
    for descriptor, _ in files:
        os.close(descriptor)
