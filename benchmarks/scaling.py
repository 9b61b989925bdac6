"""How cost grows: the slope of log time over log size, which theory puts at 1; larger slopes are flagged.

    python benchmarks/scaling.py                     all families: about ten minutes on two cores
    python benchmarks/scaling.py --only optimizer analysis

| family       | size                                                                       |
|--------------|----------------------------------------------------------------------------|
| width, depth, length, batch | model FLOPs of a training step, growing in this dimension alone |
| optimizer    | parameters of an optimizer step                                            |
| preparation  | bytes of the corpus                                                        |
| analysis     | number of runs whose records are read and compared                         |

The sizes of a family take turns, round after round, in one process. Each time is the smallest of its rounds, since other
load only adds. A slope below 1 means that small sizes have fixed costs. Prints a table and writes it, with the hardware,
to results/benchmarks/scaling.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.results import analyse
from analysis.runs import load_runs
from analysis.trials import study_of_runs
from benchmarks import page
from benchmarks.data_pipeline import prepare_here, repeated_sample
from benchmarks.record import provenance, write_results
from models import GPT2, GPT2Config
from sophia import SophiaG
from training import hardware
from training.compose import compose
from training.records import MetricsWriter, find_runs, write_config, write_environment, write_summary
from training.strategies.gradients import clip_and_step

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "scaling.json"

#: A slope above 1 + TOLERANCE, over all sizes or between the two largest, is flagged as super-linear.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Case:
    """One size of a family: `call` does the work once."""

    label: str
    size: float
    call: Callable[[], object]


# ----------------------------------------------------------------------------------------------------------------
# Families: context managers that yield their cases.


BASE = GPT2Config(vocab_size=4096, n_layer=4, n_head=4, n_embd=256, block_size=256)
BATCH = 8
GROWN: dict[str, list[tuple[str, GPT2Config, int]]] = {
    "width": [(f"d = {64 * heads}", replace(BASE, n_embd=64 * heads, n_head=heads), BATCH) for heads in (2, 4, 8, 12)],
    "depth": [(f"{layers} layers", replace(BASE, n_layer=layers), BATCH) for layers in (2, 4, 8, 16)],
    "length": [(f"T = {length}", replace(BASE, block_size=length), BATCH) for length in (128, 256, 512, 1024)],
    "batch": [(f"{sequences} sequences", BASE, sequences) for sequences in (2, 4, 8, 16)],
}


def training_step(config: GPT2Config, sequences: int, device: torch.device) -> Case:
    """A training step, in bf16 if the device has units for it: forward, backward, clip, fused AdamW."""
    model = GPT2(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (sequences, config.block_size)
    tokens, targets = (torch.randint(config.vocab_size, shape, device=device) for _ in range(2))
    bf16 = device.type == "cuda" or hardware.describe(device)["bf16_units"]

    def call() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss_sum = model(tokens, targets).loss_sum
        (loss_sum / tokens.numel()).backward()
        clip_and_step([optimizer], 1.0)
        optimizer.zero_grad()

    return Case("", float(config.flops(config.block_size).forward_backward(tokens.numel())), call)


@contextmanager
def training_steps(kind: str, device: torch.device) -> Iterator[list[Case]]:
    yield [replace(training_step(config, sequences, device), label=label) for label, config, sequences in GROWN[kind]]


@contextmanager
def optimizer_steps(device: torch.device) -> Iterator[list[Case]]:
    """Sophia's step on GPT-2's shapes, from 7M to 124M parameters."""
    cases = []
    for layers, width in ((3, 256), (6, 384), (8, 512), (12, 768)):
        config = GPT2Config(vocab_size=50257 if width == 768 else 16384, n_layer=layers, n_head=4, n_embd=width)
        with torch.device("meta"):
            shapes = [p.shape for p in GPT2(config).parameters()]
        params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer = SophiaG(params, lr=1e-6)
        optimizer.update_hessian(num_predictions=1)
        count = config.parameter_count()
        cases.append(Case(f"{count / 1e6:.0f}M", count, optimizer.step))
    yield cases


@contextmanager
def preparations(megabytes: Sequence[float] = (5, 10, 20, 40)) -> Iterator[list[Case]]:
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as root:
        cases = []
        for size in megabytes:
            corpus = Path(root) / f"{size}.parquet"
            repeated_sample(corpus, size)

            def call(corpus: Path = corpus) -> None:
                directory = corpus.with_suffix("")
                directory.mkdir()
                prepare_here(corpus, directory, processes=2)
                shutil.rmtree(directory)

            cases.append(Case(f"{size} MB", size * 1e6, call))
        yield cases


@contextmanager
def analyses(counts: Sequence[int] = (50, 100, 200, 400), lines: int = 1000) -> Iterator[list[Case]]:
    """Read and analyse records of two arms, paired by seed, of `lines` metrics lines each."""
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as root:
        arms = [
            compose(["model=gpt2_nano", f"optimizer={arm}", f"train.steps={lines}"]).model_dump(mode="json")
            for arm in ("adamw", "sophiag")
        ]
        cases = []
        for count in counts:
            directory = Path(root) / str(count)
            for number in range(count):
                write_record(directory / str(number), arms[number % 2], number // 2)

            def call(directory: Path = directory) -> None:
                analyse(study_of_runs(load_runs(find_runs([directory]))))

            cases.append(Case(f"{count} runs", count, call))
        yield cases


def write_record(directory: Path, config: dict[str, Any], seed: int) -> None:
    """Write a completed run's record with made-up losses, only for timing."""
    steps = config["train"]["steps"]
    tokens = config["train"]["global_batch_size"] * config["train"]["sequence_length"]
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    seeds = {"model": seed, "data": seed, "curvature": seed}
    write_config(directory, config | {"name": directory.name, "seed": seed, "seeds": seeds})
    metrics = MetricsWriter(directory)
    loss = 0.0
    for step in range(1, steps + 1):
        loss = 8.0 * step**-0.1 + 0.01 * rng.standard_normal()
        counters = {"step": step, "tokens": step * tokens, "flops": step * 10**9, "seconds": 0.1 * step}
        train = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "clipped_norm": False, "tokens_per_second": 1e4}
        metrics.write({"kind": "train", **counters, **train})
        if step % (steps // 10) == 0:
            metrics.write({"kind": "eval", **counters, "val_loss": loss})
    metrics.close()
    entry = {"tokens": steps * tokens, "flops": steps * 10**9, "seconds": 0.1 * steps, "count": steps}
    none = {"tokens": 0, "flops": 0, "seconds": 0.0, "count": 0}
    kinds = ("curvature", "optimizer", "data", "evaluation", "checkpoint", "compilation")
    summary = {"status": "completed", "final_val_loss": loss, "best_val_loss": loss, "steps": steps, **entry}
    summary |= {"ledger": {"forward_backward": entry, **dict.fromkeys(kinds, none)}, "parameters": 10**6}
    write_summary(directory, summary | {"bytes_communicated": 0, "peak_memory_bytes": 10**8, "skipped_steps": 0})
    environment = {"versions": {}, "git": {"commit": None, "dirty": None}, "hardware": {"device": "cpu"}}
    hashes = {"data_manifest_sha256": "0" * 64, "initial_weights_sha256": f"{seed:064d}"}
    write_environment(directory, environment | hashes)


# ----------------------------------------------------------------------------------------------------------------


def families(device: torch.device) -> dict[str, Callable[[], Any]]:
    steps = {kind: lambda kind=kind: training_steps(kind, device) for kind in GROWN}
    return {**steps, "optimizer": lambda: optimizer_steps(device), "preparation": preparations, "analysis": analyses}


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """The slope of log seconds over log size, over all sizes (least squares) and between the two largest."""
    x, y = np.log(sizes), np.log(seconds)
    slope = float(np.polyfit(x, y, 1)[0])
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return {"slope": slope, "slope_at_the_end": last, "super_linear": max(slope, last) > 1 + TOLERANCE}


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> dict[str, Any]:
    def seconds(case: Case) -> float:
        began = time.perf_counter()
        case.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for case in cases:
        seconds(case)  # compiles, fills caches
    taken = [[seconds(case) for case in cases] for _ in range(rounds)]
    fastest = [min(column) for column in zip(*taken, strict=True)]
    sizes = [case.size for case in cases]
    labels = [case.label for case in cases]
    return {"labels": labels, "sizes": sizes, "seconds": fastest, "rounds": taken, **fit(sizes, fastest)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(families(torch.device("cpu"))), default=None)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        hardware.keep_memory_mapped()
    torch.manual_seed(0)
    results: dict[str, Any] = {
        **provenance(device),
        "tolerance": TOLERANCE,
        "families": {},
    }
    for name, family in families(device).items():
        if arguments.only is None or name in arguments.only:
            with family() as cases:
                results["families"][name] = measure(cases, arguments.rounds, device)
    print("\n".join(page.scaling(results)))
    write_results(arguments.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
