"""The peak memory of real training steps against planning/memory.py, on this machine's CPU.

    python benchmarks/memory.py                every case: some fifteen minutes on two quiet cores
    python benchmarks/memory.py --only "30m fsdp" --output /tmp/memory    the cases whose name has these words

A case is a configuration at a size; its ranks are processes of their own over gloo. Each does one step to make its state
and is measured in the next, which refreshes the curvature where the optimizer has one. What is measured is the bytes that
torch's CPU allocator has given out (torch.profiler's memory events): tensors of Python, of C++ and of the kernels, not the
resident set, which holds the interpreter and libraries too. Writes memory.json and memory.md to results/planner, and the table of
docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from analysis.pages import write_part
from benchmarks.record import provenance
from data.batches import Batch
from data.files import write_json
from models import GPT2, GPT2Config
from planning.memory import PHASES, Phase, curvature_of, planned_memory, reduction_bucket_bytes
from planning.plan import planned_shape
from training.compose import compose
from training.config import RunConfig, micro_batch_size
from training.curvature import CurvaturePass
from training.distributed import Distributed, destroy_process_groups
from training.loop import Run, forward_backward, forward_backward_refresh
from training.optimizers import build_optimizers
from training.recording.ledger import Ledger
from training.strategies import build_strategy
from training.strategies.base import Strategy
from training.weights import InitialWeights

RESULTS = Path(__file__).resolve().parents[1] / "results" / "planner"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
TOLERANCE = 0.15
SIZES = {
    "mini": "model=gpt2_mini model.n_layer=8 tokenizer=bpe tokenizer.vocab_size=8192 train.sequence_length=256 "
    "train.global_batch_size=8 train.micro_batch_size=2",
    "30m": "model=gpt2_30m train.sequence_length=512 train.global_batch_size=4 train.micro_batch_size=2",
    "124m": "model=gpt2_small train.sequence_length=1024 train.global_batch_size=2 train.micro_batch_size=1",
}
#: Tokens of a sequence of the first step, which makes the state and is not measured.
FIRST_LENGTH = 16


@dataclass(frozen=True)
class Case:
    size: str
    ranks: int
    overrides: str

    @property
    def name(self) -> str:
        return f"{self.size}, {self.ranks} rank{'s' * (self.ranks > 1)}: {self.overrides}"

    def config(self) -> RunConfig:
        return compose([*SIZES[self.size].split(), "train.compile=false", *self.overrides.split()])


#: At every size; recomputation of activations is a setting of strategy=fsdp.
EVERYWHERE = (
    (1, "strategy=ddp train.precision=fp32 optimizer=adamw"),
    (1, "strategy=ddp train.precision=bf16 optimizer=sophiag"),
    (2, "strategy=fsdp train.precision=bf16 optimizer=sophiag"),
    (2, "strategy=fsdp strategy.activation_checkpointing=true train.precision=bf16 optimizer=adamw"),
    (2, "strategy=fsdp strategy.activation_checkpointing=true train.precision=fp32 optimizer=sophiag"),
    (1, "strategy=ddp train.precision=bf16 optimizer=sophiag train.compile=true"),
)
AT_MINI = (
    (1, "strategy=ddp train.precision=fp32 optimizer=sophiah"),
    (1, "strategy=ddp train.precision=fp32 optimizer=lion train.micro_batch_size=8"),
    (2, "strategy=ddp train.precision=bf16 optimizer=sophiag"),
    (2, "strategy=fsdp train.precision=fp32 optimizer=adamw train.micro_batch_size=4"),
    (2, "strategy=fsdp train.precision=bf16 optimizer=sophiah optimizer.estimator=hutchinson_differences"),
    (2, "strategy=fsdp train.precision=bf16 optimizer=muon"),
    *(
        (2, f"strategy=deepspeed strategy.zero_stage={stage} train.precision={precision} optimizer={optimizer}")
        for stage in (1, 2, 3)
        for precision, optimizer in (("fp32", "adamw"), ("bf16", "sophiag"))
    ),
)
CASES = tuple(Case(size, *case) for size in SIZES for case in EVERYWHERE) + tuple(Case("mini", *c) for c in AT_MINI)


# ----------------------------------------------------------------------------------------------------------------
# A rank's process.


def measured_peaks(config: RunConfig, shape: GPT2Config, distributed: Distributed) -> dict[Phase, int]:
    """Bytes that the CPU allocator has given out at the peak of each phase of a step, since before the model was made."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = prepared_step(config, shape, distributed)
        step(1)
        with torch.profiler.record_function("measured"):
            step(2)
    results: Any = profile.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    held, phase, measured = 0, None, False
    peaks: dict[Phase, int] = {}
    for event in events:
        if event.name() == "measured":
            measured = True
        elif event.name() in PHASES:
            phase = cast(Phase, event.name())
        elif event.name() == "[memory]":
            held += event.nbytes()
            if measured and phase is not None:
                peaks[phase] = max(peaks.get(phase, 0), held)
    return peaks


def prepared_step(config: RunConfig, shape: GPT2Config, distributed: Distributed) -> Callable[[int], None]:
    """What the training loop does in the step of a number, a refresh of the curvature included."""
    strategy = build_strategy(config, distributed)
    with torch.device("meta"):
        model = GPT2(shape)
    optimizers = build_optimizers(config.optimizer, compile_step=bool(config.train.compile))
    strategy.prepare(model, InitialWeights(config.model, model, 0), optimizers)
    micro = micro_batch_size(config, distributed.world_size)
    rows = config.train.global_batch_size // distributed.world_size
    tokens = np.zeros((rows, config.train.sequence_length), dtype=np.int64)
    # Compiled code would be compiled anew for another length.
    short = tokens if config.train.compile else tokens[:, :FIRST_LENGTH]
    batches = {1: Batch(short, short, np.arange(rows)), 2: Batch(tokens, tokens, np.arange(rows))}
    curvature = curvature_of(config, distributed.world_size)
    return lambda number: _step(config, strategy, batches[number], micro, curvature, number)


def _step(
    config: RunConfig, strategy: Strategy, batch: Batch, micro: int, curvature: CurvaturePass | None, number: int
) -> None:
    of_run = {"config": config, "strategy": strategy, "micro_batch_size": micro, "ledger": Ledger(strategy.device)}
    of_run |= {"flops": strategy.model.flops(config.train.sequence_length)}
    run = cast(Run, SimpleNamespace(progress=lambda doing: None, state=SimpleNamespace(step=number - 1), **of_run))
    if curvature is not None:
        with torch.profiler.record_function("curvature"):
            if curvature.shares_forward(strategy):
                forward_backward_refresh(run, curvature, strategy, batch, number)
                strategy.zero_grad()
            else:
                curvature.run(strategy, batch, number)
    with torch.profiler.record_function("training"):
        forward_backward(run, batch)
    with torch.profiler.record_function("update"):
        strategy.step(config.train.grad_clip)


def _rank(rank: int, case: Case, port: int, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    config = case.config()
    if config.strategy.name == "deepspeed":
        from training.strategies.deepspeed import prepare_environment

        prepare_environment("cpu")
    if case.ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=case.ranks)
    peaks = measured_peaks(config, planned_shape(config), Distributed(rank, rank, case.ranks, torch.device("cpu")))
    if rank == 0:
        answers.put(peaks)
    if dist.is_initialized():
        dist.barrier()
        destroy_process_groups()


# ----------------------------------------------------------------------------------------------------------------
# The benchmark.


def measure(case: Case) -> dict[Phase, int]:
    """Peaks of rank 0, with a process for each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    answers: Any = mp.get_context("spawn").SimpleQueue()
    processes = mp.start_processes(_rank, args=(case, port, answers), nprocs=case.ranks, join=False)
    assert processes is not None
    while not processes.join():
        pass
    peaks: dict[Phase, int] = answers.get()
    return peaks


def check(case: Case, peaks: dict[Phase, int]) -> dict[str, Any]:
    """A case's record, in bytes. Ratios are without ZeRO's reduction bucket of two gigabytes, which would hide any error."""
    config = case.config()
    memory = planned_memory(config, planned_shape(config), case.ranks, "cpu")
    planned = {phase: sum(by_kind.values()) for phase, by_kind in memory.items()}
    bucket = reduction_bucket_bytes(config)
    highest, measured = max(planned.values()), max(peaks.values())
    return {
        "size": case.size,
        "ranks": case.ranks,
        "overrides": case.overrides,
        "planned": highest,
        "measured": measured,
        "fixed_bucket": bucket,
        "planned_over_measured": (highest - bucket) / (measured - bucket),
        "planned_by_phase": planned,
        "measured_by_phase": peaks,
    }


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Planned and measured memory",
        "",
        f"`{record['command']}`: the largest memory of a step on rank 0, MB. *Planned* is the arithmetic of",
        "`planning/memory.py`; *measured* is the bytes that torch's CPU allocator has given out in a real step (torch.profiler),",
        f"a curvature refresh included. Planned must be within {TOLERANCE:.0%} of measured. For ZeRO the ratio is without the",
        "engine's fixed reduction bucket (1 or 2 GB), which would hide any error at this size.",
        "",
        *[f"- {name}: `{overrides}`" for name, overrides in record["sizes"].items()],
        "",
        table(record["cases"]),
    ]
    return "\n".join(lines) + "\n"


def table(cases: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| size | ranks | configuration | planned | measured | planned / measured |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for case in cases:
        sizes = " | ".join(f"{case[key] / 1e6:,.1f}" for key in ("planned", "measured"))
        ratio = f"{case['planned_over_measured']:.3f}"
        lines.append(f"| {case['size']} | {case['ranks']} | {case['overrides']} | {sizes} | {ratio} |")
    return "\n".join(lines)


def page_table(record: dict[str, Any]) -> str:
    """What docs/scaling.md quotes: the cases that are there at every size."""
    return table([case for case in record["cases"] if (case["ranks"], case["overrides"]) in EVERYWHERE])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the cases whose name has these words")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    cases = []
    for case in CASES:
        if all(word in case.name for word in arguments.only.split()):
            cases.append(check(case, measure(case)))
            console.print(f"{cases[-1]['planned_over_measured']:.3f}  {case.name}", markup=False)
    record = {
        "command": "python benchmarks/memory.py",
        "sizes": SIZES,
        **provenance(torch.device("cpu")),
        "cases": cases,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "memory.json", record)
    (arguments.output / "memory.md").write_text(markdown(record), encoding="utf-8")
    if len(cases) == len(CASES):
        write_part(PAGE, "memory", page_table(record))
    outside = [case for case in cases if abs(case["planned_over_measured"] - 1) > TOLERANCE]
    console.print(f"{len(cases) - len(outside)} of {len(cases)} within {TOLERANCE:.0%}; written to {arguments.output}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
