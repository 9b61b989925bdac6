"""The tokens of one split: memory-mapped shards, read as one stream."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.manifest import Manifest, Shard, load_manifest, shard_remedy

# Windows are gathered in blocks of about this many tokens: as uint16 a block stays in the first-level cache, so that
# memory is crossed once, from the page cache to the int64 arrays. Casting whole blocks, and not each window by itself,
# reads twice as fast (benchmarks/data.py).
_BLOCK_TOKENS = 16 * 1024


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
        if split not in self.manifest.splits:
            raise DataError(f"split {split!r} does not exist; choose one of {', '.join(self.manifest.splits)}")
        shards = self.manifest.splits[split].shards
        self._names = [shard.file for shard in shards]
        self._shards = [_map_shard(self.directory, shard, self.manifest.dtype) for shard in shards]
        # Shard j holds the stream's positions [bounds[j], bounds[j+1]).
        self._bounds = np.concatenate(([0], np.cumsum([shard.tokens for shard in shards], dtype=np.int64)))

    @property
    def tokens(self) -> int:
        """How many tokens the stream has."""
        return int(self._bounds[-1])

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

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
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(f"windows of {length} tokens from {starts} do not lie in a stream of {self.tokens} tokens")
        shards = np.searchsorted(self._bounds, starts, side="right") - 1
        places = list(zip(shards.tolist(), (starts - self._bounds[shards]).tolist(), strict=True))
        rows = max(1, _BLOCK_TOKENS // length)
        block = np.empty((rows, length), dtype=self.manifest.dtype)
        for first in range(0, len(places), rows):
            chosen = places[first : first + rows]
            for row, (shard, offset) in zip(block, chosen, strict=False):
                window = self._shards[shard][offset : offset + length]
                if window.size == length:
                    row[:] = window
                else:
                    self._read_across(shard, offset, row)
            filled = block[: len(chosen)]
            if filled.max() >= self.vocab_size:
                self._refuse(starts[first : first + rows], filled)
            tokens[first : first + rows] = filled[:, :-1]
            targets[first : first + rows] = filled[:, 1:]

    def _read_across(self, shard: int, offset: int, row: np.ndarray) -> None:
        filled = 0
        while filled < row.size:
            piece = self._shards[shard][offset : offset + row.size - filled]
            row[filled : filled + piece.size] = piece
            filled += piece.size
            shard, offset = shard + 1, 0

    def _refuse(self, starts: np.ndarray, windows: np.ndarray) -> None:
        row, column = np.argwhere(windows >= self.vocab_size)[0].tolist()
        position = int(starts[row]) + column
        shard = int(np.searchsorted(self._bounds, position, side="right")) - 1
        raise DataError(
            f"{self.directory / self._names[shard]} is damaged: token {position - int(self._bounds[shard])} is "
            f"{int(windows[row, column])} and the vocabulary has {self.vocab_size}; {shard_remedy(self.directory)}"
        )


def _map_shard(directory: Path, shard: Shard, dtype: np.dtype[Any]) -> np.ndarray:
    """Map one shard, read only: (tokens,) of the given type."""
    path = directory / shard.file
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            header_bytes = file.tell()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {shard_remedy(directory)}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: no NumPy header ({error}); {shard_remedy(directory)}") from error
    if version != (1, 0) or shape != (shard.tokens,) or found != dtype:
        raise DataError(
            f"{path} is damaged: its header says {found} of shape {shape} where the manifest has {dtype} of shape "
            f"({shard.tokens},); {shard_remedy(directory)}"
        )
    expected = header_bytes + shard.tokens * dtype.itemsize
    if len(mapped) != expected:
        raise DataError(f"{path} has {len(mapped)} bytes and should have {expected}; {shard_remedy(directory)}")
    return np.frombuffer(mapped, dtype=dtype, offset=header_bytes)
