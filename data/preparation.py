"""Preparation: a source and a tokenizer → a token directory, once.

Parallel over processes, in memory that does not grow with the corpus, and safe to kill at any moment: the work is cut
into units (data/plan.py), a worker writes a unit's shards beside their place, renames them and leaves a receipt; the
next run keeps every unit whose receipt still fits and makes the rest. The manifest comes last.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import cannot_write, write_json
from data.manifest import FORMAT, MANIFEST_FILE, SPLITS, Manifest, Shard, Split, load_manifest
from data.plan import Unit, plan_units
from data.progress import Progress
from data.sources import SampleSource, Source
from data.tokenise import RECEIPTS, receipt_path, split_documents
from data.tokenizers import TOKENIZER_FILE, Tokenizer, TokenizerSpec, gpt2, read_bpe, train_bpe

PREPARATION_FILE = "preparation.json"  # what was asked for and with which versions; for people, not hashed
LOCK_FILE = ".lock"

# A tokenizer is trained on this much of the training documents, spread over the whole corpus; merges learnt from more
# text are the same in all but the rarest.
_TRAINING_BYTES = 128 << 20

_STALE = re.compile(r".*\.partial|(train|validation)-\d{5,}\.npy")


def token_directory(root: str | Path, source: Source, tokenizer: TokenizerSpec) -> Path:
    """Where the tokens of a source are kept: `<root>/<source>-<tokenizer>`, such as tokens/sample-gpt2."""
    return Path(root) / f"{source.name}-{tokenizer.label}"


def ensure_prepared(
    root: str | Path, source: Source, tokenizer: TokenizerSpec, *, progress: Progress | None = None
) -> Path:
    """The token directory of a source, for a run that is about to read it. The sample is prepared on first use.

    Several processes may call it at once.

    Raises:
        DataError: the tokens are not there, with the command that makes them; or they were made from something else.
    """
    directory = token_directory(root, source, tokenizer)
    if (directory / MANIFEST_FILE).exists():
        _check_request(directory, load_manifest(directory), source, tokenizer)
        return directory
    if isinstance(source, SampleSource):
        prepare(source, tokenizer, directory, progress=progress)
        return directory
    options = "" if tokenizer.name == "gpt2" else f" tokenizer={tokenizer.name}"
    options += "" if tokenizer.vocab_size is None else f" tokenizer.vocab_size={tokenizer.vocab_size}"
    raise DataError(
        f"{directory} holds no prepared tokens; make them once with: "
        f"python scripts/prepare_data.py {source.overrides}{options}"
    )


def prepare(
    source: Source,
    tokenizer: TokenizerSpec,
    directory: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make a token directory, or go on with one that was interrupted, or return at once if it is complete.

    The result depends on the source's text, its split rule and the tokenizer, and not on `workers` or on
    interruptions. A second preparation of the same directory waits for the first.

    Args:
        source: the corpus (data/sources.py).
        tokenizer: which tokenizer; a "bpe" is trained on the training documents first.
        directory: where to; made if need be.
        workers: processes; as many as there are usable cores by default.
        progress: what to show, nothing by default (data/progress.py).

    Raises:
        DataError: the corpus cannot be used, the directory holds other tokens, or the disk is full; what was done is
            kept for the next call.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least one is needed")
    directory = Path(directory)
    display = progress if progress is not None else Progress()
    if not (directory / MANIFEST_FILE).exists():  # else it may be a read-only copy, with no place for a lock
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _exclusive(directory, display) as lock:
                if not (directory / MANIFEST_FILE).exists():
                    _prepare(source, tokenizer, directory, workers or _usable_cores(), display, lock)
        except OSError as error:
            raise cannot_write(error, directory) from error
        finally:
            display.end()
    manifest = load_manifest(directory)
    _check_request(directory, manifest, source, tokenizer)
    return manifest


def _prepare(source: Source, spec: TokenizerSpec, directory: Path, workers: int, display: Progress, lock: int) -> None:
    (directory / RECEIPTS).mkdir(exist_ok=True)
    corpus = source.fetch(display.message)
    units = plan_units(corpus.files, source.text_column, source.split)
    tokenizer = gpt2() if spec.name == "gpt2" else _trained(source, units, spec, directory, display)
    job = {
        "format": FORMAT,
        "directory": os.fspath(directory.resolve()),
        "text_column": source.text_column,
        "split": source.split.describe(),
        "tokenizer": asdict(tokenizer.info),
    }
    made = {unit.number: _receipt(unit, job) for unit in units}
    missing = [unit for unit in units if made[unit.number] is None]
    total = sum(unit.bytes for unit in units)
    display.begin(total, total - sum(unit.bytes for unit in missing))
    if missing:
        _run_workers(missing, job, min(workers, len(missing)), display, lock)
    manifest = _assemble(corpus.description, source, tokenizer, [_receipt(unit, job) for unit in units])
    _remove_stale(directory, manifest)
    versions = {package: metadata.version(package) for package in ("numpy", "tiktoken", "tokenizers", "pyarrow")}
    write_json(
        directory / PREPARATION_FILE,
        {"request": source.request(), "versions": {"python": platform.python_version(), **versions}},
    )
    manifest.write(directory)
    shutil.rmtree(directory / RECEIPTS, ignore_errors=True)


def _trained(
    source: Source, units: Sequence[Unit], spec: TokenizerSpec, directory: Path, display: Progress
) -> Tokenizer:
    """The trained tokenizer: that of an earlier run if it was made of the same corpus, else a new one."""
    assert spec.vocab_size is not None
    job = {"vocab_size": spec.vocab_size, "text_column": source.text_column, "split": source.split.describe()}
    fingerprint = [unit.fingerprint(job) for unit in units]
    receipt = directory / RECEIPTS / "tokenizer.json"
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        content = json.loads(receipt.read_text(encoding="utf-8"))
        kept = read_bpe(directory / TOKENIZER_FILE)
        if content["fingerprint"] == fingerprint and content["sha256"] == kept.sha256:
            return kept
    total = sum(unit.bytes for unit in units)
    share = min(1.0, _TRAINING_BYTES / total)
    display.message(
        f"training a tokenizer of {spec.vocab_size} ids on about {share * total / 1e6:.1f} MB of the corpus"
    )
    tokenizer = train_bpe(_training_texts(source, units, share), spec.vocab_size, directory)
    write_json(receipt, {"fingerprint": fingerprint, "sha256": tokenizer.sha256})
    return tokenizer


def _training_texts(source: Source, units: Sequence[Unit], share: float) -> Iterator[str]:
    """The first `share` of every unit's training documents, by bytes."""
    for unit in units:
        wanted = share * unit.bytes
        taken = 0
        for split, text in split_documents(unit, source.text_column, source.split, lambda _: None):
            if split == "train":
                yield text
                taken += len(text)
            if share < 1 and taken >= wanted:
                break


def _run_workers(units: Sequence[Unit], job: dict[str, Any], workers: int, display: Progress, lock: int) -> None:
    """Give the units to worker processes, one thread minding each, and stop them all at the first error."""
    pending = iter(sorted(units, key=lambda unit: -unit.bytes))  # large ones first, so that all end together
    mutex = threading.Lock()
    processes: list[subprocess.Popen[str]] = []

    def mind() -> None:
        with mutex:
            process = _start_worker(job, lock)
            processes.append(process)
        with process:
            while True:
                with mutex:
                    unit = next(pending, None)
                if unit is None:
                    return
                _follow(process, unit, display, mutex)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(mind) for _ in range(workers)]):
                future.result()
        except BaseException:
            with mutex:
                pending = iter(())
                for process in processes:
                    process.kill()
            raise


def _start_worker(job: dict[str, Any], lock: int) -> subprocess.Popen[str]:
    root = os.fspath(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        # Inheriting the lock's descriptor, a worker that outlives a killed parent by a moment still holds the lock.
        pass_fds=(lock,),
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
    return process


def _follow(process: subprocess.Popen[str], unit: Unit, display: Progress, mutex: threading.Lock) -> None:
    """Have the worker make one unit, passing on what it reports."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(unit.to_json()) + "\n")
        process.stdin.flush()
    shown = 0
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            raise DataError(message["error"])
        with mutex:
            if "done" in message:
                display.advance(unit.bytes - shown, 0, 0)  # sizes are estimates until a unit is done
                return
            shown += message["bytes"]
            display.advance(message["bytes"], message["tokens"], message["documents"])
    files = ", ".join(dict.fromkeys(segment.path for segment in unit.segments[:3]))
    raise DataError(
        f"a worker {_ending(process.wait())} while it read {files}; what was done is kept: run the same command "
        "again, with fewer workers if memory was short"
    )


def _ending(code: int) -> str:
    if code == -9:
        return "was killed (signal 9, most often for want of memory)"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _receipt(unit: Unit, job: dict[str, Any]) -> dict[str, Shard] | None:
    """What an earlier run made of the unit, by split; None if nothing, or of something else, or if it is damaged."""
    directory = Path(job["directory"])
    try:
        content = json.loads(receipt_path(directory, unit).read_text(encoding="utf-8"))
        if content["fingerprint"] != unit.fingerprint(job):
            return None
        shards = {split: Shard(**content["shards"][split]) for split in SPLITS if content["shards"][split] is not None}
        if any((directory / shard.file).stat().st_size <= shard.tokens for shard in shards.values()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shards


def _assemble(
    description: dict[str, Any], source: Source, tokenizer: Tokenizer, made: Sequence[dict[str, Shard] | None]
) -> Manifest:
    receipts = [shards for shards in made if shards is not None]
    if len(receipts) < len(made):
        raise DataError(
            "the corpus, or a finished shard, changed during the preparation; run the same command again, which makes "
            "what is missing"
        )
    splits = {split: Split(tuple(shards[split] for shards in receipts if split in shards)) for split in SPLITS}
    documents = sum(split.documents for split in splits.values())
    if documents == 0:
        raise DataError(
            "the corpus has no document with text in it; check the files, and data.text_column for .jsonl and .parquet"
        )
    for name, split in splits.items():
        if split.documents == 0:
            raise DataError(
                f"none of the {documents} documents falls to {name} (data.validation.rule={source.split.rule}, "
                f"fraction={source.split.fraction}); change data.validation.fraction or take a larger corpus"
            )
    return Manifest(description, source.split.describe(), tokenizer.info, splits)


def _remove_stale(directory: Path, manifest: Manifest) -> None:
    """Remove what kills and earlier versions of the corpus left behind."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in directory.iterdir():
        if _STALE.fullmatch(path.name) and path.name not in listed:
            path.unlink()


def _check_request(directory: Path, manifest: Manifest, source: Source, tokenizer: TokenizerSpec) -> None:
    """Refuse tokens that were made from another corpus or with another tokenizer than the one asked for."""
    asked: dict[str, Any] = {"tokenizer": tokenizer.name, **source.request()}
    held: dict[str, Any] = {"tokenizer": manifest.tokenizer.name, "split": manifest.split_rule}
    if tokenizer.vocab_size is not None:
        asked["vocab_size"], held["vocab_size"] = tokenizer.vocab_size, manifest.vocab_size
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        held |= json.loads((directory / PREPARATION_FILE).read_text(encoding="utf-8"))["request"]
    different = [key for key in asked if key in held and asked[key] != held[key]]
    if different:
        raise DataError(
            f"{directory} was prepared with "
            + ", ".join(f"{key}={held[key]!r}" for key in different)
            + " and the configuration has "
            + ", ".join(f"{key}={asked[key]!r}" for key in different)
            + "; give the data another name (data.name), or remove the directory and prepare it again"
        )


@contextmanager
def _exclusive(directory: Path, display: Progress) -> Iterator[int]:
    """Hold the directory's lock, waiting for whoever has it; yields its descriptor.

    The kernel releases it with the last process that holds it, so a kill leaves no stale lock.
    """
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not _locked(descriptor, directory):
            if not told:
                display.message(f"another process is preparing {directory}; waiting for it")
                told = True
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, directory: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"{directory} is on a file system without locks ({error.strerror}), on which two preparations could "
            "disturb each other; prepare on a local disk (data.directory) and copy the directory"
        ) from error
    return True


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
