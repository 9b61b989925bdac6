"""Whole runs of small models on a CPU: seconds of `train.py` from start to end, against another commit of this repository.

    python benchmarks/small_models.py                        gpt2_micro and gpt2_mini: 25 minutes on two cores
    python benchmarks/small_models.py --against HEAD~1       default: the last commit before small models were looked at

A run has 500 steps of 16 sequences of 256 tokens, a vocabulary of 4,096, Sophia-G, and an evaluation of 65,536 tokens
every 50 steps. The commits take turns, run after run, with all threads; each has a compiler cache of its own, filled by a
short run before. A second short run measures what every run costs, such as start-up; the framework's own share is that of
the other steps' time that is neither forward, backward nor optimizer. Prints a table and writes it, with where the time
goes, to results/benchmarks/small_models.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.record import provenance, write_results
from training.records import read_summary

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "results" / "benchmarks" / "small_models.json"
BEFORE = "321b834"
MODELS = ("gpt2_micro", "gpt2_mini")
RUN = (
    *("optimizer=sophiag", "data=sample", "tokenizer=bpe", "tokenizer.vocab_size=4096"),
    *("train.global_batch_size=16", "train.sequence_length=256", "train.precision=auto", "train.compile=true"),
    *("eval.interval=50", "eval.tokens=65536", "eval.micro_batch_size=16", "checkpoint.interval=null"),
)
TARGET = 1.6  # smallest ratio of tokens per second
OVERHEAD_TARGET = 0.03
SHORT = 12  # steps, with one refresh
#: What a training step is made of; the rest of the time between evaluations is the framework's own.
STEP = ("forward_backward", "curvature", "optimizer")
APART = ("evaluation", "checkpoint", "compilation")


@contextmanager
def worktree(commit: str, directory: Path) -> Iterator[Path]:
    """Check out a commit beside the repository's own tree."""
    git = ["git", "-C", os.fspath(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", os.fspath(directory), commit], check=True)
    try:
        yield directory
    finally:
        subprocess.run([*git, "remove", "--force", os.fspath(directory)], check=True)


def train(tree: Path, model: str, steps: int, scratch: Path) -> dict[str, Any]:
    """Run a tree's train.py once; return its seconds, and those of its parts."""
    name = f"{tree.name}-{model}-{time.monotonic_ns()}"
    own = [f"model={model}", f"train.steps={steps}", f"name={name}", f"output_dir={scratch / 'runs'}"]
    # The tree's own modules come first: Python puts the script's directory in front of an editable installation.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": os.fspath(scratch / f"cache-{tree.name}"), "PYTHONPATH": ""}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "train.py", *RUN, *own], cwd=tree, env=environment, capture_output=True, text=True
    )
    seconds = time.time() - started
    if done.returncode:
        raise RuntimeError(f"train.py of {tree} ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    directory = scratch / "runs" / name
    summary = read_summary(directory)
    assert summary is not None
    booked = {kind: entry["seconds"] for kind, entry in summary["ledger"].items()}
    return {"seconds": seconds, "loss": summary["final_val_loss"], "ledger": booked}


def overhead(run: dict[str, Any], short: dict[str, Any]) -> float:
    """The share of training time that the ledger books neither as part of a step nor apart from it."""

    def more(kinds: Sequence[str]) -> float:
        return sum(run["ledger"][kind] - short["ledger"][kind] for kind in kinds)

    return 1 - more(STEP) / (run["seconds"] - short["seconds"] - more(APART))


def measure(trees: dict[str, Path], models: Sequence[str], steps: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Return every run by model and tree; the trees take turns."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {model: {name: [] for name in trees} for model in models}
    for model in models:
        for tree in trees.values():
            train(tree, model, SHORT, scratch)  # compiles
        short = {name: train(tree, model, SHORT, scratch) for name, tree in trees.items()}
        for number in range(rounds):
            for name in sorted(trees, reverse=bool(number % 2)):
                run = train(trees[name], model, steps, scratch)
                run |= {"start": short[name]["seconds"], "overhead": overhead(run, short[name])}
                runs[model][name].append(run)
                print(f"{model}, {name}: {run['seconds']:.1f} s", flush=True)
    return runs


def judged(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return by model the medians of seconds, start-up and the framework's own share, and the speed-up."""

    def median(model: str, tree: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[model][tree])

    found: dict[str, Any] = {}
    for model in runs:
        before, here = (median(model, tree, "seconds") for tree in ("before", "here"))
        start, share = (median(model, "here", key) for key in ("start", "overhead"))
        found[model] = {"before": before, "here": here, "start": start, "overhead": share, "speed_up": before / here}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=BEFORE, metavar="COMMIT")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-small-") as directory:
        scratch = Path(directory)
        with worktree(options.against, scratch / "before") as before:
            runs = measure({"here": ROOT, "before": before}, options.models, options.steps, options.rounds, scratch)
    found = judged(runs)
    about = {"against": options.against, "steps": options.steps, "run": list(RUN)}
    targets = {"speed_up": TARGET, "overhead": OVERHEAD_TARGET}
    results = provenance(torch.device("cpu")) | about | {"targets": targets, "models": found, "runs": runs}
    print("\n".join(page.small_models(results)))
    write_results(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
