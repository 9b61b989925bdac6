"""Shared by all tests: few threads, no network, no W&B, files in memory."""

import gc
import os
import shutil
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")
# What is written is synchronised to the disk, for which a tiny run would wait as long as it trains.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

import torch

from tests.permissions import NoCapabilitiesError, bound_by_permissions

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    """What is there by now stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def permissions_bind() -> Iterator[None]:
    """The bits of files count in this test also where root runs it."""
    try:
        with bound_by_permissions():
            yield
    except NoCapabilitiesError as error:
        pytest.skip(str(error))
