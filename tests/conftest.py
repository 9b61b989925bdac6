"""Shared by all tests: few threads, no network, no W&B, files in memory."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")
# What a run writes is synchronised to the disk, for which a tiny one would wait as long as it trains.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 << 30 and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

import torch  # noqa: E402

from tests.permissions import NoCapabilitiesError, bound_by_permissions  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

#: Files whose tests start processes, train runs, compile or open a browser; `slow` marks single tests of other files.
SLOW = {f"tests/{name}" for name in ("faults", "readme", "slurm", "training/strategies")}
SLOW |= {f"tests/{name}.py" for name in ("data/test_preparation", "models/test_compiled", "models/test_distributed")}
SLOW |= {
    f"tests/scripts/test_{name}.py"
    for name in ("evaluate", "export", "plan", "rare_rows", "results", "sample", "toy_landscape")
}
SLOW |= {f"tests/studies/test_{name}.py" for name in ("ablations", "runner", "smoke", "sweeps", "verify")}
SLOW |= {"tests/sophia/test_distributed.py", "tests/analysis/test_report.py", "tests/sophia/test_package.py"}
SLOW |= {"tests/benchmarks/test_memory.py", "tests/benchmarks/test_reading.py", "tests/gpu/test_fake_cuda.py"}
SLOW |= {f"tests/training/test_{name}.py" for name in ("distributed", "fast_paths", "hardware", "paper_recipes", "run")}
SLOW |= {f"tests/training/test_{name}.py" for name in ("architectures", "external", "optimizer_check")}
SLOW |= {
    f"tests/training/launching/test_{name}.py"
    for name in (
        "engines",
        "environment",
        "gpus",
        "help",
        "jobs",
        "launched_jobs",
        "lifeline",
        "limits",
        "mistakes",
        "ranks",
    )
}
SLOW |= {
    f"tests/training/reliability/test_{name}.py"
    for name in (
        *("compiler_cache", "earlier_version", "guards", "rendezvous", "resume", "resumption", "run_directory"),
        *("signals", "watchdog"),
    )
}
SLOW |= {"tests/training/recording/test_trackers.py"}
#: Fixtures of what takes most of a minute. Their tests come first, while the other workers have other tests.
FIRST = {"two_ranks", "fast", "clone"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.isdisjoint(getattr(item, "fixturenames", ())))
    for item in items:
        path = item.path.relative_to(ROOT)
        if not SLOW.isdisjoint(map(str, (path, *path.parents))):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to look at it again."""
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
