"""Memory that stays mapped, for training on a CPU.

glibc gives large blocks back to the kernel as soon as they are freed. A training step allocates the same gigabytes each
time, and the kernel clears each page anew: a tenth to a quarter of a step's time. Held back instead, the memory is
there when the next step asks for it, at the price of a resident set that never shrinks.
"""

import ctypes
import os
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_memory_mapped() -> bool:
    """Let this process keep freed memory, and ask for huge pages; call it before the first large tensor is made.

    Returns whether it took effect: it needs glibc. It is for training on CPUs; beside a GPU it is harmless and of
    little use. A process that preloads another allocator (jemalloc, tcmalloc) is left alone.
    """
    if not sys.platform.startswith("linux") or os.environ.get("LD_PRELOAD"):
        return False
    # Read by torch's CPU allocator at its first large block: madvise(MADV_HUGEPAGE).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
