"""One run, one curve: compare each strategy with the single process, optimizer by optimizer.

    python -m tests.training.strategies.parity        the table, in results/parity/parity.md and parity.json
    python -m tests.training.strategies.parity --steps 10 --optimizers sophiag --strategies single fsdp×2

Every cell is a whole run of the same configuration in float32, with active gradient clipping and 1 or 2 micro-batches per
step. The comparison covers the loss before each update and the curvature h in the final checkpoint. Ranks are processes on
this machine (gloo).
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.files import write_atomically
from training.compose import compose
from training.config import ConfigurationError, RunConfig
from training.records import RunRecord
from training.reliability.checkpoints import newest_valid

#: The worlds: name, ranks, overrides.
STRATEGIES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["strategy=single"]),
    "ddp×2": (2, ["strategy=ddp"]),
    "ddp×4": (4, ["strategy=ddp"]),
    "fsdp×2": (2, ["strategy=fsdp"]),
    "zero1×2": (2, ["strategy=deepspeed", "strategy.zero_stage=1"]),
    "zero2×2": (2, ["strategy=deepspeed", "strategy.zero_stage=2"]),
    "zero3×2": (2, ["strategy=deepspeed", "strategy.zero_stage=3"]),
}
#: Learning rates of the paper's 770M recipes. A sign is a step: where m is rounding noise (and h small or negative) two runs
#: may move a coordinate to either side, 2 lr apart, and the curvature there with it.
OPTIMIZERS: dict[str, list[str]] = {
    "adamw": ["optimizer=adamw", "optimizer.lr=2e-4"],
    "lion": ["optimizer=lion", "optimizer.lr=8e-5"],
    "sophiag": ["optimizer=sophiag", "optimizer.lr=3e-4"],
    "sophiah": ["optimizer=sophiah", "optimizer.lr=3e-4"],
    "sophiah, differences": [
        *("optimizer=sophiah", "optimizer.lr=3e-4", "optimizer.estimator=hutchinson_differences"),
    ],
}
#: Largest relative differences that count as parity. Central differences divide rounding noise by a small δ.
TOLERANCES = {"loss": 1e-5, "h": 1e-5, "h, differences": 1e-3}
GLOBAL_BATCH_SIZE = 8
ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.training.strategies.parity"
CLIP = 0.5  # below the gradient norms of the first steps: the clip acts


@dataclass(frozen=True)
class Cell:
    """One strategy, optimizer and accumulation, compared with the single process."""

    strategy: str
    optimizer: str
    accumulation: int
    refused: str | None = None  # why the pair is impossible
    steps: int = 0
    clipped_steps: int = 0
    loss_difference: float | None = None  # largest |Δ loss| over the steps, in nats
    h_difference: float | None = None  # ‖h - h_single‖ / ‖h_single‖ over all parameters
    weights_apart: int = 0  # that end further from the single process's than a tenth of the learning rate

    @property
    def within(self) -> bool | None:
        """Return whether the cell shows parity; None for a refused pair."""
        if self.refused is not None:
            return None
        key = "h, differences" if "differences" in self.optimizer else "h"
        return (self.loss_difference or 0.0) <= TOLERANCES["loss" if key == "h" else key] and (
            self.h_difference or 0.0
        ) <= TOLERANCES[key]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "parity")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        return work(arguments.worker)
    corpus = ["data=sample", "tokenizer=bpe", "tokenizer.vocab_size=1024", "model=gpt2_nano"]
    with tempfile.TemporaryDirectory() as directory:
        strategies = list(dict.fromkeys(("single", *arguments.strategies)))
        cells = measure(Path(directory), corpus, strategies, arguments.optimizers, arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "tolerances": TOLERANCES, "cells": [asdict(cell) for cell in cells]}
    write_atomically(arguments.output / "parity.json", json.dumps(record, indent=1) + "\n")
    write_atomically(arguments.output / "parity.md", table(cells))
    print(table(cells))
    return 0 if all(cell.within is not False for cell in cells) else 1


def measure(
    directory: Path,
    corpus: Sequence[str],
    strategies: Iterable[str],
    optimizers: Iterable[str],
    steps: int,
) -> list[Cell]:
    """Run every cell below `directory`, one launch of ranks for each world size.

    Args:
        corpus: overrides that choose model, data and tokenizer.
    """
    cells, jobs = plan(directory, corpus, strategies, optimizers, steps)
    for world_size, listed in sorted(jobs.items()):
        run_jobs(listed, world_size, directory)
    return [cell if cell.refused else compared(cell, directory) for cell in cells]


def plan(
    directory: Path,
    corpus: Sequence[str],
    strategies: Iterable[str],
    optimizers: Iterable[str],
    steps: int,
    accumulations: Sequence[int] = (1, 2),
) -> tuple[list[Cell], dict[int, list[dict[str, Any]]]]:
    """The cells, not yet filled but for refusals, and the configurations of their runs by world size."""
    cells: list[Cell] = []
    jobs: dict[int, list[dict[str, Any]]] = {}
    for strategy, optimizer, accumulation in itertools.product(strategies, optimizers, accumulations):
        cell = Cell(strategy, optimizer, accumulation)
        try:
            config = compose(overrides(cell, directory, corpus, steps)).model_dump(mode="json")
            jobs.setdefault(STRATEGIES[strategy][0], []).append(config)
        except ConfigurationError as error:
            cell = replace(cell, refused=str(error))
        cells.append(cell)
    return cells, jobs


def overrides(cell: Cell, directory: Path, corpus: Sequence[str], steps: int) -> list[str]:
    """Return the command line of a cell's run."""
    world_size, strategy = STRATEGIES[cell.strategy]
    micro = GLOBAL_BATCH_SIZE // (world_size * cell.accumulation)
    return [
        *corpus,
        *strategy,
        *OPTIMIZERS[cell.optimizer],
        f"name={run_name(cell)}",
        f"output_dir={directory}",
        f"train.steps={steps}",
        f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
        f"train.micro_batch_size={micro}",
        "train.sequence_length=64",
        "train.precision=fp32",
        "train.compile=false",
        "train.device=cpu",
        f"train.grad_clip={CLIP}",
        f"eval.interval={steps}",
        "eval.tokens=1024",
        "checkpoint.interval=null",
        *(
            []
            if "lion" in OPTIMIZERS[cell.optimizer][0] or "adamw" in cell.optimizer
            else ["optimizer.hessian_interval=5"]
        ),
    ]


def run_name(cell: Cell) -> str:
    words = f"{cell.strategy}-{cell.optimizer}-{cell.accumulation}".replace("×", "x").replace(",", "")
    return words.replace(" ", "-")


def run_jobs(jobs: list[dict[str, Any]], world_size: int, directory: Path, timeout: float = 3600) -> None:
    """Run configurations one after another in one launch of `world_size` ranks.

    Raises:
        RuntimeError: a job or a rank failed; the message ends with the ranks' output.
    """
    listing = directory / f"jobs-{world_size}.json"
    write_atomically(listing, json.dumps(jobs))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, "-m", MODULE, "--worker", str(listing)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{world_size} ranks failed (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-6000:]}"
        )


def work(listing: Path) -> int:
    """Run every listed job as one rank, which joins the others once. Returns the first nonzero exit code."""
    import torch.distributed as dist

    from training.distributed import destroy_process_groups
    from training.run import execute

    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    try:
        for job in json.loads(listing.read_text()):
            outcome = execute(RunConfig.model_validate(job))
            if outcome.status != "completed":
                print(f"{job['name']}: {outcome.status}", file=sys.stderr)
                return outcome.exit_code
    finally:
        destroy_process_groups()
    return 0


def compared(cell: Cell, directory: Path) -> Cell:
    """Return the cell with its differences from the single process without accumulation."""
    run = directory / run_name(cell)
    reference = directory / run_name(Cell("single", cell.optimizer, 1))
    losses, there = train_lines(run), train_lines(reference)
    here, single = (tensors(directory, "model.") for directory in (run, reference))
    far = max(line["lr"] for line in losses) / 10
    return replace(
        cell,
        steps=len(losses),
        clipped_steps=sum(line["clipped_norm"] for line in losses),
        loss_difference=max(abs(a["loss"] - b["loss"]) for a, b in zip(losses, there, strict=True)),
        h_difference=relative_difference(curvature(run), curvature(reference)),
        weights_apart=sum(int(((here[name] - single[name]).abs() > far).sum()) for name in single),
    )


def train_lines(run: Path) -> list[dict[str, Any]]:
    return list(RunRecord.open(run).metrics("train"))


def curvature(run: Path) -> dict[str, torch.Tensor]:
    """Return h by parameter name from the run's checkpoint; empty for a method without h."""
    return {name: h for name, h in tensors(run, "optimizer.").items() if name.endswith(".hessian")}


def tensors(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors with a prefix in the run's newest checkpoint, by name."""
    checkpoint, rejected = newest_valid(run / "checkpoints")
    if checkpoint is None:
        raise RuntimeError(f"{run} has no checkpoint: {rejected}")
    return {name: checkpoint.tensor(name) for name in checkpoint.names() if name.startswith(prefix)}


def relative_difference(values: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float | None:
    """‖a - b‖ / ‖b‖ over all tensors; None if there are none."""
    if not reference:
        return None
    if values.keys() != reference.keys():
        raise RuntimeError(f"curvature of other parameters: {values.keys() ^ reference.keys()}")
    square = sum(float((values[name] - reference[name]).double().square().sum()) for name in reference)
    return math.sqrt(square / sum(float(h.double().square().sum()) for h in reference.values()))


def table(cells: Sequence[Cell]) -> str:
    """Return a Markdown table: a row per strategy and accumulation, a column per optimizer."""
    optimizers = list(dict.fromkeys(cell.optimizer for cell in cells))
    by_place = {(cell.strategy, cell.accumulation, cell.optimizer): cell for cell in cells}
    steps = max(cell.steps for cell in cells)
    lines = [
        "# Parity of the strategies",
        "",
        f"Each cell: the largest difference of the loss over {steps} steps (nats) / relative difference of h at the "
        "end, both against `single` without accumulation. Float32, gradient clip active, ranks on one CPU. "
        f"Within tolerance: loss and h {TOLERANCES['h']:g}, central differences {TOLERANCES['h, differences']:g}; "
        "a cell beyond is marked ✗.",
        "",
        "| strategy | accumulation | " + " | ".join(optimizers) + " |",
        "|---|---|" + "---|" * len(optimizers),
    ]
    rows = dict.fromkeys((cell.strategy, cell.accumulation) for cell in cells)
    for strategy, accumulation in rows:
        entries = [entry(by_place[strategy, accumulation, optimizer]) for optimizer in optimizers]
        lines.append(f"| {strategy} | {accumulation} | " + " | ".join(entries) + " |")
    apart = [cell for cell in cells if cell.weights_apart]
    runs = sum(cell.refused is None for cell in cells)
    lines += [
        "",
        f"Learning rates: {learning_rates(optimizers)}. In {len(apart)} of {runs} runs some weights, at most "
        f"{max((cell.weights_apart for cell in apart), default=0)}, end more than a tenth of the learning rate from the "
        "single process's: a step along a sign has two sides, and rounding chooses where the momentum is rounding noise.",
    ]
    refusals = list(dict.fromkeys(cell.refused for cell in cells if cell.refused))
    if refusals:
        lines += ["", "Refused when the configuration is validated:", "", *(f"- {reason}" for reason in refusals)]
    return "\n".join(lines) + "\n"


def learning_rates(optimizers: Sequence[str]) -> str:
    rates = {override.partition("=")[2] for name in optimizers for override in OPTIMIZERS[name] if ".lr=" in override}
    return ", ".join(
        f"{rate} ({', '.join(name for name in optimizers if f'optimizer.lr={rate}' in OPTIMIZERS[name])})"
        for rate in sorted(rates, key=float)
    )


def entry(cell: Cell) -> str:
    if cell.refused is not None:
        return "refused"
    text = f"{cell.loss_difference:.1e}"
    if cell.h_difference is not None:
        text += f" / {cell.h_difference:.1e}"
    return text if cell.within else f"{text} ✗"


if __name__ == "__main__":
    sys.exit(main())
