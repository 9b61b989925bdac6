"""The tokens of one split: memory-mapped shards, read as one stream."""

from __future__ import annotations

import bisect
import itertools
import mmap
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import open_regular
from data.manifest import Manifest, Shard, load_manifest, shard_remedy

# Windows are gathered in blocks of about this many tokens, and a block is cast to int64 at once. As stored, a block
# stays in the second-level cache, so memory is crossed once, from the page cache to the int64 arrays; and joining
# slices of the maps costs a third of NumPy's slicing and assignment, window by window.
_BLOCK_TOKENS = 64 * 1024


class TokenDataset:
    """The token stream of one split of a token directory.

    Opening maps the shards, which costs no reading, and checks the header and the size of each; `verify` reads all.

    Args:
        directory: a prepared token directory.
        split: "train" or "validation".

    Raises:
        DataError: the directory is not prepared, or a shard is missing, cut or has another header than it should.
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
        self._maps = [_map_shard(self.directory, shard, self._dtype) for shard in shards]
        # Shard j holds the stream's positions [bounds[j], bounds[j+1]).
        self._bounds = list(itertools.accumulate((shard.tokens for shard in shards), initial=0))

    @property
    def tokens(self) -> int:
        """How many tokens the stream has."""
        return self._bounds[-1]

    def read(
        self,
        starts: np.ndarray,  # (b,) positions in the stream
        tokens: np.ndarray,  # (b, T) int64, written: stream[start : start + T] for each start
        targets: np.ndarray,  # (b, T) int64, written: stream[start + 1 : start + 1 + T]
    ) -> None:
        """Copy windows of the stream and their successors, across shard ends where need be.

        Raises:
            DataError: a token is outside of the vocabulary; the message names the shard and the position.
            IndexError: a window does not lie in the stream.
        """
        length = tokens.shape[1] + 1
        places: list[int] = starts.tolist()
        if places and (min(places) < 0 or max(places) + length > self.tokens):
            raise IndexError(f"windows of {length} tokens from {starts} do not lie in a stream of {self.tokens} tokens")
        rows = max(1, _BLOCK_TOKENS // length)
        for first in range(0, len(places), rows):
            chosen = places[first : first + rows]
            block = np.frombuffer(b"".join(self._slices(chosen, length)), self._dtype).reshape(-1, length)
            if block.max() >= self.vocab_size:
                self._refuse(chosen, block)
            tokens[first : first + rows] = block[:, :-1]
            targets[first : first + rows] = block[:, 1:]

    def _slices(self, starts: list[int], length: int) -> list[memoryview]:
        """The stored bytes of windows, one after the other: one slice a window, and more where it crosses shards."""
        maps, bounds, size = self._maps, self._bounds, self._dtype.itemsize
        slices = []
        for start in starts:
            shard = bisect.bisect_right(bounds, start) - 1
            first = (start - bounds[shard]) * size
            slices.append(maps[shard][first : first + length * size])
            rest = start + length - bounds[shard + 1]
            while rest > 0:
                shard += 1
                slices.append(maps[shard][: rest * size])
                rest -= bounds[shard + 1] - bounds[shard]
        return slices

    def _refuse(self, starts: list[int], windows: np.ndarray) -> None:
        row, column = np.argwhere(windows >= self.vocab_size)[0].tolist()
        position = starts[row] + column
        shard = bisect.bisect_right(self._bounds, position) - 1
        raise DataError(
            f"{self.directory / self._names[shard]} is damaged: token {position - self._bounds[shard]} is "
            f"{int(windows[row, column])} and the vocabulary has {self.vocab_size}; {shard_remedy(self.directory)}"
        )


def _map_shard(directory: Path, shard: Shard, dtype: np.dtype[Any]) -> memoryview:
    """Map one shard, read only: the bytes of its tokens."""
    path = directory / shard.file
    try:
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            header_bytes = file.tell()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {shard_remedy(directory)}") from error
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:  # NumPy parses it as Python
        raise DataError(f"{path} is damaged: no NumPy header ({error}); {shard_remedy(directory)}") from error
    if version != (1, 0) or shape != (shard.tokens,) or found != dtype:
        raise DataError(
            f"{path} is damaged: its header says {found} of shape {shape} where the manifest has {dtype} of shape "
            f"({shard.tokens},); {shard_remedy(directory)}"
        )
    expected = header_bytes + shard.tokens * dtype.itemsize
    if len(mapped) != expected:
        raise DataError(f"{path} has {len(mapped)} bytes and should have {expected}; {shard_remedy(directory)}")
    return memoryview(mapped)[header_bytes:]
