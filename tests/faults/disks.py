"""Runs on a real disk that fills up: a tmpfs of a few hundred kilobytes.

The run ends with one clear line, earlier saves are untouched, and once there is room the same command resumes to the curve
of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.kills import INTERVAL, compare, overrides_of
from tests.faults.sittings import Sitting, completed
from tests.training.runs import lines, summary
from training.records import checkpoint_name
from training.reliability import checkpoints

STEPS = 60


class MountRefusedError(RuntimeError):
    """This machine or user may not mount a tmpfs. The message says why."""


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a tmpfs of `kilobytes`.

    Raises:
        MountRefusedError: it cannot be mounted here.
    """
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", os.fspath(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise MountRefusedError(str(error)) from error
    if done.returncode:
        raise MountRefusedError(done.stderr.strip() or f"mount ended with {done.returncode}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", os.fspath(place)], check=False)


def make_room(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", os.fspath(place)], check=True)


def fill(place: Path) -> Path:
    """Fill the remaining space with one file."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def full_while_saving(corpus: Sequence[str], scratch: Path) -> dict[str, Any]:
    """A disk that keeps every checkpoint, until about the third no longer fits."""
    completed(overrides_of(corpus, scratch, "undisturbed", STEPS), scratch / "log")
    size = sum(path.stat().st_size for path in _newest(scratch / "undisturbed").iterdir())
    with small_disk(scratch / "disk", kilobytes=int(3.5 * size / 1024)) as disk:
        directory = disk / "run"
        command = overrides_of(corpus, disk, "run", STEPS, "checkpoint.keep=100")
        sitting = Sitting(command, scratch / "log")
        (code,) = sitting.wait()
        faults = _faults_of_failure(code, sitting.said(), directory, "could not be written: No space left on device")
        saved = hashes(directory / "checkpoints")
        last = checkpoints.step_of(_newest(directory))
        sitting = Sitting(command, scratch / "log")  # no room yet
        if sitting.wait() != [1] or not saved.items() <= hashes(directory / "checkpoints").items():
            faults.append("started again without room, the run does not end as before with its checkpoints untouched")
        return _resumed(disk, directory, scratch, command, last, faults)


def full_while_logging(corpus: Sequence[str], scratch: Path) -> dict[str, Any]:
    """A disk that fills up while lines are written between two checkpoints."""
    completed(overrides_of(corpus, scratch, "undisturbed", STEPS), scratch / "log")
    with small_disk(scratch / "disk", kilobytes=4096) as disk:
        directory = disk / "run"
        command = overrides_of(corpus, disk, "run", STEPS)
        sitting = Sitting(command, scratch / "log")
        sitting.wait_until(lambda: (directory / "checkpoints" / checkpoint_name(2 * INTERVAL)).exists())
        filler = fill(disk)
        (code,) = sitting.wait()
        faults = _faults_of_failure(code, sitting.said(), directory, "No space left on device")
        text = (directory / "metrics.jsonl").read_bytes()
        if not text.endswith(b"\n"):
            faults.append("the record ends in half a line")
        filler.unlink()
        last = checkpoints.step_of(_newest(directory))
        return _resumed(disk, directory, scratch, command, last, faults)


def _newest(directory: Path) -> Path:
    return checkpoints.available(directory / "checkpoints")[0]


def _faults_of_failure(code: int, said: str, directory: Path, message: str) -> list[str]:
    faults = []
    if code != 1:
        faults.append(f"exit code {code}, 1 was expected")
    if message not in said:
        faults.append(f"no line says {message!r}: {said}")
    if "Traceback" in said:
        faults.append(f"a traceback: {said}")
    if "rerun the same command" not in said:
        faults.append("no line says how to resume")
    if (directory / "summary.json").exists() and summary(directory)["status"] != "failed":
        faults.append(f"the summary says {summary(directory)['status']}")
    newest, rejected = checkpoints.newest_valid(directory / "checkpoints")
    if newest is None or rejected or list(directory.glob("checkpoints/.step-*")):
        faults.append(f"the checkpoints are not as they were: {rejected}, {hashes(directory / 'checkpoints')}")
    return faults


def _resumed(
    disk: Path, directory: Path, scratch: Path, command: Sequence[str], last: int, faults: list[str]
) -> dict[str, Any]:
    make_room(disk, 64 * 1024)
    said = completed(command, scratch / "log")
    if f"resuming from {directory}/checkpoints/{checkpoint_name(last)} at step {last}" not in said:
        faults.append(f"the run did not go on from step {last}: {said}")
    difference, found = compare(directory, scratch / "undisturbed", STEPS)
    if difference:
        faults.append(f"the curve differs by {difference}")
    return {"went_on_from": last, "steps": len(lines(directory, "train")), "faults": faults + found}
