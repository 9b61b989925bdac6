"""Remove incomplete files that killed compilations leave in torch.compile's cache.

The compiler writes libraries and precompiled headers in place, and torch.compile takes every file in the cache for
complete. A compiler that is killed (time limit, out of memory, lost machine) leaves a partial file, on which every later
compiled run on this machine fails.

torch stores a library as `<2 characters>/<key>[.main].so` and a header as `precompiled_headers/<key>.h.gch`. While it
builds one, a directory `…_CxxBuild` exists next to it and torch holds `locks/<key>.lock`.
"""

import contextlib
import os
import shutil
import struct
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir


def drop_unfinished() -> list[Path]:
    """Remove incomplete files that no process is building; they are compiled again when needed.

    Returns the removed files. Files that cannot be removed are skipped: the compiler will report them.
    """
    libraries, headers = Path(cache_dir()), Path(default_cache_dir()) / "precompiled_headers"
    dropped = []
    for root, pattern in ((libraries, "??/*.so"), (headers, "*.gch")):
        for path in root.glob(pattern):
            if _is_unfinished(path):
                lock = root / "locks" / f"{path.name.split('.')[0]}.lock"  # torch holds it while it builds the file
                with contextlib.suppress(Timeout, OSError):
                    lock.parent.mkdir(exist_ok=True)
                    with FileLock(lock, timeout=0):
                        if _is_unfinished(path):
                            path.unlink()
                            shutil.rmtree(_build_directory(path), ignore_errors=True)
                            dropped.append(path)
    return dropped


def _build_directory(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix(path.suffix)}_CxxBuild")


def _is_unfinished(path: Path) -> bool:
    try:
        return _build_directory(path).exists() or (path.suffix == ".so" and not _is_whole(path))
    except OSError:
        return False


def _is_whole(library: Path) -> bool:
    """Return whether an ELF file extends to the end of its section headers, which linkers write last."""
    if sys.platform != "linux":
        return True
    with library.open("rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    if header[4:6] != b"\x02\x01":  # not 64-bit little-endian: not checked
        return True
    offset, entry_bytes, entries = struct.unpack("<Q10xHH", header[40:62])
    return bool(offset + entry_bytes * entries <= size)
