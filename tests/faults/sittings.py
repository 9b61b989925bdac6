"""Sittings of a run (one start until its end) as real processes, to be killed and signalled from outside.

A fork server imports torch and the project once. A rank is a process forked from it, with its own sockets, locks and
signals. The project's code has no test hooks: the log and the run directory show what a sitting is doing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = ("training.run", "training.launching.command", "training.strategies.ddp", "tests.training.runs")
#: A sitting that takes longer than this hangs.
LIMIT_SECONDS = 120.0

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*PRELOADED])


def preload(*modules: str) -> None:
    """Have the fork server import these modules as well. Call it before the first sitting."""
    _SERVER.set_forkserver_preload([*PRELOADED, *modules])


class Sitting:
    """One command line, started immediately in `ranks` processes.

    Args:
        overrides: of train.py.
        log: the ranks' output, of both streams.
        ranks: number of processes.
        environment: variables of the processes, in addition to RANK and the like.
        prepare: called in each process before it starts.
        own: more overrides of single ranks, as on nodes that were started differently.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        log: Path,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        own: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.log = log
        self.began = time.time()
        log.write_bytes(b"")
        given = dict(environment or {})
        port = free_port() if ranks > 1 else 0
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            variables = given | (place if ranks > 1 else {})
            chosen = [*overrides, *(own or {}).get(rank, ())]
            process = _SERVER.Process(target=_run, args=(chosen, os.fspath(log), variables, prepare))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], poll: float = 0.001) -> bool:
        """Return whether the condition became true before the sitting ended."""
        until = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if not self.running:
                return condition()
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"the run hangs; it said:\n{self.said()}")
            time.sleep(poll)
        return True

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank or to all."""
        self.signal(signal.SIGKILL, rank)

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """Wait for all processes. Returns the ranks' exit codes, -n for signal n."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        if self.running:
            self.kill()
            for process in self.processes:
                process.join()
            raise AssertionError(f"the run hangs; it said:\n{self.said()}")
        return [process.exitcode if process.exitcode is not None else -1 for process in self.processes]


def completed(overrides: Sequence[str], log: Path, ranks: int = 1, **named: Any) -> str:
    """Run a command line to its end and check that it succeeded. Returns its output."""
    sitting = Sitting(overrides, log, ranks, **named)
    codes = sitting.wait()
    assert codes == [0] * ranks, f"exit codes {codes}:\n{sitting.said()}"
    return sitting.said()


def _run(overrides: list[str], log: str, variables: dict[str, str], prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    import torch

    from training.launching import command

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    raise SystemExit(command.main(overrides))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
