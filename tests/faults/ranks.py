"""Ranks that do not belong together: started with different configurations, or left over from a killed launcher.

A curve must never mix two configurations, and no rank may outlive its launcher.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data.manifest import load_manifest
from tests.faults.kills import compare, last_step, overrides_of
from tests.faults.sittings import LIMIT_SECONDS, Sitting, completed, free_port

ROOT = Path(__file__).resolve().parents[2]
#: How long a rank may outlive its launcher.
ORPHAN_SECONDS = 15.0
#: Overrides of the second of two ranks only.
APART = (
    *("seeds.data=7", "seeds.curvature=7", "seeds.model=7", "optimizer.lr=1e-4", "optimizer.batch_fraction=1.0"),
    *("optimizer.hessian_interval=4", "optimizer=sophiah", "train.global_batch_size=16", "train.sequence_length=8"),
    *("train.micro_batch_size=1", "train.steps=30", "train.grad_clip=0.5", "train.precision=bf16", "eval.interval=5"),
    *("eval.tokens=128", "model.n_layer=1", "model.n_embd=64", "schedule.final_ratio=0.5", "checkpoint.interval=7"),
    *("guards.weights_interval=5", "train.max_skipped_steps=3", "strategy=fsdp"),
)


def ranks_that_differ(corpus: Sequence[str], scratch: Path, apart: Sequence[str] = APART) -> dict[str, Any]:
    """Start two ranks, the second with another configuration, as on a node where somebody edited the command."""
    faults = []
    for number, override in enumerate(apart):
        command = overrides_of(corpus, scratch, f"run-{number}", 24)
        sitting = Sitting(command, scratch / "log", ranks=2, own={1: [override]})
        try:
            codes = sitting.wait(60)
        except AssertionError:
            faults.append(f"{override}: hangs")
            continue
        said, key = sitting.said(), override.split("=")[0]
        if codes != [2, 2]:
            faults.append(f"{override}: exit codes {codes}: {said[-300:]}")
        elif key not in said or "Traceback" in said:
            faults.append(f"{override}: {said[-300:]}")
        if (scratch / f"run-{number}").exists():
            faults.append(f"{override}: a run directory was made")
    return {"tried": len(apart), "refused": len(apart) - len(faults), "faults": faults}


def other_corpus(corpus: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Start two ranks; the second finds other tokens at the configured path."""
    directory = next(Path(o.split("=", 1)[1]) for o in corpus if o.startswith("data.directory="))
    other = scratch / "tokens"
    shutil.copytree(directory, other)
    (tokens,) = other.iterdir()
    manifest = load_manifest(tokens)
    train = manifest.splits["train"]
    shard = tokens / train.shards[0].file
    np.save(shard, np.load(shard)[::-1])
    changed = replace(train.shards[0], sha256=hashlib.sha256(shard.read_bytes()).hexdigest())
    splits = {**manifest.splits, "train": replace(train, shards=(changed, *train.shards[1:]))}
    replace(manifest, splits=splits).write(tokens)
    command = overrides_of(corpus, scratch, "run", 24)
    sitting = Sitting(command, scratch / "log", ranks=2, own={1: [f"data.directory={other}"]})
    codes = sitting.wait(60)
    good = codes == [2, 2] and not (scratch / "run").exists()
    return {"tried": 1, "refused": int(good), "faults": [] if good else [f"{codes}: {sitting.said()[-300:]}"]}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.fspath(ROOT), "OMP_NUM_THREADS": "1"}


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_launchers(corpus: Sequence[str], scratch: Path, times: int, seed: int) -> dict[str, Any]:
    """SIGKILL the launcher of the ranks at a random moment between its start and the middle of the loop.

    In turn: ranks started by train.py, by torchrun with a fixed port, and two trials of a sweep in parallel. The run is
    restarted immediately, on the same port, while the old ranks may still exist.
    """
    generator = np.random.default_rng(seed)
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--node-rank=0", "--nproc-per-node=2"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "train.py")]
    plain = [sys.executable, str(ROOT / "train.py")]
    kinds: dict[str, Callable[[str], list[str]]] = {
        "train": lambda name: [*plain, *overrides_of(corpus, scratch, name, 400), "launcher.nproc_per_node=2"],
        "torchrun": lambda name: [*torchrun, *overrides_of(corpus, scratch, name, 400)],
    }
    for kind in kinds:
        completed(overrides_of(corpus, scratch, f"undisturbed-{kind}", 400), scratch / "log", 2)
    faults, longest, killed = [], 0.0, 0
    for number in range(times):
        kind = list(kinds)[number % len(kinds)]
        name = f"{kind}-{number}"
        with (scratch / "launcher.log").open("wb") as log:
            process = subprocess.Popen(kinds[kind](name), env=_environment(), stdout=log, stderr=log, cwd=scratch)
            until = time.monotonic() + LIMIT_SECONDS
            while len(_family(process)) < 2 and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            if number % 4 < 2:  # during start-up: the ranks wait for each other
                time.sleep(float(generator.uniform(0, 4)))
            else:
                while last_step(scratch / name) < 1 and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.02)
            family = _family(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += 1
        command = kinds[kind](name)
        again = subprocess.Popen(
            command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=scratch, text=True
        )
        began = time.monotonic()
        _, alive = psutil.wait_procs(family, ORPHAN_SECONDS)
        longest = max(longest, time.monotonic() - began)
        faults += [f"{name}: {one} outlives its launcher by {ORPHAN_SECONDS:.0f} s" for one in alive]
        for one in alive:
            one.kill()
        try:
            said, _ = again.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            again.kill()
            faults.append(f"{name}: started again, it hangs")
            continue
        if again.returncode:  # the old ranks had the port or the run: refused, and the next start completes
            if "Traceback" in said and kind == "train":
                faults.append(f"{name}: {said[-400:]}")
            done = subprocess.run(command, env=_environment(), capture_output=True, cwd=scratch, text=True)
            if done.returncode:
                faults.append(f"{name}: exit code {done.returncode} at the second start: {done.stderr[-400:]}")
                continue
        difference, found = compare(scratch / name, scratch / f"undisturbed-{kind}", 400)
        faults += [f"{name}: {fault}" for fault in found]
        faults += [f"{name}: the curve differs by {difference}"] if difference > 1e-6 else []
    return {"killed": killed, "longest_orphan_seconds": round(longest, 1), "faults": faults}
