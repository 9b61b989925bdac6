"""A process that has joined a process group ends with its own exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The tensors of collectives are slow to go, and gloo's threads are the last to hold most of them. The main thread keeps
# the interpreter's lock, so that they have hardly begun when it gets to the end.
SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from training.distributed import Distributed, destroy_process_groups

class Slow(torch.Tensor):
    def __del__(self):
        matrix @ matrix
        os.write(1, b"gone ")

torch.set_num_threads(1)
matrix = torch.ones(1000, 1000)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
kept = dist.group.WORLD  # as DDP and DeepSpeed do
sys.setswitchinterval(1000)
for _ in range(20):
    dist.all_reduce(torch.ones(3).as_subclass(Slow), async_op=True)
{leave}
os.write(1, b"left ")
sys.exit(3)
"""


@pytest.mark.parametrize(
    "leave", ["destroy_process_groups()", "Distributed(0, 0, 1, torch.device('cpu'), joined=True).stop()"]
)
def test_gloo_threads_are_done_before_the_interpreter_ends(leave: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(leave=leave)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stdout.split() == ["gone"] * 20 + ["left"]
