"""End a run that makes no progress, and print the stacks of every rank.

Whatever hangs (a collective that a living rank has not entered, a disk that does not answer, an endless loop), the main
thread stops reporting progress. A watchdog thread on each rank notices. The first one tells the others through the ranks'
store, all write the stacks of all their threads, and the processes exit. If something holds the interpreter's lock, so
that the thread cannot run either, a C-level timer (faulthandler) does the same for its process. Dead ranks are handled by
training/reliability/heartbeat.py.
"""

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from training.distributed import Distributed
from training.exits import EXIT_FAILED

POLL_SECONDS = 1.0
PEERS_SECONDS = 10.0  # for the other ranks to write their stacks
DISK_SECONDS = 5.0  # for the disk to accept a few lines
STORE_TIMEOUT = datetime.timedelta(seconds=10)
STANDARD_ERROR = 2


class Watchdog:
    """Ends the process when `progress` has not been called for `seconds`.

    Args:
        seconds: None disables the watchdog.
        distributed: the ranks, which end together.
        directory: for the stacks, as rank-<n>.txt; they also go to standard error.
        report: called with one line on rank 0 before the exit, in a thread that gets `DISK_SECONDS`.
    """

    def __init__(
        self,
        seconds: float | None,
        distributed: Distributed,
        directory: Path,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._seconds = seconds
        self._distributed = distributed
        self._directory = directory
        self._report = report
        self._doing = "setting up"
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._store: dist.Store | None = None

    def progress(self, doing: str) -> None:
        """Report progress: the run is now `doing` this."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._store = _own_store(self._distributed)
            self.progress("starting")
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds is None:
            return
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, seconds: float) -> None:
        poll = min(POLL_SECONDS, seconds / 4)
        while not self._stopped.wait(poll):
            # Rearmed at every poll; fires if this thread cannot run.
            faulthandler.dump_traceback_later(seconds + 2 * poll + PEERS_SECONDS, exit=True, file=STANDARD_ERROR)
            idle = time.monotonic() - self._since
            if idle > seconds:
                self._end(f"no progress for {idle:.0f} s while {self._doing}", seconds)
            elif said := self._word_of_peers():
                self._end(f"{said}; this rank was {self._doing}", seconds)

    def _end(self, reason: str, seconds: float) -> None:
        rank = self._distributed.rank
        line = (
            f"rank {rank}: {reason}: the job is stopped; rerun the same command to resume, and if this was slow but no hang, "
            f"give more than guards.hang_minutes={seconds / 60:g}"
        )
        self._tell_peers(f"rank {rank} had {reason}")
        with contextlib.suppress(OSError):  # the log's disk may be full or hang
            print(f"\n{line}\nstacks of rank {rank}:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=STANDARD_ERROR, all_threads=True)
        # In a thread, since the disk may be what hangs.
        writer = threading.Thread(target=self._write, args=(line,), daemon=True)
        writer.start()
        writer.join(DISK_SECONDS)
        self._wait_for_peers()
        os._exit(EXIT_FAILED)

    def _write(self, line: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"rank-{self._distributed.rank:05d}.txt").open("w") as file:
            file.write(line + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        if self._distributed.is_main:
            self._report(line)

    # The store may be gone with its rank; then each rank relies on its own clock.

    def _word_of_peers(self) -> str | None:
        if self._store is None:
            return None
        try:
            return self._store.get("hang").decode() if self._store.check(["hang"]) else None
        except RuntimeError:
            return None

    def _tell_peers(self, reason: str) -> None:
        if self._store is None:
            return
        try:
            if not self._store.check(["hang"]):
                self._store.set("hang", reason)
        except RuntimeError:
            self._store = None

    def _wait_for_peers(self) -> None:
        """Wait until all ranks have written their stacks. Rank 0, which serves the store, exits last."""
        if self._store is None:
            return
        world_size = self._distributed.world_size
        until = time.monotonic() + PEERS_SECONDS
        try:
            self._store.add("shown", 1)
            self._wait_for_count("shown", world_size, until)
            if self._distributed.is_main:
                self._wait_for_count("left", world_size - 1, until)
            else:
                self._store.add("left", 1)
        except RuntimeError:
            self._store = None

    def _wait_for_count(self, name: str, count: int, until: float) -> None:
        assert self._store is not None
        while time.monotonic() < until and self._store.add(name, 0) < count:
            time.sleep(0.1)


def _own_store(distributed: Distributed) -> dist.Store | None:
    """Open a separate connection to the ranks' store: a waiting main thread may hold the process group's."""
    if distributed.world_size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
    return dist.PrefixStore(f"watchdog/{distributed.attempt}", store)
