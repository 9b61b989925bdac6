"""Runs asked to stop at random moments: the step is finished and saved, the exit code is 75, nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.faults.kills import INTERVAL, compare, last_step, overrides_of
from tests.faults.sittings import LIMIT_SECONDS, Sitting, completed
from tests.training.runs import summary
from training.exits import EXIT_PREEMPTED
from training.reliability import checkpoints
from training.reliability.signals import STOP_SIGNALS

#: A process told twice has ended by then, whatever it was doing.
AT_ONCE_SECONDS = 5.0


def stop_again_and_again(
    corpus: Sequence[str], scratch: Path, stops: int, seed: int, *overrides: str, ranks: int = 1
) -> dict[str, Any]:
    """Signal a run at `stops` random moments of its loop, restart it each time, and compare the final result.

    Of several ranks only one is signalled. Checkpoints are due only at the end, so every save is due to a signal.
    """
    steps = 12 * stops + 20
    given = ("checkpoint.interval=1000", *overrides)
    log, directory = scratch / "log", scratch / "run"
    completed(overrides_of(corpus, scratch, "undisturbed", steps, *given), log, ranks)
    total = summary(scratch / "undisturbed")["ledger"]
    pace = sum(entry["seconds"] for entry in total.values()) / steps
    command = overrides_of(corpus, scratch, "run", steps, *given)
    generator = np.random.default_rng(seed)
    faults: list[str] = []
    honoured, seconds, lost = Counter[str](), [], 0
    for number in range(stops):
        sitting = Sitting(command, log, ranks)
        assert sitting.wait_until(lambda s=sitting: "run directory" in s.said())
        time.sleep(generator.uniform(0, 3 * INTERVAL * pace))
        chosen = STOP_SIGNALS[number % len(STOP_SIGNALS)]
        began = time.monotonic()
        sitting.signal(chosen, int(generator.integers(ranks)) if ranks > 1 else None)
        codes = sitting.wait()
        seconds.append(time.monotonic() - began)
        if codes != [EXIT_PREEMPTED] * ranks:
            faults.append(f"{chosen.name}: exit codes {codes}: {sitting.said()}")
            continue
        honoured[chosen.name] += 1
        newest = next(iter(checkpoints.available(directory / "checkpoints")), None)
        at = checkpoints.step_of(newest) if newest is not None else 0
        lost += last_step(directory) - at
        if "before training started" not in sitting.said() and summary(directory)["status"] != "preempted":
            faults.append(f"{chosen.name}: the summary says {summary(directory)['status']}")
    completed(command, log, ranks)
    difference, found = compare(directory, scratch / "undisturbed", steps)
    if lost:
        faults.append(f"{lost} steps were made and not saved")
    return {
        "ranks": ranks,
        "signals": stops,
        "honoured": sum(honoured.values()),
        "by_signal": dict(honoured),
        "steps_lost": lost,
        "seconds_to_the_end": {"median": round(float(np.median(seconds)), 3), "longest": round(max(seconds), 3)},
        "largest_difference": difference,
        "faults": faults + found,
    }


def stop_twice(corpus: Sequence[str], scratch: Path, times: int, seed: int) -> dict[str, Any]:
    """Send two signals within one long step: the second ends the process immediately, unless it is SIGHUP."""
    second_signals = [number for number in STOP_SIGNALS if number != signal.SIGHUP]
    generator = np.random.default_rng(seed)
    long_step = ("train.global_batch_size=4096", "train.micro_batch_size=64", "train.sequence_length=32")
    command = overrides_of(corpus, scratch, "long", 24, *long_step)
    faults, seconds, at_once = [], [], 0
    for number in range(times):
        log = scratch / "log"
        sitting = Sitting([*command, "overwrite=true"], log)
        assert sitting.wait_until(lambda s=sitting: "step 0/24" in s.said())
        time.sleep(0.2)
        chosen = second_signals[number % len(second_signals)]
        sitting.signal(chosen)
        assert sitting.wait_until(lambda s=sitting: "finishing the step" in s.said())
        time.sleep(generator.uniform(0.02, 0.3))
        began = time.monotonic()
        sitting.signal(chosen)
        (code,) = sitting.wait()
        seconds.append(time.monotonic() - began)
        if code == 128 + chosen and seconds[-1] <= AT_ONCE_SECONDS:
            at_once += 1
        else:
            faults.append(f"{chosen.name} twice: exit code {code} after {seconds[-1]:.2f} s: {sitting.said()}")
    return {"tried": times, "at_once": at_once, "longest_seconds": round(max(seconds), 3), "faults": faults}


def stop_torchrun(corpus: Sequence[str], scratch: Path, times: int, seed: int) -> dict[str, Any]:
    """Signal torchrun and all its processes together, as systemd and some clusters do; torchrun also passes it on."""
    generator = np.random.default_rng(seed)
    command = overrides_of(corpus, scratch, "run", 30 * times + 20, "checkpoint.interval=1000", "strategy=ddp")
    directory, root = scratch / "run", Path(__file__).resolve().parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", os.fspath(root / "train.py")]
    environment = {**os.environ, "PYTHONPATH": os.fspath(root), "OMP_NUM_THREADS": "1"}
    faults, seconds, honoured, done = [], [], 0, 0
    for number in range(times):
        chosen = STOP_SIGNALS[number % len(STOP_SIGNALS)]
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen([*launch, *command], env=environment, stderr=log, stdout=log, cwd=scratch)
            until = time.monotonic() + LIMIT_SECONDS
            while last_step(directory) <= done and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(generator.uniform(0, 0.2))
            began = time.monotonic()
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                one.send_signal(chosen)
            process.wait(LIMIT_SECONDS)
        seconds.append(time.monotonic() - began)
        done = last_step(directory)
        newest = next(iter(checkpoints.available(directory / "checkpoints")), None)
        if newest is not None and checkpoints.step_of(newest) == done and summary(directory)["status"] == "preempted":
            honoured += 1
        else:
            faults.append(f"{chosen.name}: {newest} at step {done}: {(scratch / 'log').read_text()[-3000:]}")
    return {
        "ranks": 2,
        "signals": times,
        "honoured": honoured,
        "steps_lost": 0 if not faults else None,
        "seconds_to_the_end": {"median": round(float(np.median(seconds)), 3), "longest": round(max(seconds), 3)},
        "faults": faults,
    }


def time_of_a_large_save(corpus: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Time a run of tens of millions of weights from the signal to its end: the rest of a step, and the save."""
    command = overrides_of(
        corpus,
        scratch,
        "large",
        1000,
        *("model=gpt2_30m", "model.n_embd=768", "train.global_batch_size=1", "eval.interval=1000"),
        *("eval.tokens=32", "checkpoint.interval=1000"),
    )
    sitting = Sitting(command, scratch / "log")
    directory = scratch / "large"
    metrics = directory / "metrics.jsonl"
    assert sitting.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b'"train"') >= 3, poll=0.01)
    began = time.monotonic()
    sitting.signal(signal.SIGTERM)
    codes = sitting.wait()
    seconds = time.monotonic() - began
    said = summary(directory)
    newest = checkpoints.available(directory / "checkpoints")[0]
    return {
        "parameters": said["parameters"],
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "save_seconds": round(said["ledger"]["checkpoint"]["seconds"], 2),
        "seconds_to_the_end": round(seconds, 2),
        "faults": [] if codes == [EXIT_PREEMPTED] else [f"exit codes {codes}: {sitting.said()}"],
    }


def shrink_shards(corpus: Sequence[str], scratch: Path, times: int, seed: int) -> dict[str, Any]:
    """Truncate a token shard during a run at a random moment: the run saves and ends, and resumes once it is restored."""
    generator = np.random.default_rng(seed)
    given = next(Path(o.split("=", 1)[1]) for o in corpus if o.startswith("data.directory="))
    tokens = scratch / "tokens"
    shutil.copytree(given, tokens)
    mine = [*corpus, f"data.directory={tokens}"]
    steps, log = 400, scratch / "log"
    completed(overrides_of(mine, scratch, "undisturbed", steps, "checkpoint.interval=1000"), log)
    faults, seconds = [], []
    for number in range(times):
        name = f"run-{number}"
        command = overrides_of(mine, scratch, name, steps, "checkpoint.interval=1000")
        split = ("train", "validation")[number % 2]
        shard = sorted(tokens.glob(f"*/{split}-*.npy"))[0]
        content = shard.read_bytes()
        sitting = Sitting(command, log)
        assert sitting.wait_until(lambda n=name: last_step(scratch / n) > 0)
        time.sleep(generator.uniform(0, 0.2))
        # The run evaluates only on the first 256 tokens.
        os.truncate(shard, int(generator.integers(200, len(content) // 2 if split == "train" else 500)))
        began = time.monotonic()
        (code,) = sitting.wait()
        seconds.append(time.monotonic() - began)
        shard.write_bytes(content)
        said = sitting.said()
        newest = next(iter(checkpoints.available(scratch / name / "checkpoints")), None)
        if code != 1 or shard.name not in said or "Traceback" in said:
            faults.append(f"{split}: exit code {code}: {said[-500:]}")
        elif newest is None or checkpoints.step_of(newest) != last_step(scratch / name):
            faults.append(f"{split}: step {last_step(scratch / name)} was made, {newest} was saved")
        completed(command, log)
        difference, found = compare(scratch / name, scratch / "undisturbed", steps)
        faults += [f"{split}: {fault}" for fault in found] + (
            [f"{split}: differs by {difference}"] if difference else []
        )
    return {"tried": times, "longest_seconds": round(max(seconds), 2), "faults": faults}
