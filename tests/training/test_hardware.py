import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from training.hardware import keep_memory_mapped
if sys.argv[1] == "kept":
    assert keep_memory_mapped()
import torch
def step():
    for _ in range(3):
        torch.zeros(64 << 20, dtype=torch.uint8)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    environment = {
        key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"
    }  # set by a run here
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, mode], env=environment, capture_output=True, check=True
            ).stdout
        )
        for mode in ("default", "kept")
    }
    assert faults["default"] > 1000
    assert faults["kept"] < 100
