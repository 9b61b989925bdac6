"""The two-rank part of the strategies' tests, in one launch: whole runs, and measurements inside a strategy.

    python tests/training/strategies/ranks.py <directory>

reads <directory>/work.json and leaves run records there, and what was seen in <directory>/seen.json. The second rank is a
fork of the first, which has imported DeepSpeed for both.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import training.loop as loop
import training.optimizers as optimizers
from data.batches import Batch
from models import GPT2, GPT2Config
from tests.faults.sittings import free_port
from tests.training.runs import signal_self
from tests.training.toys import Counting
from training.compose import compose
from training.config import RunConfig
from training.curvature import CurvaturePass
from training.distributed import Distributed, destroy_process_groups
from training.optimizers import build_optimizers
from training.reliability.checkpoints import Checkpoint, save
from training.run import execute
from training.strategies import build_strategy
from training.strategies.base import Strategy
from training.weights import InitialWeights

KINDS = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "zero1": ["strategy=deepspeed", "strategy.zero_stage=1"],
    "zero2": ["strategy=deepspeed", "strategy.zero_stage=2"],
    "zero3": ["strategy=deepspeed", "strategy.zero_stage=3"],
}
SHAPE = GPT2Config(vocab_size=61, n_layer=2, n_head=2, n_embd=32, block_size=12)
LENGTH = 12


@contextlib.contextmanager
def stopped_after(step: int | None) -> Iterator[None]:
    """Ask the run in this block to stop (SIGUSR1) after so many steps."""
    original = loop.Reporter.step

    def reported(self: Any, number: int, *arguments: Any) -> None:
        original(self, number, *arguments)
        if number == step:
            signal_self(signal.SIGUSR1)

    loop.Reporter.step = reported  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.Reporter.step = original  # type: ignore[method-assign]


@contextlib.contextmanager
def poisoned(calls: list[int], rank: int) -> Iterator[None]:
    """Make the given backward passes (1, 2, …) of the run in this block return NaN on one rank."""
    from training.strategies.ddp import DDP
    from training.strategies.deepspeed import DeepSpeed
    from training.strategies.fsdp import FSDP

    originals = {kind: kind.backward for kind in (DDP, FSDP, DeepSpeed)}
    count = 0

    def replaced(original: Any) -> Any:
        def backward(self: Strategy, loss: torch.Tensor, **options: bool) -> None:
            nonlocal count
            count += 1
            bad = count in calls and self.distributed.rank == rank
            original(self, loss * float("nan") if bad else loss, **options)

        return backward

    for kind, original in originals.items():
        kind.backward = replaced(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.backward = original  # type: ignore[method-assign]


def run(job: dict[str, Any]) -> str:
    with stopped_after(job.get("stop")), poisoned(job.get("poison", []), rank=1):
        return execute(RunConfig.model_validate(job["config"])).status


composed = functools.cache(lambda *overrides: compose(overrides))
SOPHIAG = ("optimizer=sophiag", "optimizer.hessian_interval=1", "train.global_batch_size=8")


def build(kind: str, *overrides: str) -> tuple[Strategy, RunConfig]:
    """A strategy of a tiny model of random weights, Sophia-G as its optimizer unless another is given."""
    config = composed("train.precision=fp32", "train.compile=false", "train.device=cpu", *(overrides or SOPHIAG))
    config = config.model_copy(update={"strategy": composed(*KINDS[kind]).strategy})
    distributed = Distributed.start("cpu")
    strategy = build_strategy(config, distributed)
    with torch.device("meta"):
        model = GPT2(SHAPE)
    strategy.prepare(
        model, InitialWeights(config.model, model, 0), build_optimizers(config.optimizer, compile_step=False)
    )
    return strategy, config


def batch(sequences: int) -> Batch:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (sequences, LENGTH + 1))
    mine = np.arange(rank, sequences, world_size)
    return Batch(tokens[mine, :-1], tokens[mine, 1:], mine)


def whole_weights(strategy: Strategy) -> torch.Tensor:
    """Return this rank's float32 weights, concatenated."""
    local = [w.to_local() if hasattr(w, "to_local") else w for w in strategy.weights()]
    return torch.cat([w.reshape(-1) for w in local]).clone()


def accumulate(strategy: Strategy, micro_batches: int, sequences: int = 8) -> None:
    """Accumulate the gradient of the mean loss over the batch, in so many micro-batches."""
    data = batch(sequences)
    size = len(data.tokens) // micro_batches
    for index in range(micro_batches):
        part = slice(index * size, (index + 1) * size)
        with strategy.micro_batch(last=index == micro_batches - 1):
            output = strategy.forward(torch.from_numpy(data.tokens[part]), torch.from_numpy(data.targets[part]))
            assert output.loss_sum is not None
            strategy.backward(output.loss_sum / (sequences * LENGTH))


def curvature_pass(kind: str) -> dict[str, Any]:
    """What a pass changes: h, and nothing else that the strategy or its engine holds."""
    strategy, config = build(kind)
    assert config.optimizer.name == "sophiag"
    engine = getattr(strategy, "_engine", None)
    counters = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    estimator = CurvaturePass.of(config.optimizer, 0, 8, 2)
    assert estimator is not None
    accumulate(strategy, 2)
    strategy.step(1.0)
    before = whole_weights(strategy), [getattr(engine, name, 0) for name in counters]
    h_before = sum(float(h.abs().sum()) for h in locals_of_curvature(strategy))
    estimator.run(strategy, batch(8), 2)
    after = whole_weights(strategy), [getattr(engine, name, 0) for name in counters]
    momentum = sum(float(m.abs().sum()) for _, _, m in strategy.curvature_state())
    accumulate(strategy, 2)
    norm = strategy.step(None).grad_norm
    return {
        "weights_unchanged": torch.equal(before[0], after[0]),
        "counters_unchanged": before[1] == after[1],
        "h_before": h_before,
        "h_after": sum(float(h.abs().sum()) for h in locals_of_curvature(strategy)),
        "momentum": momentum,
        "grad_norm": float(norm),
        "engine_clip": float(getattr(getattr(engine, "optimizer", None), "clip_grad", 0.0)),
    }


def locals_of_curvature(strategy: Strategy) -> list[torch.Tensor]:
    return [h.to_local() if hasattr(h, "to_local") else h for _, h, _ in strategy.curvature_state()]


def collectives(kind: str) -> dict[str, dict[str, int]]:
    """Count the calls of each collective in an update with one and with four micro-batches."""
    strategy, _ = build(kind)
    for _ in range(2):  # whatever is set up lazily: DDP reorders its buckets after the first backward
        accumulate(strategy, 1)
        strategy.step(1.0)
    counted = {}
    for micro_batches in (1, 4):
        with torch.profiler.profile() as profile:
            accumulate(strategy, micro_batches)
            strategy.step(1.0)
        calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("c10d::")}
        counted[str(micro_batches)] = calls
    return counted


def gradient_of_the_mean(kind: str) -> dict[str, float]:
    """The gradient's norm of one batch, however it is split; the rate leaves the weights where they are."""
    norms = {}
    strategy, _ = build(kind, *SOPHIAG, "optimizer.lr=1e-30")
    for micro_batches in (1, 2, 4):
        accumulate(strategy, micro_batches)
        norms[str(micro_batches)] = float(strategy.step(None).grad_norm)
    return norms


def numbers_in_state(kind: str) -> dict[str, Any]:
    """Save a strategy after three clipped steps, load it into another, and step both."""
    root = Path(sys.argv[1]) / "numbers" / kind
    with mock.patch.object(optimizers, "_adamw", lambda groups, lr, *_: Counting(groups, 0.1, in_groups=False)):
        first, second = (build(kind, "optimizer=adamw")[0] for _ in range(2))
    start = [weight.clone() for weight in first.weights()]
    for _ in range(3):
        accumulate(first, 1)
        first.step(0.01)
    moved = first.norm([weight - before for weight, before in zip(first.weights(), start, strict=True)]).item()
    state = {"training": {}, "ledger": {"entries": {}, "bytes_communicated": 0}, "metrics_bytes": 0, "config": {}}
    checkpoint = Checkpoint(save(root, 3, first.pieces(), state, first.distributed))
    second.load(checkpoint)
    for strategy in (first, second):
        for _ in range(2):
            accumulate(strategy, 1)
            strategy.step(None)
    same = torch.equal(whole_weights(first), whole_weights(second))
    return {
        "numbers": dict(sorted(checkpoint.numbers().items())),
        "moved": moved,
        "same_weights": not first.distributed.highest(not same),
    }


LOOKS = {look.__name__: look for look in (curvature_pass, collectives, gradient_of_the_mean, numbers_in_state)}
#: Where they are taken. Stages 1 and 2 are one code but for when gradients are reduced.
LOOKED_AT = {
    "curvature_pass": list(KINDS),
    "collectives": ["ddp", "fsdp", "zero1"],
    "gradient_of_the_mean": list(KINDS),
    "numbers_in_state": ["ddp", "fsdp", "zero1", "zero3"],
}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    from training.strategies.deepspeed import prepare_environment

    prepare_environment("cpu")
    gc.freeze()  # DeepSpeed collects garbage again and again; what is imported is none
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    second = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if second else "1"
    dist.init_process_group("gloo")
    work(directory)
    if second and (status := os.waitpid(second, 0)[1]):
        sys.exit(f"rank 1 ended with status {status}")


def work(directory: Path) -> None:
    """A rank's part of <directory>/work.json."""
    listed = json.loads((directory / "work.json").read_text())
    seen: dict[str, Any] = {"runs": {}, "looks": {}}
    for name, job in listed["runs"].items():
        seen["runs"][name] = attempt(run, job)
    for look, kind in listed["looks"]:
        seen["looks"][f"{look} {kind}"] = attempt(LOOKS[look], kind)
    if dist.get_rank() == 0:
        (directory / "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    destroy_process_groups()


def attempt(action: Any, argument: Any) -> Any:
    """Return the result, or the traceback, so that one failure does not lose the other tests' results."""
    try:
        return action(argument)
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
