"""Preparation: a source and a tokenizer → a token directory, once.

Preparation runs in parallel, in memory that does not grow with the corpus, and can be killed at any moment. The work is
cut into units (data/plan.py). A worker writes a unit's shards under temporary names, renames them and writes a receipt;
the next run keeps every unit whose receipt still matches and makes the rest. The manifest is written last.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from data import plan
from data.errors import DataError
from data.files import cannot_use, cannot_write, entries, read_json, write_json
from data.manifest import FORMAT, MANIFEST_FILE, SPLITS, Manifest, Shard, Split, TokenizerInfo, load_manifest
from data.progress import Progress
from data.sources import SampleSource, Source
from data.tokenise import RECEIPTS, receipt_path
from data.tokenizers import TOKENIZER_FILE, TokenizerSpec, gpt2, open_tokenizer
from data.workers import Worker, run_requests, usable_cores

PREPARATION_FILE = "preparation.json"  # the request and the versions of the libraries; not hashed
LOCK_FILE = ".lock"

# A tokenizer is trained on this much of the training documents, spread over the corpus; more text would change only the
# rarest merges.
_TRAINING_BYTES = 128 << 20
_RECEIPT_BYTES = 64 << 20

# Preparation deletes what an earlier one left, so it refuses a directory that holds anything but these names.
_SHARD, _PARTIAL = r"(train|validation)-\d{5,}\.npy", r"\.\d+\.partial"
_FILE = rf"{_SHARD}|(manifest|preparation|tokenizer)\.json"
_OWN_NAMES = {
    rf"{_FILE}|\.?({_FILE}){_PARTIAL}|\.lock|\.nfs.+": None,
    RECEIPTS: rf"(\d{{5,}}|tokenizer)\.json|\.?(\d{{5,}}|tokenizer)\.json{_PARTIAL}",
}
_STALE = re.compile(rf"\.?({_FILE}){_PARTIAL}|{_SHARD}")


def token_directory(root: str | Path, source: Source, tokenizer: TokenizerSpec) -> Path:
    """The token directory of a source: `<root>/<source>-<tokenizer>`, such as tokens/sample-gpt2.

    Raises:
        DataError: the source's name would lead out of `root`.
    """
    if Path(source.name).name != source.name or "\0" in source.name:
        raise DataError(f"data.name={source.name!r} is part of a directory name; remove the slashes")
    return Path(root) / f"{source.name}-{tokenizer.label}"


def ensure_prepared(
    root: str | Path, source: Source, tokenizer: TokenizerSpec, *, progress: Progress | None = None
) -> Path:
    """The token directory of a source, checked. The sample is prepared on first use.

    Safe to call from several processes at once.

    Raises:
        DataError: there are no tokens (the message says how to make them), or they do not match the request.
    """
    directory = token_directory(root, source, tokenizer)
    if isinstance(source, SampleSource) and not _is_prepared(directory):
        prepare(source, tokenizer, directory, progress=progress)
        return directory
    refuse_unprepared(directory, source, tokenizer)
    _check_request(directory, load_manifest(directory), source, tokenizer)
    return directory


def refuse_unprepared(directory: Path, source: Source, tokenizer: TokenizerSpec) -> None:
    """Refuse a directory without tokens, except the sample's.

    Raises:
        DataError: names the source's missing file, or says how to make the tokens.
    """
    if _is_prepared(directory) or isinstance(source, SampleSource):
        return
    source.refuse_absent()
    size = "" if tokenizer.vocab_size is None else f" tokenizer.vocab_size={tokenizer.vocab_size}"
    raise DataError(
        f"{directory} holds no prepared tokens; prepare them once with scripts/prepare_data.py, this run's data= and data.* "
        f"overrides, and tokenizer={tokenizer.name}{size}"
    )


def prepare(
    source: Source,
    tokenizer: TokenizerSpec,
    directory: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make a token directory, resume an interrupted one, or return immediately if it is complete.

    The result depends only on the source's text, its split rule and the tokenizer. A second preparation of the same
    directory waits for the first.

    Args:
        source: the corpus (data/sources.py).
        tokenizer: which tokenizer; a "bpe" is trained on the training documents first.
        directory: created if missing.
        workers: number of processes; by default the number of usable cores.
        progress: the display (data/progress.py); by default none.

    Raises:
        DataError: the corpus cannot be used or has changed since it was prepared, the directory holds other tokens, or
            the disk is full; finished work is kept for the next call.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    directory = Path(directory)
    display = progress if progress is not None else Progress()
    if not _is_prepared(directory):  # a complete one may be read-only and cannot be locked
        source.refuse_absent()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _exclusive(directory, display) as lock:
                if not (directory / MANIFEST_FILE).exists():
                    _refuse_foreign(directory)
                    _prepare(source, tokenizer, directory, workers or usable_cores(), display, lock)
        except OSError as error:
            raise cannot_write(error, directory) from error
        finally:
            display.end()
    manifest = load_manifest(directory)
    _check_request(directory, manifest, source, tokenizer)
    _refuse_changed(directory, manifest, source)
    return manifest


def _prepare(source: Source, spec: TokenizerSpec, directory: Path, workers: int, display: Progress, lock: int) -> None:
    (directory / RECEIPTS).mkdir(exist_ok=True)
    corpus = source.fetch(display.message)
    before = _states(corpus.files)
    reading = {"text_column": source.text_column, "split": source.split.describe()}
    common = {**reading, "directory": os.fspath(directory)}
    with Worker(lock) as worker:
        files = [os.fspath(file) for file in corpus.files]
        found = worker.result({"task": "plan", **common, "files": files, "smallest_unit": plan.SMALLEST_UNIT})
        units = [plan.Unit.from_json(unit) for unit in found]
        tokenizer = gpt2().info if spec.name == "gpt2" else _train(worker, units, common, spec, display)
        decisive = {"format": FORMAT, **reading, "tokenizer": tokenizer.sha256}
        fingerprints = [unit.fingerprint(decisive) for unit in units]
        missing = [
            (unit, fingerprint)
            for unit, fingerprint in zip(units, fingerprints, strict=True)
            if _receipt(directory, unit, fingerprint) is None
        ]
        total = sum(unit.bytes for unit in units)
        sizes = [unit.bytes for unit, _ in missing]
        display.begin(total, total - sum(sizes))
        if missing:
            job = {"task": "shards", **common, "tokenizer": asdict(tokenizer)}
            requests = [{**job, "unit": unit.to_json(), "fingerprint": fingerprint} for unit, fingerprint in missing]
            run_requests(requests, sizes, worker, min(workers, len(missing)), lock, display)
    if _states(corpus.files) != before:
        raise DataError(
            "the corpus changed during the preparation; rerun the same command, which tokenises the changed files again"
        )
    made = [_receipt(directory, unit, fingerprint) for unit, fingerprint in zip(units, fingerprints, strict=True)]
    manifest = _assemble(corpus.description, source, tokenizer, made)
    _remove_stale(directory, manifest)
    versions = {package: metadata.version(package) for package in ("numpy", "tiktoken", "tokenizers", "pyarrow")}
    write_json(
        directory / PREPARATION_FILE,
        {"request": source.request(), "versions": {"python": platform.python_version(), **versions}},
    )
    manifest.write(directory)
    shutil.rmtree(directory / RECEIPTS, ignore_errors=True)


def _states(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Return the size and the time of change of files; None for one that is gone."""
    return [(state.st_size, state.st_mtime_ns) if (state := _stat(file)) else None for file in files]


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _is_prepared(directory: Path) -> bool:
    try:
        return (directory / MANIFEST_FILE).exists()
    except OSError as error:
        raise cannot_use(error, directory) from error


def _refuse_foreign(directory: Path) -> None:
    """Refuse a directory that is not an unfinished preparation: it must hold receipts and nothing foreign."""
    found = entries(directory, _OWN_NAMES)
    foreign = [path.relative_to(directory).as_posix() for path, own in found if not own or path.is_symlink()]
    if not (directory / RECEIPTS).is_dir():
        foreign += [path.name for path, own in found if own and path.name != LOCK_FILE]
    if foreign:
        raise DataError(
            f"{directory} is not a token directory: it holds {', '.join(foreign[:3])} and no {MANIFEST_FILE}; set another "
            "data.directory= or data.name=, or move those files"
        )


def _train(
    worker: Worker,
    units: Sequence[plan.Unit],
    common: dict[str, Any],
    spec: TokenizerSpec,
    display: Progress,
) -> TokenizerInfo:
    """Train a tokenizer, or reuse an earlier run's if it was trained on the same corpus."""
    directory = Path(common["directory"])
    fingerprint = [unit.fingerprint({**common, "vocab_size": spec.vocab_size}) for unit in units]
    receipt = directory / RECEIPTS / TOKENIZER_FILE
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        content = read_json(receipt, _RECEIPT_BYTES)
        if content["fingerprint"] == fingerprint:
            return open_tokenizer(TokenizerInfo(**content["tokenizer"]), directory).info
    total = sum(unit.bytes for unit in units)
    share = min(1.0, _TRAINING_BYTES / total)
    display.message(f"training a tokenizer of {spec.vocab_size} ids on about {share * total / 1e6:.1f} MB of text")
    info = worker.result(
        {
            "task": "train",
            **common,
            "units": [unit.to_json() for unit in units],
            "share": share,
            "vocab_size": spec.vocab_size,
        }
    )
    write_json(receipt, {"fingerprint": fingerprint, "tokenizer": info})
    return TokenizerInfo(**info)


def _receipt(directory: Path, unit: plan.Unit, fingerprint: str) -> dict[str, Shard] | None:
    """The unit's finished shards by split; None if they are missing, damaged or were made from something else."""
    try:
        content = read_json(receipt_path(directory, unit), _RECEIPT_BYTES)
        if content["fingerprint"] != fingerprint:
            return None
        shards = {split: Shard(**content["shards"][split]) for split in SPLITS if content["shards"][split] is not None}
        if any((directory / shard.file).stat().st_size <= shard.tokens for shard in shards.values()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shards


def _assemble(
    description: dict[str, Any], source: Source, tokenizer: TokenizerInfo, made: Sequence[dict[str, Shard] | None]
) -> Manifest:
    receipts = [shards for shards in made if shards is not None]
    if len(receipts) < len(made):
        raise DataError(
            "a finished shard changed during the preparation; rerun the same command, which makes only what is missing"
        )
    splits = {split: Split(tuple(shards[split] for shards in receipts if split in shards)) for split in SPLITS}
    documents = sum(split.documents for split in splits.values())
    if documents == 0:
        raise DataError(
            "the corpus has no documents with text; check the files, and data.text_column for .jsonl and .parquet"
        )
    for name, split in splits.items():
        if split.documents == 0:
            raise DataError(
                f"none of the {documents} documents falls into {name} (data.validation.rule={source.split.rule}, "
                f"fraction={source.split.fraction}); change data.validation.fraction or choose a larger corpus"
            )
    return Manifest(description, source.split.describe(), tokenizer, splits)


def _remove_stale(directory: Path, manifest: Manifest) -> None:
    """Remove files left by killed processes and earlier versions of the corpus."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in directory.iterdir():
        if _STALE.fullmatch(path.name) and path.name not in listed:
            path.unlink()


def _check_request(directory: Path, manifest: Manifest, source: Source, tokenizer: TokenizerSpec) -> None:
    """Refuse tokens made from another corpus or with another tokenizer than requested."""
    asked: dict[str, Any] = {"tokenizer": tokenizer.name, "split": source.split.describe()}
    held: dict[str, Any] = {"tokenizer": manifest.tokenizer.name, "split": manifest.split_rule}
    if tokenizer.vocab_size is not None:
        asked["vocab_size"], held["vocab_size"] = tokenizer.vocab_size, manifest.vocab_size
    try:
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            held |= read_json(directory / PREPARATION_FILE, _RECEIPT_BYTES)["request"]
            asked |= source.request()
    except OSError as error:
        raise cannot_use(error, directory) from error
    different = sorted(key for key in asked.keys() | held.keys() if asked.get(key) != held.get(key))
    if different:
        raise DataError(
            f"{directory} was prepared with "
            + ", ".join(f"{key}={held.get(key)!r}" for key in different)
            + ", but this run asks for "
            + ", ".join(f"{key}={asked.get(key)!r}" for key in different)
            + "; set another data.name, or remove the directory and prepare it again"
        )


def _refuse_changed(directory: Path, manifest: Manifest, source: Source) -> None:
    """Refuse tokens of files whose names or sizes have changed. Tokens without their files, such as a copy, pass."""
    then, now = manifest.source.get("listing"), source.listing()
    if then is not None and now is not None and then != now:
        raise DataError(
            f"{directory}: the corpus has changed since it was prepared: then {_counted(then)}, now {_counted(now)}; set "
            "another data.name or data.directory, or remove the directory and prepare it again"
        )


def _counted(listing: dict[str, Any]) -> str:
    return f"{listing['files']} files of {listing['bytes']:,} bytes (names and sizes {listing['sha256'][:12]})"


@contextmanager
def _exclusive(directory: Path, display: Progress) -> Iterator[int]:
    """Hold the directory's lock, waiting for its holder if need be; yields the lock's descriptor.

    The kernel releases the lock when the last process that holds it ends, so a kill leaves no stale lock.
    """
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
            f"{directory} is on a filesystem without locks ({error.strerror}), where two preparations could "
            "overwrite each other; prepare on a local disk (data.directory) and copy the directory"
        ) from error
    return True
