from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError
from data.tokenizers import gpt2
from data.workers import Worker
from tests.data.corpora import texts, write_parquet

SPLIT = {"rule": "hash", "fraction": 0.05, "seed": 0}


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def prepare_file(worker: Worker, path: Path, directory: Path) -> list[Any]:
    common = {"text_column": "text", "split": SPLIT, "directory": os.fspath(directory)}
    units = worker.result({"task": "plan", **common, "files": [os.fspath(path)], "smallest_unit": 1 << 20})
    for unit in units:
        tokenizer = asdict(gpt2().info)
        worker.result({"task": "shards", **common, "tokenizer": tokenizer, "unit": unit, "fingerprint": ""})
    return units


def test_a_worker_answers_after_a_refused_request(tmp_path: Path, lock: int) -> None:
    (tmp_path / "units").mkdir()
    bad, good = tmp_path / "bad.txt", write_parquet(tmp_path / "good.parquet", texts(10))
    bad.write_bytes(b"\xff")
    with Worker(lock) as worker:
        with pytest.raises(DataError, match=r"bad\.txt is not UTF-8"):
            prepare_file(worker, bad, tmp_path)
        assert len(prepare_file(worker, good, tmp_path)) == 1


def test_a_parquet_page_that_no_longer_has_its_checksum_is_refused(tmp_path: Path, lock: int) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": texts(300)})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"299. ", b"298. ", 1))
    with Worker(lock) as worker, pytest.raises(DataError, match=r"a\.parquet .*CRC"):
        prepare_file(worker, path, tmp_path)
