"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop; a second one ends the process at once.

Under torchrun one request may come twice: systemd and some clusters signal every process of a job, and torchrun passes
its signal on besides. There the same signal within `PASSED_ON_SECONDS` of the first is the first.

Python runs signal handlers between bytecodes of the main thread, which may be waiting in a collective or a kernel. So
the handlers do nothing, and a thread listens on the pipe into which the interpreter's C-level handler writes the
signal's number: the second signal ends a process that hangs, too.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PASSED_ON_SECONDS = 2.0


class StopSignals:
    """A context in which stop signals are noticed; called, it says whether one has come.

    Outside of the main thread, where signals cannot be caught, it is never asked to stop.

    Args:
        exit_code: of a process that is asked to stop before `begin`: it has nothing to save yet and ends at once.
        speaks: say on standard error that a signal has come (rank 0).
    """

    def __init__(self, exit_code: int, *, speaks: bool) -> None:
        self._exit_code = exit_code
        self._speaks = speaks
        self._begun = False
        self._received: list[int] = []
        self._since = 0.0
        self._passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __call__(self) -> bool:
        return bool(self._received)

    def begin(self) -> None:
        """From here on there is something to save, or there are others to agree with: the first signal is left to the
        loop."""
        self._begun = True

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reading, writing = self._pipe = os.pipe()
        os.set_blocking(writing, False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, _left_to_the_listener)
        self._previous_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        reading, writing = self._pipe
        signal.set_wakeup_fd(self._previous_descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(writing)
        self._listener.join()
        os.close(reading)

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 1):
            number = numbers[0]
            if number not in STOP_SIGNALS:
                continue
            if self._passed_on and number in self._received and time.monotonic() - self._since < PASSED_ON_SECONDS:
                continue
            if self._received:
                self._say(f"{signal.Signals(number).name}, the second signal: ending at once")
                os._exit(128 + number)
            self._since = time.monotonic()
            self._received.append(number)
            if not self._begun:
                self._say(f"{signal.Signals(number).name} before training has begun: ending")
                os._exit(self._exit_code)
            self._say(
                f"{signal.Signals(number).name}: finishing the step and saving; a second signal ends the run at once"
            )

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):  # a log on a full disk: the signal is obeyed all the same
                print(text, file=sys.stderr, flush=True)


def _left_to_the_listener(number: int, frame: FrameType | None) -> None:
    pass
