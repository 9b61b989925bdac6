"""Damaged checkpoint files: opening the checkpoint fails, or it reads exactly what was saved.

A checkpoint of two ranks and three steps is damaged in one random way at a time. To pass, opening it must raise
CheckpointError, or every tensor and the state must read as written.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.records import checkpoint_name
from training.reliability.checkpoints import (
    MANIFEST_FILE,
    Checkpoint,
    CheckpointError,
    manifest_text,
    newest_valid,
)

STEPS = (5, 10, 15)
SHAPES = {"model.w": (6, 10), "optimizer.w.exp_avg": (6, 10), "optimizer.w.hessian": (6, 10), "optimizer.w.step": ()}


def write_checkpoints(root: Path) -> None:
    """Write checkpoints of three steps, as two ranks do, with numbers that differ between the steps."""
    from training.reliability.checkpoints import _write_rank_file
    from training.strategies.base import Piece

    for step in STEPS:
        directory = root / checkpoint_name(step)
        directory.mkdir(parents=True)
        files = {}
        for rank in range(2):
            pieces = []
            for number, (name, shape) in enumerate(SHAPES.items()):
                values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 100 * step + number
                half = values[: len(values) // 2] if rank == 0 else values[len(values) // 2 :]
                if len(half):
                    pieces.append(Piece(name, shape, 0 if rank == 0 else len(values) // 2, half))
            entry = _write_rank_file(directory / f"rank-{rank:05d}.safetensors", pieces)
            files[entry["file"]] = entry
        state = {"training": {"step": step}, "metrics_bytes": 10 * step, "good": True, "val_loss": 3.0, "config": {}}
        state |= {"ledger": {"entries": {}, "bytes_communicated": 0}}
        manifest = {"format": "sophia-checkpoint-2", "step": step, "state": state, "files": files}
        (directory / MANIFEST_FILE).write_text(manifest_text(manifest))


def content_of(directory: Path) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint's entire content, read as a resumed run reads it."""
    checkpoint = Checkpoint(directory)
    return (
        checkpoint.step,
        checkpoint.state.model_dump(),
        {name: checkpoint.tensor(name) for name in checkpoint.names()},
    )


def _same(
    one: tuple[int, dict[str, Any], dict[str, Tensor]], other: tuple[int, dict[str, Any], dict[str, Tensor]]
) -> bool:
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    )


# Each damages one file of a checkpoint and describes what it did.
Damage = Callable[[Path, np.random.Generator], str]


def flip(path: Path, generator: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    place, bit = int(generator.integers(len(content))), int(generator.integers(8))
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def truncate(path: Path, generator: np.random.Generator) -> str:
    size = int(generator.integers(path.stat().st_size))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def append(path: Path, generator: np.random.Generator) -> str:
    count = int(generator.integers(1, 100))
    with path.open("ab") as file:
        file.write(generator.bytes(count))
    return f"{count} bytes more"


def empty(path: Path, generator: np.random.Generator) -> str:
    path.write_bytes(b"")
    return "emptied"


def remove(path: Path, generator: np.random.Generator) -> str:
    path.unlink()
    return "removed"


def directory(path: Path, generator: np.random.Generator) -> str:
    path.unlink()
    path.mkdir()
    return "a directory in its place"


def of_another_step(path: Path, generator: np.random.Generator) -> str:
    others = [step for step in STEPS if checkpoint_name(step) != path.parent.name]
    source = path.parent.parent / checkpoint_name(int(generator.choice(others))) / path.name
    shutil.copyfile(source, path)
    return f"the file of {source.parent.name}"


def swap(path: Path, generator: np.random.Generator) -> str:
    others = sorted(other for other in path.parent.iterdir() if other != path)
    other = others[int(generator.integers(len(others)))]
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def link(path: Path, generator: np.random.Generator) -> str:
    """Move the content elsewhere: a link's target can change after it was checked."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.replace(elsewhere)
    path.symlink_to(elsewhere)
    return "a link in its place"


def extra(path: Path, generator: np.random.Generator) -> str:
    name = str(generator.choice(["rank-00002.safetensors", "model.safetensors", "state.pkl", "manifest.json.bak"]))
    (path.parent / name).write_bytes(path.read_bytes())
    return f"{name} added"


DAMAGES: tuple[Damage, ...] = (
    *(flip, flip, flip, truncate, append, empty, remove, directory, of_another_step, swap, link, extra),
)
# A file that the manifest does not name is not read: the checkpoint is unchanged.
HARMLESS = (extra,)


def corrupt(scratch: Path, cases: int, seed: int) -> dict[str, Any]:
    """Damage a checkpoint in `cases` random ways, one at a time. Returns counts by kind of damage, and the faults."""
    generator = np.random.default_rng(seed)
    pristine = scratch / "pristine"
    write_checkpoints(pristine)
    contents = {step: content_of(pristine / checkpoint_name(step)) for step in STEPS}
    tried, detected, harmless = Counter[str](), Counter[str](), 0
    faults: list[str] = []
    root = scratch / "damaged"
    for case in range(cases):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root)
        damage = DAMAGES[case % len(DAMAGES)]
        step = int(generator.choice(STEPS))
        target = root / checkpoint_name(step)
        files = sorted(target.iterdir())
        victim = files[int(generator.integers(len(files)))]
        what = f"{victim.name} of step {step}: {damage(victim, generator)}"
        tried[damage.__name__] += 1
        try:
            found = content_of(target)
        except CheckpointError as error:
            detected[damage.__name__] += 1
            if str(target) not in str(error):
                faults.append(f"{what}: the error names no file: {error}")
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if damage in HARMLESS and _same(found, contents[step]):
                harmless += 1
            else:
                faults.append(
                    f"{what}: loaded silently, with {'the same' if _same(found, contents[step]) else 'OTHER'} numbers"
                )
        faults += _faults_of_resumption(root, step, what, damage in HARMLESS, contents)
    return {
        "corruptions": sum(tried.values()) - harmless,
        "detected": sum(detected.values()),
        "harmless_extra_files": harmless,
        "by_kind": {kind: f"{detected[kind]} of {count}" for kind, count in sorted(tried.items())},
        "faults": faults,
    }


def _faults_of_resumption(root: Path, damaged: int, what: str, harmless: bool, contents: dict[int, Any]) -> list[str]:
    """Check that a run would resume from the newest sound checkpoint, with a line for each newer one."""
    checkpoint, rejected = newest_valid(root)
    expected = next(step for step in reversed(STEPS) if harmless or step != damaged)
    if checkpoint is None or checkpoint.step != expected:
        return [f"{what}: a run resumes from {checkpoint and checkpoint.step}, but {expected} is sound"]
    told = 0 if harmless or damaged < expected else 1
    return [] if len(rejected) == told else [f"{what}: {rejected}"]
