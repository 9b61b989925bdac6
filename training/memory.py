"""Keep freed memory mapped, for training on a CPU.

glibc returns large blocks to the kernel as soon as they are freed. A training step allocates the same gigabytes each time,
and the kernel clears every page again: a tenth to a quarter of a step's time. Kept mapped, the memory is ready for the next
step, at the price of a resident set that never shrinks.
"""

import ctypes
import os
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_memory_mapped() -> bool:
    """Let this process keep freed memory and request huge pages. Call it before the first large tensor is created.

    Returns whether it took effect: it needs glibc. With a GPU it is harmless and of little use. Does nothing if the process
    preloads another allocator (jemalloc, tcmalloc).
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
