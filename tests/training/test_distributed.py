"""A process that has joined a process group ends with its own exit code."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from training import distributed
from training.distributed import Distributed

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


@pytest.mark.parametrize(("of_this_machine", "waits"), [("1", True), ("2", False)])
def test_ranks_of_other_machines_end_after_rank_0(
    of_this_machine: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"LOCAL_WORLD_SIZE": of_this_machine, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(key, value)
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    main, other = (
        Distributed(rank, 0, 2, torch.device("cpu"), store=store) for rank, store in ((0, server), (1, client))
    )
    ending = threading.Thread(target=other.end_after_main)
    ending.start()
    ending.join(0.5 if waits else 30)
    assert ending.is_alive() is waits
    main.end_after_main()
    ending.join(30)
    assert not ending.is_alive()

    if waits:
        monkeypatch.setattr(distributed, "MAIN_ENDS", datetime.timedelta(milliseconds=10))
        Distributed(1, 0, 2, torch.device("cpu"), store=client, attempt="another").end_after_main()  # no error
