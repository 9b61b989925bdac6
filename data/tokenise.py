"""One unit of work: its documents → one shard per split and a receipt, or → texts to train a tokenizer on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from data.encoding import DocumentEncoder
from data.files import sync_directory, write_json
from data.manifest import token_dtype
from data.plan import Unit
from data.readers import Advance, read_documents
from data.shards import ShardWriter, shard_name
from data.splits import SplitRule
from data.tokenizers import repaired

RECEIPTS = "units"  # the directory of the finished units' receipts, deleted once the manifest is written

_REPORT_SECONDS = 0.2
_BATCH_CHARACTERS = 1 << 18  # per encoded batch: large enough to amortise NumPy's overhead, small enough for the caches


class Listener(Protocol):
    def reading(self, path: str) -> None:
        """Called before a file is opened."""

    def progress(self, text_bytes: int, tokens: int, documents: int) -> None:
        """Called with the work done since the last call."""


def receipt_path(directory: Path, unit: Unit) -> Path:
    return directory / RECEIPTS / f"{unit.number:05d}.json"


def split_documents(
    unit: Unit, text_column: str, split: SplitRule, advance: Advance, reading: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """The unit's documents in order, each with its split."""
    validation_rows = None if unit.validation_rows is None else set(unit.validation_rows)
    number = 0
    for segment in unit.segments:
        reading(segment.path)
        for text in read_documents(segment, text_column, advance):
            if text is not None:
                validation = split.is_validation(text) if validation_rows is None else number in validation_rows
                yield ("validation" if validation else "train"), text
            number += 1


class _SplitWriter:
    """Encodes the documents of one split in batches and appends them to its shard."""

    def __init__(self, shard: ShardWriter, encoder: DocumentEncoder) -> None:
        self._shard = shard
        self._encoder = encoder
        self._documents: list[str] = []
        self._characters = 0

    def add(self, text: str) -> tuple[int, int]:
        """Add a document; return how many tokens and documents were written."""
        self._documents.append(text)
        self._characters += len(text)
        return self.flush() if self._characters >= _BATCH_CHARACTERS else (0, 0)

    def flush(self) -> tuple[int, int]:
        if not self._documents:
            return 0, 0
        ids = self._encoder.encode(self._documents)
        written = ids.size, len(self._documents)
        self._shard.append(ids, len(self._documents))
        self._documents, self._characters = [], 0
        return written


def make_shards(
    unit: Unit,
    directory: Path,
    text_column: str,
    split: SplitRule,
    encoder: DocumentEncoder,
    fingerprint: str,
    listener: Listener,
) -> None:
    """Tokenise one unit into one shard per split, then write its receipt with the fingerprint."""
    receipt = receipt_path(directory, unit)
    if receipt.exists():  # it vouches for shards that are replaced now
        receipt.unlink()
        sync_directory(receipt.parent)
    dtype = token_dtype(encoder.tokenizer.vocab_size)
    read, tokens, documents, last = 0, 0, 0, time.monotonic()

    def advance(moved: int) -> None:
        nonlocal read
        read += moved

    with (
        ShardWriter(directory / shard_name("train", unit.number), dtype) as train,
        ShardWriter(directory / shard_name("validation", unit.number), dtype) as validation,
    ):
        shards = {"train": train, "validation": validation}
        writers = {name: _SplitWriter(shard, encoder) for name, shard in shards.items()}
        for name, text in split_documents(unit, text_column, split, advance, listener.reading):
            made = writers[name].add(text)
            tokens, documents = tokens + made[0], documents + made[1]
            if time.monotonic() - last > _REPORT_SECONDS:
                listener.progress(read, tokens, documents)
                read, tokens, documents, last = 0, 0, 0, time.monotonic()
        for writer in writers.values():
            made = writer.flush()
            tokens, documents = tokens + made[0], documents + made[1]
        listener.progress(read, tokens, documents)
    made_shards = {name: None if shard.shard is None else asdict(shard.shard) for name, shard in shards.items()}
    write_json(receipt, {"fingerprint": fingerprint, "shards": made_shards})


def training_texts(
    units: Sequence[Unit], text_column: str, split: SplitRule, share: float, reading: Callable[[str], None]
) -> Iterator[str]:
    """The first `share` of every unit's training documents, by bytes."""
    for unit in units:
        taken = 0
        for name, text in split_documents(unit, text_column, split, lambda _: None, reading):
            if name == "train":
                text = repaired(text)
                yield text
                taken += len(text.encode())
            if share < 1 and taken >= share * unit.bytes:
                break
