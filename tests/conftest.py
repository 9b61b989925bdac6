"""Shared by all tests: few threads, no network, no W&B."""

import ctypes
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# capability.h
VERSION_3, DAC_OVERRIDE, DAC_READ_SEARCH = 0x20080522, 1 << 1, 1 << 2


@pytest.fixture
def permissions_bind() -> Iterator[None]:
    """The bits of files count for this thread also where root runs the tests, as they do for everybody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, in two halves
    if not hasattr(libc, "capget") or libc.capget(header, sets):
        pytest.skip("no capabilities here to be laid down")
    before = sets[0]
    sets[0] &= ~(DAC_OVERRIDE | DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0
