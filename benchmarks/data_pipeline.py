"""Data: the speed of preparing a corpus and of reading batches.

    python benchmarks/data_pipeline.py                      the embedded corpus repeated to 200 MB: about five minutes
    python benchmarks/data_pipeline.py --megabytes 50 --repeats 1

Preparation is compared with what most projects do: `datasets.map(num_proc=…)` with tiktoken, then a loop that writes
one document after another into one array. Both start from the same parquet file, end with tokens on disk, take turns
and use the same number of processes. Reading a batch is compared with copying as many bytes from the page cache.
Prints tables and writes them, with the hardware, to results/benchmarks/data.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import page
from benchmarks.record import provenance, write_results
from data import Batch, Batches, FileSource, SampleSource, TokenDataset, TokenizerSpec, prepare
from data.manifest import Manifest, Split, token_dtype
from data.readers import read_documents, segments
from data.shards import ShardWriter, shard_name
from data.tokenizers import gpt2

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "data.json"

PREPARATION_TARGET = 2.0
READING_TARGET = 0.5
STEP_TARGET = 0.01

#: Tokens a second of one rank; no size of GPT-2 trains this fast on one current accelerator.
FAST_RANK = 1_000_000


def repeated_sample(path: Path, megabytes: float) -> None:
    """Write the sample's documents, repeated, as one parquet file laid out like OpenWebText's (1000 rows per group)."""
    documents = [
        text
        for file in SampleSource().fetch(lambda _: None).files
        for segment in segments(file, "text", 1 << 30)
        for text in read_documents(segment, "text", lambda _: None)
        if text is not None
    ]
    schema = pa.schema([("text", pa.string())])
    written = 0
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[str] = []
        while written < megabytes * 1e6:
            text = documents[len(rows) % len(documents)] if len(rows) < len(documents) else rows[-len(documents)]
            rows.append(text)
            written += len(text.encode())
        for first in range(0, len(rows), 1000):
            writer.write_table(pa.table({"text": rows[first : first + 1000]}, schema=schema))


# Preparation


def prepare_plainly(corpus: Path, directory: Path, processes: int) -> int:
    """Prepare the usual way: map over the dataset, then write one document after another. Return the token count."""
    import datasets

    datasets.disable_progress_bars()
    encoding = gpt2()._encoding
    end_of_text = gpt2().end_of_text

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(row["text"])
        ids.append(end_of_text)
        return {"ids": ids, "length": len(ids)}

    loaded = datasets.load_dataset("parquet", data_files=str(corpus), split="train", cache_dir=str(directory / "cache"))
    encoded = loaded.map(encode, remove_columns=["text"], num_proc=processes, load_from_cache_file=False)
    total = sum(encoded["length"])
    tokens = np.memmap(directory / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    place = 0
    for row in encoded:
        tokens[place : place + row["length"]] = row["ids"]
        place += row["length"]
    tokens.flush()
    return total


def prepare_here(corpus: Path, directory: Path, processes: int) -> int:
    manifest = prepare(FileSource(paths=[str(corpus)]), TokenizerSpec(), directory / "tokens", workers=processes)
    return sum(split.tokens for split in manifest.splits.values())


class PeakMemory:
    """The sampled peak memory of all child processes together, in bytes."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                total = 0
                for child in psutil.Process().children(recursive=True):
                    try:
                        total += child.memory_full_info().uss
                    except psutil.Error:
                        continue
                self.peak = max(self.peak, total)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def measure_preparation(root: Path, megabytes: float, repeats: int, processes: int) -> dict[str, Any]:
    corpus = root / "corpus.parquet"
    repeated_sample(corpus, megabytes)
    seconds: dict[str, list[float]] = {"plain": [], "here": []}
    tokens = {}
    for number in range(repeats):
        for name, run in (("plain", prepare_plainly), ("here", prepare_here)):
            directory = root / f"{name}-{number}"
            directory.mkdir()
            began = time.perf_counter()
            tokens[name] = run(corpus, directory, processes)
            seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(directory)
    if len(set(tokens.values())) != 1:
        raise AssertionError(f"the two ways gave different numbers of tokens: {tokens}")
    rates = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    peaks = {}
    for share in (0.25, 1.0):
        part = root / f"part-{share}.parquet"
        repeated_sample(part, share * megabytes)
        memory = PeakMemory()
        with memory.watched():
            prepare_here(part, root / f"memory-{share}", processes)
        peaks[f"{share * megabytes:.0f} MB"] = memory.peak
    return {
        "megabytes": megabytes,
        "processes": processes,
        "tokens": tokens["here"],
        "seconds": seconds,
        "tokens_per_second": rates,
        "ratio": rates["here"] / rates["plain"],
        "target": PREPARATION_TARGET,
        "workers_peak_bytes": peaks,
    }


# Reading


def random_tokens(directory: Path, tokens: int) -> TokenDataset:
    """A token directory of ten shards in the page cache."""
    generator = np.random.default_rng(0)
    vocab_size = gpt2().vocab_size
    shards = []
    directory.mkdir()
    for number in range(10):
        with ShardWriter(directory / shard_name("train", number), token_dtype(vocab_size)) as writer:
            writer.append(generator.integers(0, vocab_size, tokens // 10, dtype=np.uint16), documents=1)
        assert writer.shard is not None
        shards.append(writer.shard)
    manifest = Manifest(
        {"kind": "random"}, {"rule": "none"}, gpt2().info, {"train": Split(tuple(shards)), "validation": Split(())}
    )
    manifest.write(directory)
    return TokenDataset(directory, "train")


def median_seconds(run: Callable[[int], object], repeats: int) -> float:
    times = []
    for number in range(1, repeats + 1):
        began = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_reading(root: Path, tokens: int) -> list[dict[str, Any]]:
    """Time batches at random places of a split far larger than any CPU cache, against memcpy of a mapped file."""
    dataset = random_tokens(root / "random", tokens)
    file = root / "copied"
    file.write_bytes(np.random.default_rng(0).bytes(256 << 20))
    source = np.memmap(file, np.uint8, "r").view(np.ndarray)
    source.sum()  # map its pages
    rows = []
    for batch_size, length in ((480, 1024), (64, 1024), (16, 512), (32, 256)):
        batches = Batches(dataset, 0, batch_size, length)
        shape = (batch_size, length)
        kept = Batch(np.ones(shape, np.int64), np.ones(shape, np.int64), np.arange(batch_size))
        size = kept.tokens.nbytes + kept.targets.nbytes
        target = np.ones(size, np.uint8)
        places = np.random.default_rng(0).integers(0, source.size - size, 10_000)
        repeats = max(30, min(1000, (1 << 30) // size))

        def copy(number: int, target: np.ndarray = target, places: np.ndarray = places, size: int = size) -> None:
            place = places[number % places.size]
            np.copyto(target, source[place : place + size])

        def read(number: int, batches: Batches = batches, kept: Batch = kept) -> None:
            batches.at(number, out=kept)

        for number in range(1, 4):
            read(number)
            copy(number)
        reading, copying = [], []
        for _ in range(5):  # take turns
            reading.append(median_seconds(read, repeats))
            copying.append(median_seconds(copy, repeats))
        seconds = statistics.median(reading)
        rows.append(
            {
                "batch_size": batch_size,
                "sequence_length": length,
                "seconds": seconds,
                "bytes_per_second": size / seconds,
                "memcpy_bytes_per_second": size / statistics.median(copying),
                "ratio": statistics.median(copying) / seconds,
                "target": READING_TARGET,
                "share_of_step": seconds * FAST_RANK / (batch_size * length),
                "share_target": STEP_TARGET,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200.0, help="size of the corpus")
    parser.add_argument("--repeats", type=int, default=2, help="preparations per method")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--read-tokens", type=int, default=200_000_000, help="size of the split to read")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as root:
        results: dict[str, Any] = {
            **provenance(torch.device("cpu")),
            "reading": measure_reading(Path(root), arguments.read_tokens),
            "preparation": measure_preparation(Path(root), arguments.megabytes, arguments.repeats, arguments.processes),
        }
    print("\n".join(page.data(results)))
    write_results(arguments.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
