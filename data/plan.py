"""A corpus's files → units of work; each unit makes one shard per split.

The plan depends only on the files and the split rule. So the shards and the order of the tokens do not depend on the
number of workers or on interruptions.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import canonical_json
from data.readers import Segment, segments, text_bytes
from data.splits import SplitRule

# Small enough that a kill loses little work and workers stay busy; large enough that a corpus has at most some 130
# shards per split, since each is an open file in every training process and the usual limit is 1024.
SMALLEST_UNIT = 4 << 20
_UNITS = 128


@dataclass(frozen=True)
class Unit:
    number: int
    segments: tuple[Segment, ...]
    #: Under the rule "nanogpt", the unit's validation documents, counted from 0; else None.
    validation_rows: tuple[int, ...] | None

    @property
    def bytes(self) -> int:
        return sum(segment.bytes for segment in self.segments)

    def fingerprint(self, job: dict[str, Any]) -> str:
        """A hash of everything that determines the unit's shards: if it is unchanged, finished shards are kept."""
        states = [os.stat(segment.path) for segment in self.segments]
        files = [(state.st_size, state.st_mtime_ns) for state in states]
        return hashlib.sha256(canonical_json([job, self.to_json(), files])).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Unit:
        rows = content["validation_rows"]
        return cls(
            content["number"],
            tuple(Segment(**segment) for segment in content["segments"]),
            None if rows is None else tuple(rows),
        )


def plan_units(
    files: Sequence[Path],
    text_column: str,
    split: SplitRule,
    smallest_unit: int,
    reading: Callable[[str], None],
) -> list[Unit]:
    """Cut the files into units of about equal size, in file order; `reading` is called with each file's name.

    Raises:
        DataError: a file cannot be used (data/readers.py), or the split rule needs document counts that the files do
            not have.
    """
    total = 0
    for file in files:
        reading(os.fspath(file))
        total += text_bytes(file, text_column)
    limit = max(smallest_unit, -(-total // _UNITS))
    groups: list[list[Segment]] = [[]]
    for file in files:
        for segment in segments(file, text_column, limit):
            if sum(member.bytes for member in groups[-1]) >= limit:
                groups.append([])
            groups[-1].append(segment)
    rows = _validation_rows(groups, split) if split.rule == "nanogpt" else [None] * len(groups)
    return [Unit(number, tuple(group), chosen) for number, (group, chosen) in enumerate(zip(groups, rows, strict=True))]


def _validation_rows(groups: list[list[Segment]], split: SplitRule) -> list[tuple[int, ...] | None]:
    counts = []
    for group in groups:
        count = 0
        for segment in group:
            if segment.documents is None:
                raise DataError(
                    f"data.validation.rule=nanogpt needs parquet files, which record their number of rows, but "
                    f"{segment.path} is not one; choose data.validation.rule=hash"
                )
            count += segment.documents
        counts.append(count)
    chosen = split.validation_rows(sum(counts))
    starts = np.cumsum([0, *counts])
    return [
        tuple((chosen[(chosen >= start) & (chosen < stop)] - start).tolist())
        for start, stop in itertools.pairwise(starts.tolist())
    ]
