import os
import subprocess
import sys
from pathlib import Path

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

SMALL_BLOCKS = """
import re
from pathlib import Path
import torch
from training.hardware import keep_memory_mapped
assert keep_memory_mapped() and keep_memory_mapped()
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
lines = Path("/proc/self/smaps_rollup").read_text()
print(re.search(r"AnonHugePages: +([0-9]+) kB", lines)[1])
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")


@linux
@pytest.mark.skipif(not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here")
def test_blocks_of_a_megabyte_are_in_huge_pages() -> None:
    """Activations of small models; torch itself advises only blocks of 2 MB and more."""
    found = subprocess.run([sys.executable, "-c", SMALL_BLOCKS], capture_output=True, check=True)
    assert int(found.stdout) > 150 << 10


@linux
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
