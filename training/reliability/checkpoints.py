"""Checkpoints: full tensors by parameter name in safetensors shards, with a JSON manifest; never a pickle.

    <run>/checkpoints/step-00000100/
        manifest.json            step, location of each tensor's elements, numbers of the optimizer's state, state of ledger
                                 and records, sha256 of each file and of the manifest itself
        rank-00000.safetensors   this rank's pieces: flat ranges of full tensors (training/strategies/base.py)

A checkpoint is written to a hidden directory next to the final one, flushed, and renamed once every rank has written: a
directory with its final name is complete. Each rank hashes what it wrote; a file with another hash is never used.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import (
    check_nesting,
    open_regular,
    problem,
    read_regular,
    sync_directory,
    take_usual_mode,
    write_atomically,
)
from training.config import ConfigurationError
from training.distributed import Distributed
from training.loop import TrainingState
from training.recording.ledger import Entry, Kind
from training.records import Form, checkpoint_name
from training.strategies.base import SAVED_DTYPES, Number, NumberPiece, Piece

MANIFEST_FILE = "manifest.json"
FORMAT = "sophia-checkpoint-2"
EVALUATED = "evaluated."  # and a parameter's name, where evaluations use other weights than training
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5}\.safetensors")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAVED_DTYPES}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "BOOL": "bool"}
_SAFETENSORS_DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
# 1.5 billion parameters written by a thousand ranks need 400 MB.
_MANIFEST_BYTES = 1 << 30
_HASHED_BYTES = 16 << 20  # between two reports of progress


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete or damaged. The message names the file and the problem."""


# The schema of a manifest.

_Count = Annotated[int, Field(ge=0)]


class _Piece(Form):
    name: str
    shape: list[_Count]
    dtype: str
    start: _Count
    count: _Count

    @model_validator(mode="after")
    def _known_type(self) -> Self:
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.dtype!r} is not a dtype that checkpoints store")
        return self

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return f"{self.name}@{self.start}"


class _File(Form):
    sha256: str
    bytes: _Count
    pieces: list[_Piece]
    numbers: dict[str, StrictBool | StrictInt | StrictFloat | None] = Field(default_factory=dict)


class _LedgerState(BaseModel):
    entries: dict[Kind, Entry]
    bytes_communicated: int
    shared_forwards: int = 0  # older checkpoints lack it


class _SpikesState(BaseModel):
    mean: float
    variance: float
    seen: int
    high: bool


class _AlarmState(BaseModel):
    zero_since: int | None
    told: bool


class RunState(BaseModel):
    """What a resumed run needs in addition to tensors, as `training.run` saves it."""

    training: TrainingState
    ledger: _LedgerState
    metrics_bytes: _Count  # size of metrics.jsonl
    metrics_sha256: str | None = None  # of those bytes
    config: dict[str, Any]
    good: bool = True  # False if the step before the save was skipped
    val_loss: float | None = None  # None without an evaluation at this step
    data_manifest_sha256: str | None = None

    @model_validator(mode="after")
    def _guards(self) -> Self:
        if self.training.spikes is not None:
            _SpikesState.model_validate(self.training.spikes)
        if self.training.alarm is not None:
            _AlarmState.model_validate(self.training.alarm)
        return self


class _Manifest(Form):
    format: Literal["sophia-checkpoint-2"]
    step: _Count
    files: dict[str, _File]
    state: Annotated[RunState, Field(strict=False)]


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece | NumberPiece],
    state: dict[str, Any],
    distributed: Distributed,
    progress: Callable[[str], None] = lambda doing: None,
) -> Path:
    """Write a checkpoint in parallel, one file per rank. Every rank calls it; returns the final directory.

    Args:
        root: the run's checkpoints/ directory.
        pieces: this rank's part; over all ranks every element of every tensor exactly once.
        state: JSON values of rank 0, in the form of `RunState`.
        progress: called with what is being done, after each tensor and each block that was hashed.

    Raises:
        OSError: on every rank, if the disk is full or not writable or the optimizer now keeps state that cannot be saved.
            The partial checkpoint is removed; older ones are untouched.
    """
    final = root / checkpoint_name(step)
    partial = root / f".{checkpoint_name(step)}.partial"
    failures = distributed.gather_objects(_failure_of(lambda: _begin(partial)) if distributed.is_main else None)
    entry: dict[str, Any] = {}
    if not any(failures):
        path = partial / f"rank-{distributed.rank:05d}.safetensors"
        failures = distributed.gather_objects(
            _failure_of(lambda: entry.update(_write_rank_file(path, pieces, progress)))
        )
    entries = distributed.gather_objects(entry)
    if not any(failures):
        manifest = {"format": FORMAT, "step": step, "state": state, "files": {e["file"]: e for e in entries}}
        finished = _failure_of(lambda: _finish(partial, final, manifest)) if distributed.is_main else None
        failures = distributed.gather_objects(finished)
    if any(failures):
        if distributed.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        number, reason = next(failure for failure in failures if failure)
        raise OSError(number, f"{final} could not be written: {reason}")
    return final


def _failure_of(action: Callable[[], None]) -> tuple[int, str] | None:
    """Run `action`. Returns the error number and message if it failed, else None."""
    try:
        action()
    except ConfigurationError as error:
        return errno.EINVAL, str(error)
    except OSError as error:
        return error.errno or errno.EIO, error.strerror or str(error)
    except SafetensorError as error:  # wraps errors of the operating system
        number = int(found.group(1)) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
        return number, os.strerror(number) if found else str(error)
    return None


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _finish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_atomically(partial / MANIFEST_FILE, manifest_text(manifest))
    sync_directory(partial)
    deleted = _to_delete(final)
    if final.exists():  # saved by an earlier process, before the run resumed from an older checkpoint
        shutil.rmtree(deleted, ignore_errors=True)
        final.rename(deleted)
    partial.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(deleted, ignore_errors=True)


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the manifest's text: first the sha256 of the text without it, then the rest."""
    body = json.dumps(manifest, separators=(",", ":"))  # with indent=, json falls back to its slow encoder
    return f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}",{body[1:]}'


def _write_rank_file(
    path: Path, pieces: Iterable[Piece | NumberPiece], progress: Callable[[str], None] = lambda doing: None
) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    described: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, NumberPiece):
            numbers[piece.name] = piece.value
            continue
        progress(f"saving {piece.name}")
        values = piece.values.detach().to("cpu").contiguous()
        dtype = str(values.dtype).removeprefix("torch.")
        entry = _Piece(name=piece.name, shape=list(piece.shape), dtype=dtype, start=piece.start, count=values.numel())
        described.append(entry.model_dump())
        shares_storage = values.untyped_storage().nbytes() != values.nbytes
        tensors[entry.key] = values.clone() if shares_storage else values
    progress(f"writing {path}")
    save_file(tensors, path)
    take_usual_mode(path)
    progress(f"flushing {path}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_HASHED_BYTES):
            digest.update(block)
            progress(f"hashing {path}")
    size = path.stat().st_size
    return {"file": path.name, "sha256": digest.hexdigest(), "bytes": size, "pieces": described, "numbers": numbers}


class Checkpoint:
    """An open checkpoint: full tensors, readable in part (a PieceReader), and the saved state.

    Args:
        verify: check every file's hash against the manifest.

    Raises:
        CheckpointError: a file is missing, damaged, unreadable, has another length or hash, or names a path outside the
            directory; the message names the file.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory = directory
        try:
            self._read(verify)
        except OSError as error:
            raise CheckpointError(f"{error.filename or directory} cannot be read: {error.strerror or error}") from error

    def _read(self, verify: bool) -> None:
        directory = self.directory
        manifest = _read_manifest(directory)
        self.step = manifest.step
        self.state = manifest.state
        self._pieces: dict[str, list[tuple[str, _Piece]]] = {}  # of each tensor, with their files
        self._numbers: dict[str, Number] = {}
        self._files: dict[str, Any] = {}
        for name, entry in manifest.files.items():
            self._numbers |= entry.numbers
            self._check_file(name, entry, verify)
            for piece in entry.pieces:
                self._pieces.setdefault(piece.name, []).append((name, piece))
        for name, pieces in self._pieces.items():
            described = {(tuple(piece.shape), piece.dtype): None for _, piece in pieces}
            if len(described) > 1:
                raise CheckpointError(f"{directory}: two descriptions of {name}: {', '.join(map(str, described))}")
            pieces.sort(key=lambda place: place[1].start)
            covered = 0
            for _, piece in pieces:
                if piece.start != covered:
                    raise CheckpointError(f"{directory}: elements {covered} to {piece.start} of {name} are in no file")
                covered += piece.count
            if covered != torch.Size(self.shape(name)).numel():
                raise CheckpointError(f"{directory}: {name} has {covered} elements, its shape is {self.shape(name)}")

    def _check_file(self, name: str, entry: _File, verify: bool) -> None:
        """Check the size, with `verify` the hash, and from the file's header the tensors, their lengths and dtypes."""
        path = self.directory / name
        if not _FILE.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing or not a plain file of this checkpoint")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; its manifest says {entry.bytes}")
        if verify:
            with open_regular(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise CheckpointError(f"{path} is damaged: its sha256 differs from the manifest's")
        opened = self._open(name)
        if {piece.key for piece in entry.pieces} != set(opened.keys()):
            raise CheckpointError(f"{path} holds other tensors than its manifest says")
        for piece in entry.pieces:
            found = opened.get_slice(piece.key)
            if found.get_shape() != [piece.count] or _SAFETENSORS_DTYPES.get(found.get_dtype()) != piece.dtype:
                raise CheckpointError(
                    f"{path}: {piece.key} is {found.get_dtype()} of shape {found.get_shape()}; its manifest "
                    f"says {piece.dtype} of shape {[piece.count]}"
                )

    def names(self) -> Sequence[str]:
        return list(self._pieces)

    def numbers(self) -> Mapping[str, Number]:
        return self._numbers

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._pieces_of(name)[0][1].shape)

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._pieces_of(name)[0][1].dtype]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) the elements [start, stop) of the full tensor in row-major order, on the CPU."""
        result = torch.empty(stop - start, dtype=self.dtype(name))
        for file, piece in self._pieces_of(name):
            first, last = max(start, piece.start), min(stop, piece.start + piece.count)
            if first < last:
                stored = self._open(file).get_slice(piece.key)
                result[first - start : last - start] = stored[first - piece.start : last - piece.start]
        return result

    def tensor(self, name: str) -> Tensor:
        """The full tensor."""
        return self.read(name, 0, torch.Size(self.shape(name)).numel()).reshape(self.shape(name))

    def weights(self, parameter: str) -> Tensor:
        """Return the full weights of a parameter with which the model is evaluated, which its optimizer may average."""
        evaluated = EVALUATED + parameter
        return self.tensor(evaluated if evaluated in self._pieces else f"model.{parameter}")

    def _pieces_of(self, name: str) -> list[tuple[str, _Piece]]:
        if name not in self._pieces:
            raise CheckpointError(
                f"{self.directory} has no tensor {name!r}: it was saved by another model or optimizer"
            )
        return self._pieces[name]

    def _open(self, name: str) -> Any:
        if name not in self._files:
            open_regular(self.directory / name).close()  # raises what safe_open calls "no such file"
            try:
                self._files[name] = safe_open(self.directory / name, framework="pt")  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / name} is not a safetensors file: {error}") from error
        return self._files[name]


def _read_manifest(directory: Path) -> _Manifest:
    path = directory / MANIFEST_FILE
    if path.is_symlink() or not path.exists():
        raise CheckpointError(f"{path} is missing: {directory} is not a complete checkpoint")
    try:
        text = read_regular(path, _MANIFEST_BYTES).decode()
        values = json.loads(text)
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise CheckpointError(f"{path}: format {values['format']!r} is not {FORMAT!r}")
        check_nesting(values, len(text))
        manifest = _Manifest.model_validate(values)
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {problem(error)}") from error
    head, _, rest = text.partition(",")
    sha256 = hashlib.sha256(f"{{{rest}".encode()).hexdigest()
    if head not in (f'{{"sha256":"{sha256}"', f'{{\n "sha256": "{sha256}"'):  # the second: indented by version 0.1
        raise CheckpointError(f"{path} is damaged: its sha256 differs from the one written in it")
    if _NAME.fullmatch(directory.name) and directory.name != checkpoint_name(manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}, but its directory is named {directory.name}")
    return manifest


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def available(root: Path) -> list[Path]:
    """Return a run's complete checkpoint directories, newest first, without verifying them.

    Raises:
        OSError: `root` cannot be listed.
    """
    try:
        # A path that the disk cannot even stat counts: opening it reports the error.
        found = [
            path
            for path in root.iterdir()
            if _NAME.fullmatch(path.name) and not os.path.isfile(path) and not os.path.islink(path)
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=step_of, reverse=True)


def newest_valid(
    root: Path, fits: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files all match their hashes, and one line for each newer one that was rejected.

    Args:
        fits: returns why an undamaged checkpoint cannot be used, or None if it can.

    Raises:
        CheckpointError: `root` cannot be listed.
    """
    rejected = []
    try:
        found = available(root)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}") from error
    for path in found:
        try:
            checkpoint = Checkpoint(path)
        except CheckpointError as error:
            rejected.append(str(error))
            continue
        if reason := fits(checkpoint):
            rejected.append(f"{path}: {reason}")
        else:
            return checkpoint, rejected
    return None, rejected


def set_aside_newer(root: Path, step: int) -> None:
    """Rename the checkpoints after `step`, so that a run resumed from there does not find them."""
    for path in available(root):
        if step_of(path) > step:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def discard(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no part of it is ever found under its name."""
    deleted = _to_delete(path)
    shutil.rmtree(deleted, ignore_errors=True)
    path.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _to_delete(path: Path) -> Path:
    """Return the name of a checkpoint while it is being deleted."""
    return path.with_name(f".{path.name}.discarded")


def prune(
    root: Path, keep: int, keep_every: int | None = None, *, keep_best: bool = False, needed: Collection[int] = ()
) -> None:
    """Delete checkpoints that need not be kept, and the leftovers of unfinished saves and deletions.

    Keeps the newest, even if damaged; the newest that opens; the newest `keep` good ones (the step before the save was not
    skipped); those at multiples of `keep_every` and at the steps `needed`; and with `keep_best` the one with the lowest
    validation loss. A damaged checkpoint never displaces a sound one: `keep` counts only those whose files exist with the
    right sizes. One that cannot be read now (a network filesystem, too many open files) is kept.
    """
    for leftover in (*root.glob(".step-*.partial"), *root.glob(".step-*.discarded")):
        shutil.rmtree(leftover, ignore_errors=True)
    found = available(root)
    passing = [path for path in found if keep_every is None or step_of(path) % keep_every]
    passing = [path for path in passing if step_of(path) not in needed]
    states: dict[Path, RunState] = {}  # of the sound ones
    unread: set[Path] = set()
    for path in passing:
        try:
            states[path] = Checkpoint(path, verify=False).state
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                unread.add(path)
    if not states:
        return
    good = [path for path, state in states.items() if state.good]
    kept = {found[0], next(iter(states)), *good[:keep]} if good else set(states)
    losses = {path: loss for path in good if (loss := states[path].val_loss) is not None}
    if keep_best and losses:
        kept.add(min(losses, key=losses.__getitem__))
    for path in passing:
        if path not in kept | unread:
            with contextlib.suppress(OSError):
                discard(path)
