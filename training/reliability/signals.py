"""SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGQUIT ask a run to stop; a second one ends the process immediately.

A closing terminal sends SIGHUP more than once (from the kernel and the shell), and systemd may send it right after
SIGTERM, so SIGHUP never counts as the second signal. If nohup ignores it, it stays ignored.

Under torchrun and in a sweep one request may arrive twice: systemd and some clusters signal every process of a job, a
terminal signals its whole process group, and the parent passes its signal on as well. There, the same signal within
`PASSED_ON_SECONDS` counts once.

Python runs signal handlers between bytecodes of the main thread, which may be waiting in a collective or a kernel. So
the handlers do nothing, and a thread reads the pipe into which the interpreter's C-level handler writes the signal's
number. A second signal therefore also ends a process that hangs.

Only that thread takes the signals; all others block them. Child processes inherit the mask: a compiler that also receives
a terminal's Ctrl-C finishes its work, and a sweep's workers keep a signal pending until their trial listens.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON_SECONDS = 2.0


def handled_signals() -> list[signal.Signals]:
    """Return the stop signals, without SIGHUP and SIGQUIT if the parent ignores them (nohup, background jobs)."""
    return [
        number
        for number in STOP_SIGNALS
        if number not in (signal.SIGHUP, signal.SIGQUIT) or signal.getsignal(number) is not signal.SIG_IGN
    ]


@contextlib.contextmanager
def listening(notice: Callable[[int], None]) -> Iterator[None]:
    """Call `notice` in a thread for each stop signal. Does nothing outside the main thread, which cannot catch signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = handled_signals()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _ignore) for number in numbers}
    listener = threading.Thread(target=_listen, args=(reading, numbers, notice), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writing)
        listener.join()
        os.close(reading)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def shield_resource_tracker() -> None:
    """Start multiprocessing's helper process with stop signals blocked, and leave this thread's signals as they are.

    srun sends a signal to all processes of a step. The helper handles only SIGINT and SIGTERM, and its death would cost a
    traceback for each of its resources. Where Python starts it by itself, both end up unblocked in that thread, and then
    in its children.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class StopSignals:
    """A context that listens for stop signals. Calling it returns whether one has arrived.

    Args:
        exit_code: of a process that is asked to stop before `begin`; it has nothing to save and exits immediately.
        speaks: report signals on standard error (rank 0).
        begun: called by `begin`.
    """

    def __init__(self, exit_code: int, *, speaks: bool, begun: Callable[[], None] = lambda: None) -> None:
        self._exit_code = exit_code
        self._speaks = speaks
        self._begun = begun
        self._received: list[int] = []
        self._since = 0.0
        # A sweep's worker has the signals blocked. If it exited by itself, joblib would kill the others.
        self._started = is_worker = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._passed_on = is_worker or "TORCHELASTIC_RUN_ID" in os.environ

    def __call__(self) -> bool:
        return bool(self._received)

    def begin(self) -> None:
        """Leave the first signal to the training loop from here on: there is something to save, or ranks must agree."""
        self._begun()
        self._started = True

    def __enter__(self) -> Self:
        self._listening = listening(self.notice)
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(kind, error, trace)

    def notice(self, number: int) -> None:
        """Handle a stop signal."""
        name = signal.Signals(number).name
        if not self._received:
            self._since = time.monotonic()
            self._received.append(number)
            if not self._started:
                self._say(f"{name} before training started: exiting")
                os._exit(self._exit_code)
            self._say(f"{name}: finishing the step and saving; a second signal ends the run immediately")
        elif number != signal.SIGHUP and not self._is_passed_on(number):
            self._say(f"{name}, the second signal: exiting immediately")
            os._exit(128 + number)

    def _is_passed_on(self, number: int) -> bool:
        return self._passed_on and number in self._received and time.monotonic() - self._since < PASSED_ON_SECONDS

    def _say(self, text: str) -> None:
        if self._speaks:
            say(text)


@contextlib.contextmanager
def passed_on_to_workers(launcher: str, exit_code: int) -> Iterator[None]:
    """Pass stop signals on to a sweep's worker processes, which save and return, and wait for them.

    Args:
        launcher: the target of Hydra's launcher. Only joblib has workers: a trial in this process listens itself, and a
            cluster signals its own jobs.
        exit_code: of this process if it is asked to stop before it has workers.
    """
    if "joblib" not in launcher:
        yield
        return
    stopped: list[int] = []

    def notice(number: int) -> None:
        if stopped and number == signal.SIGHUP:
            return
        name = signal.Signals(number).name
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        if stopped or not workers:
            say(f"{name}: exiting immediately")
            os._exit(128 + number if stopped else exit_code)
        stopped.append(number)
        say(f"{name}: the trials finish their step and save; a second signal ends them immediately")

    shield_resource_tracker()
    with listening(notice):
        yield


def stop_pending() -> bool:
    """Return whether a stop signal is pending in this sweep worker."""
    return not signal.sigpending().isdisjoint(STOP_SIGNALS)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk or closed terminal must not stop the signal's handling
        print(text, file=sys.stderr, flush=True)


def _listen(reading: int, numbers: Sequence[int], notice: Callable[[int], None]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    while received := os.read(reading, 1):
        if received[0] in numbers:
            notice(received[0])


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
