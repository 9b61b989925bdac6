"""Progress of a preparation: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

_LINE_SECONDS = 10.0


class Progress:
    """The interface; this class shows nothing. One thread calls it at a time."""

    def message(self, text: str) -> None:
        """Show a line of text."""

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """Start tokenisation of `total_bytes` of text, of which an earlier run did `done_bytes`."""

    def advance(self, text_bytes: int, tokens: int, documents: int) -> None:
        """Count work done since the last call."""

    def end(self) -> None:
        """Close the display."""


class LineProgress(Progress):
    """A line every ten seconds, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._total = self._before = self._bytes = self._tokens = self._documents = 0
        self._began = self._last = time.monotonic()

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        self._total, self._before = total_bytes, done_bytes
        self._began = self._last = time.monotonic()
        resumed = f", of which {done_bytes / 1e6:.1f} MB are already done" if done_bytes else ""
        self.message(f"tokenising about {total_bytes / 1e6:.1f} MB of text{resumed}")

    def advance(self, text_bytes: int, tokens: int, documents: int) -> None:
        self._bytes += text_bytes
        self._tokens += tokens
        self._documents += documents
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._line()

    def end(self) -> None:
        if self._tokens:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rest = max(self._total - self._before - self._bytes, 0)
        left = rest * seconds / self._bytes if self._bytes else float("inf")
        share = min((self._before + self._bytes) / self._total, 1.0) if self._total else 1.0
        self.message(
            f"{share:.1%}  {self._documents:,} documents  {self._tokens:,} tokens  "
            f"{self._tokens / seconds / 1e6:.2f} M tokens/s  {self._bytes / seconds / 1e6:.1f} MB/s  "
            + (f"{duration(left)} left" if rest else f"{duration(seconds)} in total")
        )


class BarProgress(Progress):
    """A rich progress bar with throughput and time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        import rich.console
        import rich.progress as columns

        self._tokens = 0
        self._began = time.monotonic()
        self._task: rich.progress.TaskID | None = None
        self._bar = columns.Progress(
            columns.TextColumn("tokenising"),
            columns.BarColumn(),
            columns.TaskProgressColumn(),
            columns.DownloadColumn(),
            columns.TextColumn("{task.fields[rate]}"),
            columns.TimeRemainingColumn(),
            console=rich.console.Console(file=stream if stream is not None else sys.stderr),
        )

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        self._began = time.monotonic()
        self._task = self._bar.add_task("tokenising", total=total_bytes, completed=done_bytes, rate="")
        self._bar.start()

    def advance(self, text_bytes: int, tokens: int, documents: int) -> None:
        self._tokens += tokens
        if self._task is not None:
            rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
            self._bar.update(self._task, advance=text_bytes, rate=f"{rate / 1e6:.2f} M tokens/s")

    def end(self) -> None:
        self._bar.stop()


def progress_display(stream: TextIO | None = None) -> Progress:
    """A bar if the stream (standard error by default) is a terminal, else lines."""
    stream = stream if stream is not None else sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 for less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
