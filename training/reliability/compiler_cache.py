"""What killed compilations leave in the cache of torch.compile, which takes every file that is there for whole.

The compiler writes libraries and precompiled headers in place. Killed in the middle (a time limit, memory that ran out, a
machine that is lost) it leaves a part of a file, and every compiled run on this machine fails on it from then on.

torch keeps a library as `<2 characters>/<key>[.main].so`, a header as `precompiled_headers/<key>.h.gch`, beside each a
directory `…_CxxBuild` while it is being built, and holds `locks/<key>.lock` meanwhile.
"""

import contextlib
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir


def drop_unfinished() -> list[Path]:
    """Remove what no process is building and what is not whole; it is compiled again when it is needed.

    Returns the removed files. One that cannot be removed is left to the compiler's own complaint.
    """
    libraries, headers = Path(cache_dir()), Path(default_cache_dir()) / "precompiled_headers"
    dropped = []
    for root, pattern in ((libraries, "??/*.so"), (headers, "*.gch")):
        for path in root.glob(pattern):
            if _is_unfinished(path):
                with contextlib.suppress(Timeout, OSError), _lock(root, path):
                    if _is_unfinished(path):
                        path.unlink()
                        shutil.rmtree(_build_directory(path), ignore_errors=True)
                        dropped.append(path)
    return dropped


@contextlib.contextmanager
def _lock(root: Path, path: Path) -> Iterator[None]:
    """Raises Timeout where a process is building the file."""
    (root / "locks").mkdir(exist_ok=True)
    with FileLock(root / "locks" / f"{path.name.split('.')[0]}.lock", timeout=0):
        yield


def _build_directory(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix(path.suffix)}_CxxBuild")


def _is_unfinished(path: Path) -> bool:
    try:
        return _build_directory(path).exists() or (path.suffix == ".so" and not _is_whole(path))
    except OSError:
        return False


def _is_whole(library: Path) -> bool:
    """Whether an ELF file reaches to the end of its section headers, which linkers write last."""
    if sys.platform != "linux":
        return True
    with library.open("rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    if header[4:6] != b"\x02\x01":  # of 64 bits, little-endian
        return True
    offset, entry_bytes, entries = struct.unpack("<Q10xHH", header[40:62])
    return bool(offset + entry_bytes * entries <= size)
