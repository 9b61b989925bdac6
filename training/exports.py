"""Exports of checkpoints to Hugging Face directories, at chosen steps of a run.

    <run>/exports/step-00001000/

Each is a process of its own, scripts/export.py: training imports nothing of downstream, and the run goes on meanwhile. An
export that was interrupted is made when the run resumes; until then its checkpoint is kept.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

import psutil

from training.records import checkpoint_name

EXPORTS = "exports"
#: How long a run waits at its end for exports that are still being made.
FINISH_SECONDS = 900.0
_SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "export.py"
#: Variables that make a process a rank, or show it the devices that the run has.
_OF_RANKS = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


class Exports:
    """The exports of one run; for rank 0.

    Args:
        run: the run directory.
        steps: after which to export.
        tokens: the run's token directory.
        report: called with a line and its step about each export that has ended.
    """

    def __init__(self, run: Path, steps: Collection[int], tokens: Path, report: Callable[[str, int], None]) -> None:
        self._run, self._tokens, self._report = run, tokens, report
        self._left = set(steps)  # neither made nor failed
        self._running: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}

    @property
    def unfinished(self) -> set[int]:
        """The steps whose checkpoints are still needed."""
        return set(self._left)

    def start(self) -> None:
        """Start those exports whose checkpoints have been saved and that have not been made, and report those that ended.

        One that cannot be started is reported, and is tried again at the next call.
        """
        self._reap()
        for step in sorted(self._left - self._running.keys()):
            checkpoint, export = self._run / "checkpoints" / checkpoint_name(step), self._export(step)
            try:
                if export.is_dir():
                    self._left.discard(step)
                elif checkpoint.is_dir():
                    self._delete_partial(step)
                    self._running[step] = self._start(checkpoint, export)
            except OSError as error:  # no memory, no processes, no room for a temporary file
                reason = error.strerror or error
                self._report(
                    f"{export} could not be started: {reason}; tried again after the next save, or: "
                    f"python scripts/export.py {checkpoint} {export}",
                    step,
                )

    def _start(self, checkpoint: Path, export: Path) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        command = [sys.executable, str(_SCRIPT), str(checkpoint), str(export)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_OF_RANKS)}
        with contextlib.ExitStack() as opened:
            errors = opened.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [*command, "--token-directory", str(self._tokens)],
                env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # the run decides when it ends, not the terminal
            )
            opened.pop_all()  # closed when the process has ended
        return process, errors

    def finish(self, stop: Callable[[], bool], *, resumable: bool) -> None:
        """Wait for the exports that are being made until `stop`, then end the rest, which leave no directory.

        If the run cannot be resumed, exports that were not made are reported, with the command that makes them.
        """
        until = time.monotonic() + FINISH_SECONDS
        while self._running and not stop() and time.monotonic() < until:
            time.sleep(0.05)
            self._reap()
        for step, (process, errors) in self._running.items():
            process.kill()
            process.wait()
            errors.close()
            self._delete_partial(step)
        self._running.clear()
        for step in [] if resumable else sorted(self._left):
            checkpoint, export = self._run / "checkpoints" / checkpoint_name(step), self._export(step)
            remedy = f"python scripts/export.py {checkpoint} {export}"
            if not checkpoint.is_dir():
                remedy = f"there is no checkpoint of step {step}; scripts/export.py exports any in {checkpoint.parent}"
            self._report(f"{export} was not made: {remedy}", step)

    def _delete_partial(self, step: int) -> None:
        """Delete what killed exports of the step have left (downstream/export.py names it), unless one is still writing."""
        export = self._export(step)
        for partial in export.parent.glob(f".{export.name}.*.partial"):
            if not psutil.pid_exists(int(partial.name.split(".")[2])):
                shutil.rmtree(partial, ignore_errors=True)

    def _export(self, step: int) -> Path:
        return self._run / EXPORTS / checkpoint_name(step)

    def _reap(self) -> None:
        for step, (process, errors) in list(self._running.items()):
            if process.poll() is None:
                continue
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            errors.close()
            del self._running[step]
            self._left.discard(step)
            export = self._export(step)
            # Ranks that were restarted may have left a process that made the same export.
            self._report(f"exported {export}" if export.is_dir() else f"{export} failed: {said[-1]}", step)
