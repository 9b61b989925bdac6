"""torch.compile's cache after a killed compiler, and stop signals while the compiler runs.

Nobody must ever have to delete the cache by hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.faults.kills import overrides_of
from tests.faults.sittings import LIMIT_SECONDS
from tests.training.runs import curve

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
COMPILERS = ("cc1plus", "g++", "c++", "collect2", "ld")


def _environment(cache: Path) -> dict[str, str]:
    given = {"PYTHONPATH": os.fspath(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": os.fspath(cache)}
    return {**os.environ, **given}


def _start(command: Sequence[str], cache: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the run in its own process group, as a terminal does."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, os.fspath(ROOT / "train.py"), *command],
            env=_environment(cache),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _ended(command: Sequence[str], cache: Path, log: Path) -> int:
    process = _start(command, cache, log)
    try:
        return process.wait(3 * LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _half(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def _empty(library: Path) -> None:
    os.truncate(library, 0)


def _garbage(library: Path) -> None:
    library.write_bytes(b"not a library\n" * 100)


def spoil_cache(corpus: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Halve, empty, or replace with text every library in the cache: the next run reports it and still compiles."""
    cache, log = scratch / "cache", scratch / "log"
    command = overrides_of(corpus, scratch, "undisturbed", STEPS, "train.compile=auto")
    faults = []
    if _ended(command, cache, log):
        return {"tried": 0, "faults": [f"the undisturbed run failed: {log.read_text()[-500:]}"]}
    damages: tuple[Callable[[Path], None], ...] = (_half, _empty, _garbage)
    libraries = 0
    for damage in damages:
        name = damage.__name__[1:]
        found = [path for path in cache.rglob("*.so") if not path.is_symlink()]
        libraries += len(found)
        for library in found:
            damage(library)
        code = _ended(overrides_of(corpus, scratch, name, STEPS, "train.compile=auto"), cache, log)
        said = log.read_text()
        if code or "Traceback" in said:
            faults.append(f"{name}: exit code {code}: {said[-500:]}")
            continue
        if not yaml.safe_load((scratch / name / "config.yaml").read_text())["train"]["compile"]:
            faults.append(f"{name}: the run was not compiled: {said[-500:]}")
        if curve(scratch / name) != curve(scratch / "undisturbed"):
            faults.append(f"{name}: another curve")
    return {"tried": len(damages), "libraries": libraries, "faults": faults}


def _compilers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() in COMPILERS]
    except psutil.NoSuchProcess:
        return []


def interrupt_compilers(corpus: Sequence[str], scratch: Path, times: int) -> dict[str, Any]:
    """Send SIGINT, or SIGKILL, to the process group while g++ runs, each with an empty cache; then start again."""
    faults, honoured, log = [], 0, scratch / "log"
    for number in range(times):
        sent = signal.SIGINT if number % 2 == 0 else signal.SIGKILL
        cache, name = scratch / f"cache-{number}", f"run-{number}"
        command = overrides_of(corpus, scratch, name, STEPS, "train.compile=auto")
        process = _start(command, cache, log)
        until = time.monotonic() + LIMIT_SECONDS
        began = scratch / name / "metrics.jsonl"  # the probe of the compiler lies behind
        while not (began.exists() and _compilers_of(process)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, sent)
        code = process.wait(3 * LIMIT_SECONDS)
        if sent == signal.SIGKILL:
            for one in family:  # as the kernel does when memory runs out
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    continue
        if sent == signal.SIGINT and code != 75:
            faults.append(f"SIGINT while g++ runs: exit code {code}: {log.read_text()[-500:]}")
        else:
            honoured += sent == signal.SIGINT
        if (code := _ended(command, cache, log)) or "Traceback" in log.read_text():
            faults.append(f"{sent.name}: started again, exit code {code}: {log.read_text()[-500:]}")
    return {"tried": times, "saved_and_ended": honoured, "faults": faults}
