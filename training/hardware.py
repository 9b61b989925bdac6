"""Detect what this machine supports (bf16 units, a working compiler), set it up for training, and describe it."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import logging
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import ConfigurationError, TrainConfig
from training.reliability.compiler_cache import drop_unfinished

log = logging.getLogger(__name__)

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14  # mman.h
_PAGE = os.sysconf("SC_PAGE_SIZE")

PACKAGES = ("torch", "numpy", "transformers", "datasets", "tiktoken", "tokenizers", "deepspeed", "hydra-core", "wandb")


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the hardware has bf16 units: CUDA since Ampere, CPUs with AMX tiles or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def resolve_precision(train: TrainConfig, device: torch.device) -> str:
    """Return "fp32" or "bf16" for "auto", any other precision unchanged."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if has_bf16_units(device) else "fp32"


@functools.cache
def compiler_failure() -> str | None:
    """Return why torch.compile does not work in this process, in one line, or None if it works."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(4))
    except Exception as error:  # a broken tool chain may raise anything
        return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    finally:
        torch._dynamo.reset()
    return None


def resolve_compile(train: TrainConfig, *, warn: bool) -> bool:
    """Return whether to compile. "auto" compiles if a compiler works, and warns otherwise.

    Raises ConfigurationError if train.compile=true and no compiler works.
    """
    if train.compile is False:
        return False
    if (dropped := drop_unfinished()) and warn:
        log.warning("removed %d incomplete files of killed compilations, such as %s", len(dropped), dropped[0])
    failure = compiler_failure()
    if failure is None:
        return True
    if train.compile is True:
        raise ConfigurationError(
            f"train.compile=True: no compiler works here ({failure}); install g++ or use train.compile=auto"
        )
    if warn:
        log.warning("torch.compile does not work here (%s); running without it", failure)
    return False


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a batch to the device without waiting for it.

    From memory that is not pinned, a copy of more than a few kilobytes would wait for all work queued on the GPU.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def set_deterministic(deterministic: bool) -> None:
    """Make CUDA runs reproducible bit for bit, or not, whatever this process's previous run did; CPU runs are anyway."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def release_earlier_runs(device: torch.device) -> None:
    """Free the memory of this process's previous run, whose reference cycles hold it, and start the GPU's peak anew."""
    gc.collect()
    if device.type == "cuda":  # a run on the CPU creates no context on a GPU
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def keep_memory_mapped() -> bool:
    """Keep freed memory mapped, in huge pages, for training on a CPU. Call it before the first large tensor.

    glibc returns large blocks to the kernel as soon as they are freed. A training step allocates the same gigabytes each
    time, and the kernel clears every page again: a twentieth to a quarter of a step's time. In a virtual machine, pages of
    4 KB cost as much again, since each look-up of an address is one of the host too. The price is a resident set that
    never shrinks. Returns whether it took effect: it needs glibc, and does nothing if the process preloads another
    allocator (jemalloc, tcmalloc). With a GPU it is harmless and of little use.
    """
    if not sys.platform.startswith("linux") or os.environ.get("LD_PRELOAD"):
        return False
    # For blocks of 2 MB and more, wherever they are. Read by torch's CPU allocator at its first one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # -1: never trim. Without mmap, blocks of every size come from the heap.
    kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    if kept and _overcommits():
        _advise_heap(libc, os.sysconf("SC_PHYS_PAGES") // 2 * _PAGE)
    return kept


def _overcommits() -> bool:
    """Whether address space that is never touched is free (anything but vm.overcommit_memory=2)."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except OSError:
        return False


def _advise_heap(libc: ctypes.CDLL, size: int) -> None:
    """Grow the heap by `size` bytes of address space and ask for huge pages there, for small blocks as well.

    The heap's top keeps the advice when the block is freed. Later growth has none.
    """
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(ctypes.c_size_t(size))
    if address is None:
        return
    first = -(-address // _PAGE) * _PAGE
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(address))


def describe(device: torch.device) -> dict[str, Any]:
    """Describe this process's hardware for the record."""
    description: dict[str, Any] = {
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": has_bf16_units(device),
        "device": str(device.type),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return description


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def code_sha256() -> str:
    """Return a hash of the project's modules that a run uses, independent of their location."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for package in ("data", "models", "sophia", "training"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def git_state() -> dict[str, Any]:
    """Return the commit of the code and whether the working tree differs from it; nulls outside a repository.

    results/ does not count: a study adds its records there while it runs. A container image has no repository, but names
    the commit that it was built from.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", ".", ":!results")
    commit = git("rev-parse", "HEAD") or os.environ.get("SOPHIA_COMMIT") or None
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: allocated on the GPU, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
