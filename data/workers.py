"""The parent side of a preparation's workers.

Workers are plain child processes. multiprocessing's would import the calling program (with torch) again in each child
and become orphans when it is killed; these end when their pipe closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.errors import DataError
from data.progress import Progress


class Worker:
    """One process (data/worker.py) that answers requests; as a context manager, it stops the process on exit.

    Args:
        lock: the descriptor of the directory's lock. The child inherits it, so that the lock stays held while a child
            outlives a killed parent.
    """

    def __init__(self, lock: int) -> None:
        root = os.fspath(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data.worker"],  # the current directory may have a module `data`
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(lock,),
        )

    def messages(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request and yield its messages, up to {"done": result}.

        Raises:
            DataError: the request failed, or the process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reading = "the corpus"
        for line in self._process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise DataError(message["error"])
            reading = message.get("reading", reading)
            yield message
            if "done" in message:
                return
        raise DataError(
            f"a worker {_ending(self._process.wait())} while it read {reading}; check that file and the free memory, "
            "then rerun the same command to resume, with fewer workers if memory was short"
        )

    def result(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its result; raises as `messages`."""
        for message in self.messages(request):
            if "done" in message:
                return message["done"]
        raise AssertionError("messages ends with a result or an error")

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        self._process.__exit__(kind, error, trace)


def run_requests(
    requests: Sequence[dict[str, Any]],
    sizes: Sequence[int],  # bytes of text that each request reads
    started: Worker,  # one that runs already
    workers: int,
    lock: int,
    display: Progress,
) -> None:
    """Spread the requests over `workers` processes, showing progress, and stop them all at the first error.

    Raises:
        DataError: as `Worker.messages`.
    """
    # Largest first, so that all workers finish at about the same time.
    order = sorted(range(len(requests)), key=lambda place: -sizes[place])
    pending = iter(order)
    mutex = threading.Lock()
    idle = [started]
    running: list[Worker] = []

    def serve() -> None:
        with mutex:
            worker = idle.pop() if idle else Worker(lock)
            running.append(worker)
        with worker:
            while True:
                with mutex:
                    place = next(pending, None)
                if place is None:
                    return
                shown = 0
                for message in worker.messages(requests[place]):
                    with mutex:
                        if "done" in message:
                            display.advance(sizes[place] - shown, 0, 0)  # correct the estimated progress
                        elif "bytes" in message:
                            shown += message["bytes"]
                            display.advance(message["bytes"], message["tokens"], message["documents"])

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(serve) for _ in range(workers)]):
                future.result()
        except BaseException:
            with mutex:
                pending = iter(())
                for worker in running:
                    worker.kill()
            raise


def _ending(code: int) -> str:
    if code == -9:
        return "was killed (signal 9: usually out of memory)"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, fewer than the machine's in a job of a cluster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
