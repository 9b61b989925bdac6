"""Checkpoints: full tensors by parameter name in safetensors shards, with a JSON manifest; never a pickle.

    <run>/checkpoints/step-00000100/
        manifest.json            step, tensors and where their elements lie, state of ledger and records, sha256 of each file
        rank-00000.safetensors   this rank's pieces: flat ranges of full tensors (training/strategies/base.py)

A checkpoint is written into a hidden directory beside, flushed, and renamed when every rank has written: a directory with
its final name is complete. Each rank hashes what it wrote; a file that does not have its hash is never used.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.distributed import Distributed
from training.records import write_atomically
from training.strategies.base import Piece

MANIFEST_FILE = "manifest.json"
FORMAT = "sophia-checkpoint-1"
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5}\.safetensors")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int64, torch.int32, torch.uint8, torch.bool)}


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete or damaged. The message names the file and what is wrong with it."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    distributed: Distributed,
) -> Path:
    """Write a checkpoint in parallel, one file a rank. Every rank calls it; returns the final directory.

    Args:
        root: the run's checkpoints/ directory.
        step: updates made so far.
        pieces: this rank's part; over all ranks every element of every tensor exactly once.
        state: JSON values of rank 0 that a resumed run needs besides (ledger, record size, …).
        distributed: the ranks that take part.

    Raises:
        OSError: the disk is full or not writable; what was written of this checkpoint is removed, older ones are untouched.
    """
    final = root / checkpoint_name(step)
    partial = root / f".{checkpoint_name(step)}.partial"
    failure: OSError | SafetensorError | None = None
    entry: dict[str, Any] = {}
    try:
        if distributed.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    distributed.barrier()
    try:
        if failure is None:
            entry = _write_rank_file(partial / f"rank-{distributed.rank:05d}.safetensors", pieces)
    except (OSError, SafetensorError) as error:
        failure = error
    entries = distributed.gather_objects(entry)
    try:
        if distributed.is_main and failure is None and all(entries):
            manifest = {"format": FORMAT, "step": step, "state": state, "files": {e["file"]: e for e in entries}}
            write_atomically(partial / MANIFEST_FILE, json.dumps(manifest, indent=1))
            _sync_directory(partial)
            if final.exists():  # an earlier attempt at the same step, of a run that was resumed before it
                shutil.rmtree(final)
            partial.rename(final)
            _sync_directory(root)
    except OSError as error:
        failure = error
    if distributed.any(failure is not None):
        if distributed.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written: {failure or 'another rank failed'}") from failure
    return final


def _write_rank_file(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for piece in pieces:
        key = f"{piece.name}@{piece.start}"
        tensors[key] = piece.values.detach().to("cpu").contiguous()
        described.append(
            {
                "name": piece.name,
                "shape": list(piece.shape),
                "dtype": str(piece.values.dtype).removeprefix("torch."),
                "start": piece.start,
                "count": piece.values.numel(),
            }
        )
    save_file({key: value.clone() if _shares_storage(value) else value for key, value in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size, "pieces": described}


def _shares_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Place:
    file: str
    key: str
    start: int
    count: int


class Checkpoint:
    """An opened checkpoint: full tensors, readable in part (a PieceReader), and the saved state.

    Args:
        directory: checkpoints/step-…
        verify: hash every file against the manifest first.

    Raises:
        CheckpointError: a file is missing, damaged, of another length or hash, or names a path outside; the file is named.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory = directory
        manifest = _read_manifest(directory)
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self._places: dict[str, list[_Place]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        for name, entry in manifest["files"].items():
            self._check_file(name, entry, verify)
            for piece in entry["pieces"]:
                place = _Place(name, f"{piece['name']}@{piece['start']}", piece["start"], piece["count"])
                self._places.setdefault(piece["name"], []).append(place)
                self._shapes[piece["name"]] = tuple(piece["shape"])
                self._dtypes[piece["name"]] = _DTYPES[piece["dtype"]]
        for name, places in self._places.items():
            places.sort(key=lambda place: place.start)
            covered = 0
            for place in places:
                if place.start != covered:
                    raise CheckpointError(f"{directory}: elements {covered} to {place.start} of {name} are in no file")
                covered += place.count
            if covered != torch.Size(self._shapes[name]).numel():
                raise CheckpointError(f"{directory}: {name} has {covered} elements, its shape is {self._shapes[name]}")

    def _check_file(self, name: str, entry: dict[str, Any], verify: bool) -> None:
        path = self.directory / name
        if not _FILE.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing or no plain file of this checkpoint")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise CheckpointError(f"{path} does not have the sha256 of the manifest: it is damaged")

    def names(self) -> Sequence[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        self._require(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        self._require(name)
        return self._dtypes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) the elements [start, stop) of the full tensor in row-major order, on the CPU."""
        self._require(name)
        result = torch.empty(stop - start, dtype=self._dtypes[name])
        for place in self._places[name]:
            first, last = max(start, place.start), min(stop, place.start + place.count)
            if first < last:
                values = self._open(place.file).get_slice(place.key)[first - place.start : last - place.start]
                result[first - start : last - start] = values
        return result

    def tensor(self, name: str) -> Tensor:
        """The full tensor."""
        return self.read(name, 0, torch.Size(self.shape(name)).numel()).reshape(self.shape(name))

    def _require(self, name: str) -> None:
        if name not in self._places:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}: it was saved by another model or optimizer")

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.directory / name, framework="pt")  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / name} is no safetensors file: {error}") from error
        return self._files[name]


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing: {directory} is no complete checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']!r} is not {FORMAT!r}")
        for entry in manifest["files"].values():
            for piece in entry["pieces"]:
                if min(piece["start"], piece["count"], *piece["shape"], 0) < 0 or piece["dtype"] not in _DTYPES:
                    raise CheckpointError(f"{path}: a tensor with impossible values: {piece}")
        if not isinstance(manifest["step"], int) or not isinstance(manifest["state"], dict):
            raise CheckpointError(f"{path}: step and state are missing")
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return manifest


def available(root: Path) -> list[Path]:
    """The complete checkpoint directories of a run, newest first; not yet verified."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_valid(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file has its hash, and a line about each newer one that had to be passed over."""
    rejected = []
    for path in available(root):
        try:
            return Checkpoint(path), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    return None, rejected


def set_aside_newer(root: Path, step: int) -> None:
    """Rename the checkpoints beyond `step`: a run that goes on from there must not find them again."""
    for path in available(root):
        if int(path.name.removeprefix("step-")) > step:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what unfinished saves left behind."""
    for path in available(root)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for leftover in root.glob(".step-*.partial"):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)
