"""The memory that a step really takes on this machine's CPU, by two referees that know nothing of the planner.

    tracked    torch's MemTracker: what real tensors go through the dispatcher hold
    allocated  the CPU allocator's own account (torch.profiler): besides, what C++ and kernels allocate inside

Ranks are processes of this machine over gloo; each does a step to make its state and is measured in the next.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed._tools.mem_tracker import MemTracker

from models import GPT2, GPT2Config
from training.config import RunConfig, micro_batch_size
from training.distributed import Distributed, destroy_process_groups
from training.optimizers import build_optimizers
from training.planned_memory import curvature_of, one_step, step_batch
from training.strategies import build_strategy
from training.weights import InitialWeights


class MeasuredMemory(NamedTuple):
    """Peaks of a step on rank 0, in bytes, of tensors made since before the model was."""

    tracked: int
    allocated: int


def measured_memory(config: RunConfig, shape: GPT2Config, world_size: int) -> MeasuredMemory:
    """Run the step of a configuration in `world_size` processes and weigh it, twice.

    Args:
        config: `auto` resolved, `train.compile=false`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    peaks: Any = context.SimpleQueue()
    processes = mp.start_processes(
        _rank,
        args=(config.model_dump(mode="json"), vars(shape), world_size, port, peaks),
        nprocs=world_size,
        join=False,
    )
    while not processes.join():
        pass
    return MeasuredMemory(*peaks.get())


def _rank(rank: int, values: dict[str, Any], shape: dict[str, Any], world_size: int, port: int, peaks: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    config = RunConfig.model_validate(values)
    if config.strategy.name == "deepspeed":
        from training.strategies.deepspeed import prepare_environment

        prepare_environment("cpu")
    if world_size > 1 or config.strategy.name != "ddp":
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    tracked = _tracked(config, GPT2Config(**shape), rank, world_size)
    allocated = _allocated(config, GPT2Config(**shape), rank, world_size)
    if rank == 0:
        peaks.put((tracked, allocated))
    if dist.is_initialized():
        dist.barrier()
        destroy_process_groups()


def _tracked(config: RunConfig, shape: GPT2Config, rank: int, world_size: int) -> int:
    tracker = MemTracker()
    # Its statistics by module are not asked for, and their hooks can neither see a second forward nor double backward.
    modules: Any = tracker._mod_tracker
    modules.__enter__ = modules.__exit__ = lambda *exception: None
    with tracker:
        step = _prepared(config, shape, rank, world_size)
        step(1)
        tracker._peak_mem, tracker._peak_mem_snap = {}, {}
        step(2)
        peak = tracker.get_tracker_snapshot("peak")
    return int(peak[torch.device("cpu")]["Total"])


def _allocated(config: RunConfig, shape: GPT2Config, rank: int, world_size: int) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = _prepared(config, shape, rank, world_size)
        step(1)
        with torch.profiler.record_function("second step"):
            step(2)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "second step")
    held = highest = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() >= start:
                highest = max(highest, held)
    return highest


def _prepared(config: RunConfig, shape: GPT2Config, rank: int, world_size: int) -> Callable[[int], None]:
    """A function that does the step of a number, of a strategy that stands ready."""
    distributed = Distributed(rank, rank, world_size, torch.device("cpu"))
    strategy = build_strategy(config, distributed)
    with torch.device("meta"):
        model = GPT2(shape)
    weights = InitialWeights(config.model, shape, 0)
    strategy.prepare(model, weights, build_optimizers(config.optimizer, compile_step=False))
    micro = micro_batch_size(config, world_size)
    batch = step_batch(config.train.sequence_length, config.train.global_batch_size // world_size)
    curvature = curvature_of(config, micro)
    return lambda number: one_step(config, strategy, batch, micro, curvature, number)
