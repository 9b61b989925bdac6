"""Damaged corpora and token directories: the file is named, finished shards are kept, nothing crashes.

`refuse_all` prepares a corpus with one bad file among good ones; `fuzz_readers` and `fuzz_tokens` change random bytes.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, FileSource, TokenizerSpec, plan, prepare
from data.dataset import TokenDataset
from data.manifest import verify
from data.readers import read_documents, segments
from data.workers import Worker
from tests.data.corpora import texts, write_json_lines, write_parquet, write_text
from tests.data.test_readers import BAD
from tests.data.test_workers import prepare_file
from tests.data.token_directory import write_token_directory
from tests.faults.configurations import drawn

GPT2 = TokenizerSpec("gpt2")
UNIT_BYTES = 50_000  # of text in a shard, so that a small corpus has many


def refuse_all(scratch: Path, names: tuple[str, ...] = tuple(BAD)) -> dict[str, Any]:
    """Prepare a good file with each kind of bad one, then the good ones alone. Returns counts and faults.

    Most bad files are found before any work. The others are found after shards are finished, and those must be kept,
    except the two that hold the end of the good file and the start of the bad one.
    """
    smallest, plan.SMALLEST_UNIT = plan.SMALLEST_UNIT, UNIT_BYTES
    try:
        return _refuse_all(scratch, names)
    finally:
        plan.SMALLEST_UNIT = smallest


def _refuse_all(scratch: Path, names: tuple[str, ...]) -> dict[str, Any]:
    faults, before_work, finished_shards, kept_shards = [], 0, 0, 0
    for name in names:
        root = scratch / name.replace(".", "-")
        root.mkdir()
        write_text(root / "a-good.txt", texts(1200, words=120))
        damage, _ = BAD[name]
        damage(root / name)
        directory = root / "tokens"
        given_files = (str(root / "a-good.txt"), str(root / name))
        try:
            prepare(FileSource(paths=given_files, name="mixed"), GPT2, directory, workers=1)
        except DataError as error:
            if name not in str(error) or "\n" in str(error):
                faults.append(f"{name}: the error does not name it in a line: {error}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
            continue
        else:
            faults.append(f"{name}: prepared as if it were text")
        found = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.npy")}
        manifest = prepare(FileSource(paths=given_files[:1], name="mixed"), GPT2, directory, workers=1)
        verify(directory)
        after = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.npy")}
        finished = {file: made for file, made in found.items() if file in after}  # not what was of the bad file alone
        kept = len(finished.items() & after.items())
        if manifest.splits["train"].tokens == 0 or kept < len(finished) - 2:
            faults.append(f"{name}: {kept} of {len(finished)} finished shards were kept")
        before_work += not found
        finished_shards += len(finished)
        kept_shards += kept
    return {
        "tried": len(names),
        "refused": len(names) - len(faults),
        "before_any_work": before_work,
        "finished_shards": finished_shards,
        "kept_shards": kept_shards,
        "faults": faults,
    }


def refuse_gigabytes(scratch: Path) -> dict[str, Any]:
    """1 GB documents: streamed in plain text, refused by name in formats that would hold them in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    faults = []
    block = b"all work and no play " * 50_000
    for name in ("long.jsonl", "long.jsonl.gz"):
        path = scratch / name
        with path.open("wb") if name.endswith("l") else gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"text": "')
            for _ in range(1 + (1 << 30) // len(block)):
                file.write(block)
            file.write(b'"}\n')
    long = pa.array([(block * (1 + (1 << 30) // len(block))).decode()], pa.large_string())
    pq.write_table(pa.table({"text": long}), scratch / "long.parquet")
    del long
    for name in ("long.jsonl", "long.jsonl.gz", "long.parquet"):
        try:
            _read(scratch / name)
            faults.append(f"{name}: read")
        except DataError as error:
            if name not in str(error) or ".txt" not in str(error):
                faults.append(f"{name}: {error}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
        (scratch / name).unlink()
    path = scratch / "long.txt"
    with path.open("wb") as file:
        for _ in range(1 + (1 << 30) // len(block)):
            file.write(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    characters = sum(
        len(text)
        for part in segments(path, "text", 1 << 40)
        for text in read_documents(part, "text", lambda _: None)
        if text
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if characters != path.stat().st_size or grown > 64:
        faults.append(f"long.txt: {characters} characters of {path.stat().st_size} read, {grown} MiB more memory")
    path.unlink()
    return {"tried": 4, "as_documented": 4 - len(faults), "faults": faults}


def _read(path: Path) -> int:
    """Count a file's documents, reading it as preparation does, in small segments."""
    return sum(
        text is not None and isinstance(text, str)
        for part in segments(path, "text", 500)
        for text in read_documents(part, "text", lambda _: None)
    )


def seeds(scratch: Path) -> dict[str, bytes]:
    """A small good file of each format."""
    documents = texts(12)
    content = b"".join(json.dumps({"text": text, "n": [1, None]}).encode() + b"\n" for text in documents)
    packed = write_json_lines(scratch / "seed.jsonl.gz", documents).read_bytes()
    return {
        "a.txt": "\n\n".join(documents).encode(),
        "a.jsonl": content,
        "a.jsonl.gz": packed,
        "a.txt.xz": lzma.compress("\n\n".join(documents).encode()),
        "a.parquet": write_parquet(scratch / "seed.parquet", [*documents, None], 5).read_bytes(),
    }


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes changed, inserted, removed or truncated; rarely entirely different bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(("flip", "replace", "insert", "delete", "truncate"))):
            case "flip" if start < len(changed):
                changed[start] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                new = draw(st.binary(min_size=1, max_size=8))
                changed[start : start + len(new)] = new
            case "insert":
                changed[start:start] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del changed[start : start + draw(st.integers(1, 40))]
            case "truncate":
                del changed[start:]
    return bytes(changed)


class ParquetReader:
    """Reads parquet in a separate process, as preparation does: some damage ends the process that reads it."""

    def __init__(self, scratch: Path) -> None:
        self._directory = scratch / "prepared"
        (self._directory / "units").mkdir(parents=True)
        self._lock = os.open(scratch / ".lock", os.O_RDWR | os.O_CREAT)
        self._worker = Worker(self._lock)
        self.ended = 0

    def read(self, path: Path) -> None:
        try:
            prepare_file(self._worker, path, self._directory)
        except DataError as error:
            if "a worker" in str(error):
                self._worker.__exit__(None, None, None)
                self._worker = Worker(self._lock)
                self.ended += 1
            raise

    def close(self) -> None:
        self._worker.kill()
        self._worker.__exit__(None, None, None)
        os.close(self._lock)


def fuzz_readers(scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Read `examples` damaged files of all formats: the result is text, or an error that names the file.

    `workers_ended` counts damaged parquet files that ended the child process that opened them. Preparation reports them
    like any other error.
    """
    contents = seeds(scratch)
    counts, faults = Counter[str](), list[str]()
    parquet = ParquetReader(scratch)

    @drawn(examples, number)
    @given(st.data())
    def read(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(contents)))
        path = scratch / name
        path.write_bytes(data.draw(damaged(contents[name])))
        counts["tried"] += 1
        counts[name] += 1
        try:
            parquet.read(path) if name == "a.parquet" else _read(path)
        except DataError as error:
            counts["refused"] += 1
            if str(path) not in str(error):
                faults.append(f"{name}: not named: {error}")
        except Exception as error:
            path.rename(scratch / f"fault-{len(faults)}-{name}")
            faults.append(f"{name}: {type(error).__name__}: {error}")
        else:
            counts["read"] += 1

    read()
    parquet.close()
    return {**counts, "workers_ended": parquet.ended, "faults": faults}


def fuzz_tokens(scratch: Path, examples: int, number: int) -> dict[str, Any]:
    """Open and read a token directory with one damaged file: the result is tokens, or an error that names the file.

    Opening checks headers and sizes. The full check must find every change, including a token changed within the
    vocabulary.
    """
    generator = np.random.default_rng(0)
    pristine = scratch / "tokens"
    write_token_directory(pristine, [generator.integers(0, 50, 90), generator.integers(0, 50, 60)], [np.arange(50)], 50)
    files = sorted(path.name for path in pristine.iterdir())
    contents = {name: (pristine / name).read_bytes() for name in files}
    counts, faults = Counter[str](), list[str]()

    @drawn(examples, number)
    @given(st.data())
    def read(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(files))
        content = data.draw(damaged(contents[name]))
        directory = scratch / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(pristine, directory)
        (directory / name).write_bytes(content)
        counts["tried"] += 1
        try:
            stream = TokenDataset(directory, "train")
            tokens = np.empty((stream.tokens - 8, 8), np.int64)
            stream.read(np.arange(stream.tokens - 8), tokens, np.empty_like(tokens))
        except DataError as error:
            counts["refused"] += 1
            if str(directory) not in str(error):
                faults.append(f"{name}: not named: {error}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
        try:
            verify(directory)
        except DataError:
            counts["found_by_verify"] += 1
        except Exception as error:
            faults.append(f"{name}, verify: {type(error).__name__}: {error}")
        else:
            changed = content != contents[name] and name != "manifest.json"
            if changed:
                faults.append(f"{name}: a change that the full check does not find")

    read()
    return {**counts, "faults": faults}
