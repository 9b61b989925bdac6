"""One unit of work: its documents → a shard a split, and a receipt; or → the texts that a tokenizer is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from data.files import write_json
from data.manifest import token_dtype
from data.plan import Unit
from data.readers import Advance, read_documents
from data.shards import ShardWriter, shard_name
from data.splits import SplitRule
from data.tokenizers import Tokenizer

RECEIPTS = "units"  # the directory of what each finished unit made, until the manifest is written

_REPORT_SECONDS = 0.2


class Listener(Protocol):
    def reading(self, path: str) -> None:
        """A file is about to be opened."""

    def progress(self, text_bytes: int, tokens: int, documents: int) -> None:
        """So much was done since the last call."""


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


def make_shards(
    unit: Unit,
    directory: Path,
    text_column: str,
    split: SplitRule,
    tokenizer: Tokenizer,
    fingerprint: str,
    listener: Listener,
) -> None:
    """Tokenise one unit into a shard a split, and then write its receipt, with the fingerprint in it."""
    dtype = token_dtype(tokenizer.vocab_size)
    read = 0

    def advance(moved: int) -> None:
        nonlocal read
        read += moved

    with (
        ShardWriter(directory / shard_name("train", unit.number), dtype) as train,
        ShardWriter(directory / shard_name("validation", unit.number), dtype) as validation,
    ):
        writers = {"train": train, "validation": validation}
        tokens, documents, last = 0, 0, time.monotonic()
        for name, text in split_documents(unit, text_column, split, advance, listener.reading):
            ids = tokenizer.encode(text)
            writers[name].append(ids, tokenizer.end_of_text)
            tokens, documents = tokens + ids.size + 1, documents + 1
            if time.monotonic() - last > _REPORT_SECONDS:
                listener.progress(read, tokens, documents)
                read, tokens, documents, last = 0, 0, 0, time.monotonic()
        listener.progress(read, tokens, documents)
    shards = {name: None if writer.shard is None else asdict(writer.shard) for name, writer in writers.items()}
    write_json(receipt_path(directory, unit), {"fingerprint": fingerprint, "shards": shards})


def training_texts(
    units: Sequence[Unit], text_column: str, split: SplitRule, share: float, reading: Callable[[str], None]
) -> Iterator[str]:
    """The first `share` of every unit's training documents, by bytes."""
    for unit in units:
        taken = 0
        for name, text in split_documents(unit, text_column, split, lambda _: None, reading):
            if name == "train":
                yield text
                taken += len(text)
            if share < 1 and taken >= share * unit.bytes:
                break
