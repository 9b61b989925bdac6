"""A torch.profiler trace of a few steps of a run, on demand: profile=true."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from data.files import write_atomically
from training.config import ProfileConfig


@contextlib.contextmanager
def profiler(
    config: ProfileConfig, directory: Path, warn: Callable[[str], None], *, enabled: bool
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every step. `warn` is told if the trace cannot be written.

    Writes <run>/profile/trace.json (chrome://tracing, Perfetto) and table.txt, the ten most expensive operations.
    """
    if not (config.enabled and enabled):
        yield lambda: None
        return
    folder = directory / "profile"

    def write(finished: Any) -> None:
        sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        partial = folder / ".trace.json.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(partial))
            partial.replace(folder / "trace.json")
            write_atomically(folder / "table.txt", finished.key_averages().table(sort_by=sort, row_limit=10) + "\n")
        except OSError as error:  # a trace is not worth the run
            warn(f"profile: {error.filename or folder} cannot be written: {error.strerror or error}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(wait=max(0, config.after - 1), warmup=1, active=config.steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write, record_shapes=True) as active:
        yield active.step
