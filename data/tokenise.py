"""One unit of work: its documents → a shard a split, and a receipt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.files import write_json
from data.manifest import token_dtype
from data.plan import Unit
from data.readers import read_documents
from data.shards import ShardWriter, shard_name
from data.splits import SplitRule
from data.tokenizers import Tokenizer

RECEIPTS = "units"  # the directory of what each finished unit made, until the manifest is written

_REPORT_SECONDS = 0.2

#: Told what was read and written since the last call: bytes of text, tokens, documents.
Report = Callable[[int, int, int], None]


def receipt_path(directory: Path, unit: Unit) -> Path:
    return directory / RECEIPTS / f"{unit.number:05d}.json"


def split_documents(
    unit: Unit, text_column: str, split: SplitRule, advance: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    """The unit's documents in order, each with its split."""
    validation_rows = None if unit.validation_rows is None else set(unit.validation_rows)
    number = 0
    for segment in unit.segments:
        for text in read_documents(segment, text_column, advance):
            if text is not None:
                validation = split.is_validation(text) if validation_rows is None else number in validation_rows
                yield ("validation" if validation else "train"), text
            number += 1


def make_shards(unit: Unit, job: dict[str, Any], tokenizer: Tokenizer, report: Report) -> None:
    """Tokenise one unit into a shard a split, and then write its receipt."""
    directory = Path(job["directory"])
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
        for split, text in split_documents(unit, job["text_column"], SplitRule(**job["split"]), advance):
            ids = tokenizer.encode(text)
            writers[split].append(ids, tokenizer.end_of_text)
            tokens, documents = tokens + ids.size + 1, documents + 1
            if time.monotonic() - last > _REPORT_SECONDS:
                report(read, tokens, documents)
                read, tokens, documents, last = 0, 0, 0, time.monotonic()
        report(read, tokens, documents)
    receipt = {name: None if writer.shard is None else asdict(writer.shard) for name, writer in writers.items()}
    write_json(receipt_path(directory, unit), {"fingerprint": unit.fingerprint(job), "shards": receipt})
