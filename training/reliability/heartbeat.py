"""Heartbeats that tell which rank has died: each rank increments a counter in a shared store every second.

A collective that misses a rank fails with a socket's address (gloo) or waits forever (NCCL). The counters name the rank
and bound the wait: a counter that stops for `LIMIT` seconds ends all other ranks. They run in a thread, so a rank that is
alive but stuck in a collective keeps counting; the collectives' own time-out covers that case.
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from training.exits import EXIT_RANK_LOST

INTERVAL = 1.0  # seconds from one beat to the next
LIMIT = 120.0  # seconds without a beat after which a rank counts as dead
SETTLED = 4.0  # seconds within which a living rank is sure to beat
STORE_LOST = "the ranks' store is gone, and with it rank 0 or its launcher"


class Heartbeat:
    """This rank's heartbeat, and the check of the others'.

    Args:
        store: a connection to the ranks' store that nothing else uses.
        rank, world_size: this process's place.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()  # the store's client serves one request at a time
        self._stopped = threading.Event()
        self._counts: list[int] = []
        self._changed: list[float] = []
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def of_attempt(cls, attempt: str, rank: int, world_size: int) -> "Heartbeat":
        """Open a separate connection to the ranks' store at MASTER_ADDR:MASTER_PORT."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LIMIT))
        return cls(dist.PrefixStore(attempt, store), rank, world_size)

    def start(self) -> None:
        """Start beating and watching. Every rank's counter must be in the store."""
        self._thread.start()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        """Leave in good order: the other ranks no longer wait for this rank's beats."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * INTERVAL)
        with self._lock, contextlib.suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"left/{self._rank}", "1")

    def gone(self, seconds: float = SETTLED) -> str | None:
        """Wait `seconds` and describe the ranks that did not beat, or the loss of the store. None if all is well."""
        try:
            before = self._read()
            time.sleep(seconds)
            after = self._read()
        except RuntimeError:
            return STORE_LOST
        lost = [rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a == b and rank != self._rank]
        return f"rank {', '.join(map(str, lost))} is gone" if lost else None

    def _run(self) -> None:
        answered = time.monotonic()
        while not self._stopped.wait(INTERVAL):
            try:
                self._beat()
                lost = self._overdue()
            except RuntimeError:
                if self._stopped.is_set():
                    return
                leave(self._rank, f"{STORE_LOST}: no answer for {time.monotonic() - answered:.0f} s")
                return
            answered = time.monotonic()
            if lost:
                seconds = answered - min(self._changed[rank] for rank in lost)
                leave(self._rank, f"rank {', '.join(map(str, lost))} is gone: no sign of life for {seconds:.0f} s")

    def _beat(self) -> None:
        with self._lock:
            self._store.add(beats_key(self._rank), 1)

    def _read(self) -> list[int]:
        with self._lock:
            return [int(value) for value in self._store.multi_get([beats_key(r) for r in range(self._world_size)])]

    def _overdue(self) -> list[int]:
        """Return overdue ranks. Rank 0 watches all and all watch rank 0: one request per rank and beat, not W²."""
        watched = range(self._world_size) if self._rank == 0 else range(1)
        with self._lock:
            counts = [int(value) for value in self._store.multi_get([beats_key(r) for r in watched])]
        now = time.monotonic()
        if not self._counts:
            self._counts, self._changed = counts, [now] * len(counts)
        for index, count in enumerate(counts):
            if count != self._counts[index]:
                self._counts[index], self._changed[index] = count, now
        overdue = [r for r in watched if r != self._rank and now - self._changed[r] > LIMIT]
        with self._lock:
            return [r for r in overdue if not self._store.check([f"left/{r}"])]


def beats_key(rank: int) -> str:
    """Return the key of a rank's counter within its attempt."""
    return f"beats/{rank}"


def leave(rank: int, reason: str) -> None:
    """Print the reason and exit immediately. Nothing can be saved: a checkpoint needs all ranks."""
    with contextlib.suppress(OSError):  # standard error may not be writable
        print(
            f"error: {reason}; rank {rank} stops. Rerun the same command to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_RANK_LOST)
