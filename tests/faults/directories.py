"""Run directories damaged or occupied by other people, programs and disks.

Each case prepares a directory, starts a run there, and returns the faults. In every case the run must end in bounded time
with at most one error line, and change only its own files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disks import hashes
from tests.faults.kills import overrides_of
from tests.faults.sittings import Sitting, completed
from tests.permissions import bound_by_permissions
from tests.training.runs import curve
from tests.unreadable import unreadable
from training.reliability import checkpoints

STEPS = 24
#: No case takes longer, even on a loaded machine.
BOUND_SECONDS = 30.0
RECORD_FILES = ("config.yaml", "environment.json", "summary.json", "metrics.jsonl")


def met(command: Sequence[str], log: Path, codes: Sequence[int], **named: Any) -> tuple[int | None, list[str]]:
    """Run a command line to its end. Returns its exit code and the faults of how it ended."""
    sitting = Sitting(command, log, **named)
    try:
        (code,) = sitting.wait(BOUND_SECONDS)
    except AssertionError:
        return None, [f"no end within {BOUND_SECONDS:.0f} s"]
    said = sitting.said()
    faults = [] if code in codes else [f"exit code {code}: {said[-500:]}"]
    if "Traceback" in said:
        faults.append(f"a traceback: {said[-500:]}")
    if code == 2 and said.count("error: ") != 1:
        faults.append(f"{said.count('error: ')} error lines: {said[-500:]}")
    return code, faults


class Unfinished:
    """An unfinished run, copied for each case."""

    def __init__(self, corpus: Sequence[str], scratch: Path) -> None:
        self.scratch = scratch
        self.log = scratch / "log"
        self.overrides = functools.partial(overrides_of, corpus, scratch)
        self.keeping = ("checkpoint.keep=3", "checkpoint.keep_best=false")
        completed(self.overrides("undisturbed", STEPS), self.log)
        self.curve = curve(scratch / "undisturbed")
        self.pristine = scratch / "pristine"
        completed(self.command(), self.log)
        directory = scratch / "run"
        newest = checkpoints.available(directory / "checkpoints")[0]
        shutil.rmtree(newest)  # as if the run had been killed before its last save
        (directory / "summary.json").write_text(json.dumps({"status": "preempted"}))
        directory.rename(self.pristine)

    def copy(self) -> Path:
        """Make a fresh copy of the unfinished run where `command` looks for it."""
        directory = self.scratch / "run"
        if directory.is_symlink():
            directory.unlink()
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.pristine, directory, symlinks=True)
        return directory

    def command(self, *overrides: str) -> list[str]:
        return self.overrides("run", STEPS, *self.keeping, *overrides)

    def resumes(self, what: str, codes: Sequence[int] = (0, 1, 2), **named: Any) -> tuple[int | None, list[str]]:
        """Start the run again: it is refused in one line, or has the curve of an undisturbed run."""
        code, faults = met(self.command(), self.log, codes, **named)
        if code == 0 and curve(self.scratch / "run") != self.curve:
            faults.append("another curve, recorded as complete")
        return code, [f"{what}: {fault}" for fault in faults]


def foreign_directories(run: Unfinished) -> dict[str, list[str]]:
    """Directories that `overwrite=true` must leave alone, to the byte."""

    def project(place: Path) -> None:
        shutil.rmtree(place)
        (place / ".git").mkdir(parents=True)
        (place / "config.yaml").write_text("theme: dark\n")
        (place / "thesis.tex").write_text("\\section{Ten years of work}\n")
        (place / ".git" / "HEAD").write_text("ref: refs/heads/main\n")

    def thesis_in_a_run(place: Path) -> None:
        (place / "thesis.tex").write_text("\\section{Ten years of work}\n")

    def repository_in_a_run(place: Path) -> None:
        (place / ".git").mkdir()
        (place / ".git" / "HEAD").write_text("ref: refs/heads/main\n")

    def notes_among_checkpoints(place: Path) -> None:
        (place / "checkpoints" / "notes.txt").write_text("the good one is step 10\n")

    def another_program(place: Path) -> None:
        shutil.rmtree(place)
        place.mkdir()
        (place / "config.yaml").write_text("model: {name: resnet}\noptimizer: sgd\nseed: 1\n")
        (place / "metrics.jsonl").write_text('{"epoch": 1}\n')
        (place / "checkpoints").mkdir()
        (place / "checkpoints" / "epoch-1.pt").write_bytes(b"weights")

    found = {}
    for case in (project, thesis_in_a_run, repository_in_a_run, notes_among_checkpoints, another_program):
        place = run.copy()
        case(place)
        before = hashes(place)
        _, faults = met(run.command("overwrite=true"), run.log, [2])
        after = hashes(place)
        after.pop(".lock", None)
        before.pop(".lock", None)
        faults += [] if after == before else [f"changed: {sorted(set(before.items()) ^ set(after.items()))[:3]}"]
        found[f"foreign directory, {case.__name__}"] = faults
    return found


def links(run: Unfinished) -> dict[str, list[str]]:
    """Links in place of a run's files: their targets do not change."""
    found = {}
    for name in (".lock", *RECORD_FILES, "checkpoints"):
        for overrides in ((), ("overwrite=true",)):
            place, victim = run.copy(), run.scratch / "victim"
            shutil.rmtree(victim, ignore_errors=True)
            victim.mkdir()
            if name == ".lock":
                (place / name).unlink(missing_ok=True)
                (victim / name).write_text("somebody's file\n")
            else:
                (place / name).rename(victim / name)
            (place / name).symlink_to(victim / name)
            before = hashes(victim)
            _, faults = met(run.command(*overrides), run.log, [0, 1, 2])
            faults += [] if hashes(victim) == before else ["what the link points to was changed"]
            found[f"link, {name} {' '.join(overrides)}".strip()] = faults
    return found


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero is endless


def _directory(path: Path) -> None:
    path.mkdir()


def special_files(run: Unfinished) -> dict[str, list[str]]:
    """FIFOs, devices and directories in place of a run's files."""
    found = {}
    newest = checkpoints.available(run.pristine / "checkpoints")[0].name
    inside = (f"checkpoints/{newest}/manifest.json", f"checkpoints/{newest}/rank-00000.safetensors")
    for name in (".lock", *RECORD_FILES, *inside):
        for make in (_fifo, _device, _directory):
            path = run.copy() / name
            path.unlink(missing_ok=True)
            try:
                make(path)
            except PermissionError:  # devices need root
                continue
            _, found[f"{make.__name__[1:]}, {name}"] = run.resumes(name)
    return found


def special_corpora(run: Unfinished) -> dict[str, list[str]]:
    """FIFOs and devices in place of the corpus's tokens."""
    found = {}
    directory = next(Path(o.split("=", 1)[1]) for o in run.command() if o.startswith("data.directory="))
    for path in sorted(directory.glob("*/*.npy")) + sorted(directory.glob("*/manifest.json")):
        for make in (_fifo, _device, _directory):
            run.copy()
            aside = path.with_name("aside")
            path.rename(aside)
            try:
                make(path)
                _, found[f"{make.__name__[1:]}, {path.name}"] = run.resumes(path.name, [1, 2])
            except PermissionError:
                continue
            finally:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
                aside.rename(path)
    return found


_BOUND = contextlib.ExitStack()  # as long as the process


def permissions_bind() -> None:
    """Make permissions apply to this process, even for root."""
    _BOUND.enter_context(bound_by_permissions())


def permissions(run: Unfinished) -> dict[str, list[str]]:
    """Files and directories without read or write permission."""
    found = {}
    newest = f"checkpoints/{checkpoints.available(run.pristine / 'checkpoints')[0].name}"
    passed_over = (newest, f"{newest}/manifest.json", f"{newest}/rank-00000.safetensors")
    for name in (".", *RECORD_FILES, "checkpoints", *passed_over):
        for mode in (0o000, 0o444):
            path = run.copy() / name
            before = path.stat().st_mode
            path.chmod(mode)
            codes = [0] if name in passed_over else [0, 1, 2]
            _, found[f"mode {mode:03o}, {name}"] = run.resumes(name, codes, prepare=permissions_bind)
            if path.exists():
                path.chmod(before)
    return found


def disk_fails(path: Path) -> None:
    """Make opening a path, and all below it, fail with EIO in this process."""
    unreadable(pytest.MonkeyPatch(), path, errno.EIO)


def failing_disks(run: Unfinished) -> dict[str, list[str]]:
    """EIO from one file or directory of the run: an older checkpoint is used, or one line names the file."""
    found = {}
    newest = f"checkpoints/{checkpoints.available(run.pristine / 'checkpoints')[0].name}"
    passed_over = (newest, f"{newest}/manifest.json", f"{newest}/rank-00000.safetensors")
    for name in (*RECORD_FILES, *passed_over):
        codes = [0] if name in passed_over else [0, 1, 2]
        prepare = functools.partial(disk_fails, run.copy() / name)
        _, found[f"EIO, {name}"] = run.resumes(name, codes, prepare=prepare)
    return found


KINDS = {
    "foreign": (foreign_directories, "foreign directories under `overwrite=true`", "refused, nothing changed"),
    "links": (links, "links in a run directory", "never followed for writing"),
    "special": (special_files, "FIFOs, devices and directories in place of a run's files", "one line, no hang"),
    "corpora": (special_corpora, "FIFOs, devices and directories in place of tokens", "one line, no hang"),
    "permissions": (permissions, "missing permissions", "one line, or an older checkpoint"),
    "disks": (failing_disks, "files that a disk cannot read (EIO)", "one line, or an older checkpoint"),
}


def meet_all(corpus: Sequence[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """Run every case of every kind. Returns counts and faults."""
    run = Unfinished(corpus, scratch)
    result = {}
    for kind, (cases, _, _) in KINDS.items():
        found = cases(run)
        faults = [f"{case}: {fault}" for case, faults in found.items() for fault in faults]
        spoilt = Counter(bool(faults) for faults in found.values())
        result[kind] = {"tried": len(found), "as_promised": spoilt[False], "faults": faults}
    return result
