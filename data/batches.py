"""The training batch of each step, and the fixed validation windows.

A training stream of N tokens has (N - 1) // T windows of T tokens; the targets are the tokens one place later.
Training samples windows without replacement: sequence s = (step - 1) · B + i belongs to epoch s // windows and reads
window permutation(epoch)[s % windows]. A batch is therefore a pure function of (manifest, seed, step, B, T). Resuming
needs only the step, and the number of ranks only decides which rank reads which row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np

from data.dataset import TokenDataset
from data.errors import DataError
from data.permutation import permute

# The permutation is computed for about this many sequences at a time. For one step at a time, NumPy's overhead per call
# would dominate small batches.
_BLOCK_SEQUENCES = 4096

IGNORED_TARGET = -100  # torch's ignore_index: a target that is not predicted


class Batch(NamedTuple):
    tokens: np.ndarray  # (b, T) int64
    targets: np.ndarray  # (b, T) int64; IGNORED_TARGET where there is nothing to predict
    indices: np.ndarray  # (b,) int64, each row's index i in the global batch; -1 for a padding row


class Batches:
    """The training batches of one rank: global sequence i goes to rank i mod W.

    Args:
        dataset: the training split.
        seed: the data seed, 0 ≤ seed < 2^64; determines only the order of the windows.
        global_batch_size: B, in sequences, over all ranks.
        sequence_length: T, in tokens.
        rank, world_size: this rank's number and W.

    Raises:
        DataError: the split has fewer than T + 1 tokens.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seed: int,
        global_batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed}: expected 0 ≤ seed < 2^64")
        if global_batch_size < 1 or sequence_length < 1:
            raise ValueError(
                f"global_batch_size={global_batch_size}, sequence_length={sequence_length}: both must be at least 1"
            )
        _check_rank(rank, world_size)
        self.windows_per_epoch = (dataset.tokens - 1) // sequence_length
        if self.windows_per_epoch < 1:
            raise DataError(
                f"the {dataset.split} split of {dataset.directory} has {dataset.tokens} tokens, but one sequence of "
                f"{sequence_length} needs {sequence_length + 1}; choose a larger corpus or a smaller "
                "train.sequence_length"
            )
        self.dataset = dataset
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.sequence_length = sequence_length
        self._indices = np.arange(rank, global_batch_size, world_size, dtype=np.int64)
        self._block_steps = max(1, _BLOCK_SEQUENCES // global_batch_size)
        self._block: tuple[int, np.ndarray] = (-1, np.empty((0, 0), np.int64))

    def at(self, step: int, out: Batch | None = None) -> Batch:
        """This rank's rows of the batch of update `step` ≥ 1.

        Args:
            out: arrays to write into instead of new ones, e.g. in pinned memory: tokens and targets (b, T) int64.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        if step < 1:
            raise ValueError(f"step={step}: steps are counted from 1")
        block, row = divmod(step - 1, self._block_steps)
        windows = self._windows(block)[row]
        tokens, targets = (out.tokens, out.targets) if out is not None else self._new_arrays()
        self.dataset.read(windows * self.sequence_length, tokens, targets)
        return Batch(tokens, targets, self._indices)

    def _windows(self, block: int) -> np.ndarray:  # (steps of the block, b)
        """This rank's windows for a block of steps. The last block is cached, since steps come in order."""
        number, windows = self._block
        if number == block:
            return windows
        steps = block * self._block_steps + np.arange(self._block_steps, dtype=np.int64)
        sequences = steps[:, None] * self.global_batch_size + self._indices
        epochs = sequences // self.windows_per_epoch
        windows = np.empty_like(sequences)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permute(sequences[here] % self.windows_per_epoch, self.windows_per_epoch, self.seed, epoch)
        self._block = (block, windows)
        return windows

    @contextmanager
    def prefetch(self, first_step: int, last_step: int, depth: int = 2) -> Iterator[Iterator[Batch]]:
        """Give an iterator over the batches of first_step, …, last_step, which a thread reads up to `depth` ahead.

        Reading releases the GIL and so overlaps with the step. An error in the thread is raised by the `next` that would
        have returned the batch.
        """
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least 1")
        steps = iter(range(first_step, last_step + 1))
        with ThreadPoolExecutor(1, "batches") as thread:
            ahead = deque(thread.submit(self.at, step) for step in islice(steps, depth))

            def batches() -> Iterator[Batch]:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(thread.submit(self.at, step) for step in islice(steps, 1))
                    yield batch

            try:
                yield batches()
            finally:
                thread.shutdown(cancel_futures=True)

    def _new_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        shape = (self._indices.size, self.sequence_length)
        return np.empty(shape, np.int64), np.empty(shape, np.int64)


class ValidationWindows:
    """The fixed validation set: the first `tokens_limit` tokens of the split, in order, each predicted once.

    The last window is padded with ignored targets, so no token is left out. All ranks get the same number of batches
    of the same shape, filled with padding rows, so that collectives match and nothing is recompiled. Window w goes to
    rank w mod W.

    Args:
        dataset: the validation split.
        tokens_limit: the most tokens to predict; None for the whole split.
        sequence_length: T, in tokens.

    Raises:
        DataError: the split has fewer than two tokens.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        tokens_limit: int | None,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if tokens_limit is not None and tokens_limit < 1:
            raise ValueError(f"tokens_limit={tokens_limit}: expected at least 1, or None for the whole split")
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length}: expected at least 1")
        _check_rank(rank, world_size)
        if dataset.tokens < 2:
            raise DataError(
                f"the {dataset.split} split of {dataset.directory} has {dataset.tokens} tokens, too few to "
                "evaluate on; prepare the corpus with a larger data.validation.fraction"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.rank = rank
        self.world_size = world_size
        #: Number of predicted tokens, over all ranks.
        self.predictions = dataset.tokens - 1 if tokens_limit is None else min(tokens_limit, dataset.tokens - 1)
        self.windows = -(-self.predictions // sequence_length)

    def forwards(self, batch_size: int) -> int:
        """The number of batches of `batch_size` rows on each rank."""
        return -(-self.windows // (self.world_size * batch_size))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's windows in batches of exactly `batch_size` rows; `indices` are window numbers."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        for number in range(self.forwards(batch_size)):
            first = number * batch_size
            numbers = (first + np.arange(batch_size, dtype=np.int64)) * self.world_size + self.rank
            yield self._batch(np.where(numbers < self.windows, numbers, -1))

    def _batch(self, numbers: np.ndarray) -> Batch:
        length = self.sequence_length
        tokens = np.zeros((numbers.size, length), np.int64)
        targets = np.full((numbers.size, length), IGNORED_TARGET, np.int64)
        full = int(np.count_nonzero((numbers >= 0) & ((numbers + 1) * length <= self.predictions)))
        self.dataset.read(numbers[:full] * length, tokens[:full], targets[:full])
        if full < numbers.size and numbers[full] >= 0:
            start = int(numbers[full]) * length
            rest = self.predictions - start
            self.dataset.read(np.array([start]), tokens[full : full + 1, :rest], targets[full : full + 1, :rest])
        return Batch(tokens, targets, numbers)


def next_batch(batches: Iterator[Batch]) -> tuple[Batch | None, str | None]:
    """The next batch and no error, or None and the error message; (None, None) at the end."""
    try:
        return next(batches, None), None
    except (DataError, OSError) as error:
        return None, str(error)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 ≤ rank < world_size")
