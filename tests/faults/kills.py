"""A run killed by SIGKILL repeatedly at random moments: in set-up, between steps, in a step, in a save.

After the last kill the run is started once more and completes. It must then have the record of an undisturbed run, every
line once, and the same weights and optimizer state.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.sittings import Sitting, completed
from tests.training.runs import CLOCKED, curve, lines, summary, tiny
from training.records import checkpoint_name
from training.reliability import checkpoints
from training.reliability.checkpoints import Checkpoint

INTERVAL = 5
# Kill at any moment; in the loop; in a save, between its first file and its rename.
MOMENTS = {"any": 0.2, "loop": 0.35, "save": 0.45}
# How often only one of several ranks is killed, after rendezvous, so that the others must notice.
ONE_RANK = 0.3
#: How long ranks may outlive one of them.
SURVIVORS_SECONDS = 60.0


def overrides_of(corpus: Sequence[str], output_dir: Path, name: str, steps: int, *overrides: str) -> list[str]:
    """A run of `steps` steps with a checkpoint every five, an evaluation every eight, a refresh every three."""
    given = [f"train.steps={steps}", f"checkpoint.interval={INTERVAL}", "guards.weights_interval=7"]
    chosen = tiny(corpus, output_dir, *given, *overrides, name=name)
    return [o for o in chosen if not o.startswith("optimizer.hessian_interval=")] + ["optimizer.hessian_interval=3"]


def kill_again_and_again(
    corpus: Sequence[str], scratch: Path, kills: int, seed: int, *overrides: str, ranks: int = 1, steps: int = 0
) -> dict[str, Any]:
    """Kill a run `kills` times and compare the result with an undisturbed run.

    Returns counts, and one line for each fault under `faults`.
    """
    steps = steps or 10 * kills + 20
    log = scratch / "log"
    pace = _undisturbed(overrides_of(corpus, scratch, "undisturbed", steps, *overrides), log, ranks, scratch, steps)

    generator = np.random.default_rng(seed)
    command = overrides_of(corpus, scratch, "run", steps, *overrides)
    directory = scratch / "run"
    began = time.monotonic()
    moments, sittings = Counter[str](), 0
    in_save = repeated = completed_early = 0
    expected: int | None = None  # the step from which the next sitting must resume
    faults: list[str] = []
    survivors: list[float] = []
    while sum(moments.values()) < kills:
        sittings += 1
        sitting = Sitting(command, log, ranks)
        moment = str(generator.choice(list(MOMENTS), p=list(MOMENTS.values())))
        _wait_for(moment, sitting, directory, generator, pace)
        alone = ranks > 1 and moment != "any" and generator.random() < ONE_RANK
        victim = int(generator.integers(ranks)) if alone else None
        if not sitting.running:
            completed_early += 1
            break
        sitting.kill(victim)
        killed = time.monotonic()
        codes = sitting.wait(SURVIVORS_SECONDS)
        if victim is not None:
            survivors.append(time.monotonic() - killed)
        if -9 not in codes:
            completed_early += 1
            break
        if any(code == 0 for code in codes):
            faults.append(f"sitting {sittings}: a rank ended with 0 although rank {victim} was killed: {codes}")
        moments[moment] += 1
        faults += _faults_of_sitting(sittings, sitting.said(), expected)
        in_save += any(directory.glob("checkpoints/.step-*.partial"))
        newest = next(iter(checkpoints.available(directory / "checkpoints")), None)
        expected = checkpoints.step_of(newest) if newest is not None else None
        repeated = max(repeated, last_step(directory) - (expected or 0))
    seconds = time.monotonic() - began
    faults += _faults_of_sitting(sittings + 1, completed(command, log, ranks), expected)
    difference, found = compare(directory, scratch / "undisturbed", steps)
    return {
        "ranks": ranks,
        "steps": steps,
        "kills": sum(moments.values()),
        "moments": dict(sorted(moments.items())),
        "in_a_save": in_save,
        "one_rank_alone": len(survivors),
        "survivors_seconds": max(survivors, default=None),
        "ended_before_the_kill": completed_early,
        "most_steps_repeated": repeated,
        "largest_difference": difference,
        "seconds": round(seconds, 1),
        "faults": faults + found,
    }


@dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: to its first step, per step with everything included, and per save."""

    start: float
    step: float
    save: float


def _undisturbed(command: Sequence[str], log: Path, ranks: int, scratch: Path, steps: int) -> Pace:
    sitting = Sitting(command, log, ranks)
    began = time.monotonic()
    sitting.wait_until(lambda: "run directory" in sitting.said())
    start = time.monotonic() - began
    codes = sitting.wait()
    assert codes == [0] * ranks, f"exit codes {codes}:\n{sitting.said()}"
    ledger = summary(scratch / "undisturbed")["ledger"]
    saving = ledger["checkpoint"]["seconds"] / ledger["checkpoint"]["count"]
    return Pace(start, sum(entry["seconds"] for entry in ledger.values()) / steps, saving)


def _wait_for(moment: str, sitting: Sitting, directory: Path, generator: np.random.Generator, pace: Pace) -> None:
    """Wait until the moment of the kill, or until the sitting ends."""
    if moment == "any":
        time.sleep(generator.uniform(0, pace.start + 2 * INTERVAL * pace.step))
        return
    if not sitting.wait_until(lambda: "run directory" in sitting.said()):
        return
    if moment == "loop":
        time.sleep(generator.uniform(0, 3 * INTERVAL * pace.step))
        return

    def saves() -> bool:
        for partial in directory.glob("checkpoints/.step-*.partial"):
            try:
                if partial.stat().st_mtime >= sitting.began:
                    return True
            except FileNotFoundError:
                return True  # renamed this instant
        return False

    if sitting.wait_until(saves, poll=0.0):
        time.sleep(generator.uniform(0, 1.1 * pace.save))


def _faults_of_sitting(number: int, said: str, expected: int | None) -> list[str]:
    """Check that a sitting resumed from the newest complete checkpoint and skipped none."""
    faults = [f"sitting {number}: {line}" for line in said.splitlines() if "checkpoint skipped" in line]
    found = re.search(r"resuming from \S*step-(\d+)", said)
    if found and int(found.group(1)) != expected:
        faults.append(f"sitting {number} resumed from step {int(found.group(1))}, {expected} was saved")
    if "run directory" in said and expected and not found:
        faults.append(f"sitting {number} started over although step {expected} was saved")
    return faults


def last_step(directory: Path) -> int:
    """Return the step of the newest train line in the record."""
    metrics = directory / "metrics.jsonl"
    last = 0
    for line in metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []:
        if line.endswith(b"\n"):
            values = json.loads(line)
            last = values["step"] if values["kind"] == "train" else last
    return last


def compare(directory: Path, undisturbed: Path, steps: int) -> tuple[float, list[str]]:
    """Return the largest difference between two records and final states, and the missing or duplicate lines."""
    faults = []
    if summary(directory)["status"] != "completed":
        faults.append(f"the run ended as {summary(directory)['status']}")
    for kind, wanted in {
        "train": list(range(1, steps + 1)),
        "eval": [line["step"] for line in lines(undisturbed, "eval")],
        "hessian": [line["step"] for line in lines(undisturbed, "hessian")],
    }.items():
        found = [line["step"] for line in lines(directory, kind)]
        if found != wanted:
            faults.append(f"{kind} lines have a gap or are double: {found}")
    difference = 0.0
    for ours, theirs in zip(curve(directory), curve(undisturbed), strict=False):
        difference = max(difference, _difference(ours, theirs))
    final = checkpoint_name(steps)
    ours, theirs = (Checkpoint(root / "checkpoints" / final) for root in (directory, undisturbed))
    if set(ours.names()) != set(theirs.names()):
        faults.append("the final checkpoints hold other tensors")
        return difference, faults
    for name in theirs.names():
        if not torch.equal(ours.tensor(name), theirs.tensor(name)):
            gap = (ours.tensor(name).double() - theirs.tensor(name).double()).abs().max().item()
            difference = max(difference, gap)
    return difference, faults


def _difference(one: Any, other: Any) -> float:
    """Return the largest difference between two lines' numbers; infinite if their keys differ."""
    match one, other:
        case dict(), dict():
            if one.keys() != other.keys():
                return float("inf")
            return max((_difference(one[key], other[key]) for key in one if key not in CLOCKED), default=0.0)
        case list(), list():
            if len(one) != len(other):
                return float("inf")
            return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
        case ((int() | float()), (int() | float())):
            return abs(float(one) - float(other))
    return 0.0 if one == other else float("inf")
