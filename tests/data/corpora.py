"""Small corpora for tests, in every format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ["the", "light", "of", "day", "was", "grey", "and", "nobody", "spoke", "é", "中文", "1984"]


def texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Distinct short documents."""
    generator = np.random.default_rng(seed)
    return [
        f"{number}. " + " ".join(WORDS[place] for place in generator.integers(0, len(WORDS), words)) + ".\n"
        for number in range(count)
    ]


def write_parquet(path: Path, documents: Sequence[str | None], rows_per_group: int = 100, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"url": pa.array(range(len(documents))), column: pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_json_lines(path: Path, documents: Sequence[str], key: str = "text") -> Path:
    content = "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_text(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path
