"""A run's progress: a live display on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column

from data.progress import duration

SECONDS_BETWEEN_PLAIN_LINES = 15.0
SECONDS_TO_THE_FIRST_ESTIMATE = 3.0  # of the time left
# Each control character except newline and tab, mapped to its visible symbol.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def printable(text: str) -> str:
    """Replace control characters, and so escape sequences, with visible symbols."""
    return text.translate(_PICTURES)


class SafeConsole(Console):
    """A console for untrusted text from records: no control character reaches the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def describe_step(line: Mapping[str, Any]) -> str:
    """`loss 3.2104  12.3k tok/s  unclipped 0.21`."""
    loss = line["loss"]
    parts = [
        f"loss {loss:.4f}" if loss is not None else "loss not finite",
        f"{_thousands(line['tokens_per_second'])} tok/s",
    ]
    if line.get("unclipped_fraction") is not None:
        parts.append(f"unclipped {line['unclipped_fraction']:.2f}")
    return "  ".join(parts)


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


class Display:
    """Progress of one run. Silent on all ranks except 0.

    Args:
        done: steps made before this process started.
    """

    def __init__(self, steps: int, done: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._steps = steps
        self._console = Console(stderr=True)
        self._next_plain = 0.0
        self._began: tuple[float, int] | None = None  # when this process's first step, which may compile, ended
        self._validation = ""
        self._progress: Progress | None = None
        if enabled and self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn(
                    "{task.fields[metrics]}",
                    style="cyan",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps, completed=done, metrics="")
            self._progress.start()

    def message(self, text: str) -> None:
        """Print a line above the progress bar. A line that cannot be written does not stop the run."""
        if self._enabled:
            with contextlib.suppress(OSError):  # a full disk or a closed pipe
                if self._progress is not None:
                    self._progress.console.print(text, highlight=False, markup=False)
                else:
                    print(text, file=sys.stderr, flush=True)

    def step(self, line: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        step = line["step"]
        if self._progress is not None:
            metrics = "  ".join(filter(None, (self._validation, describe_step(line))))
            self._progress.update(self._task, completed=step, metrics=metrics)
            return
        now, left = time.monotonic(), ""
        if self._began is None:
            self._began, self._next_plain = (now, step), now + SECONDS_TO_THE_FIRST_ESTIMATE
        elif step == self._steps or now > self._next_plain:
            self._next_plain = now + SECONDS_BETWEEN_PLAIN_LINES
            began, first = self._began
            left = f"  {duration((now - began) / (step - first) * (self._steps - step))} left"
        else:
            return
        self.message(f"step {step}/{self._steps}  {describe_step(line)}{left}")

    def evaluation(self, line: Mapping[str, Any]) -> None:
        value = line["val_loss"]
        self._validation = f"val {value:.4f}" if value is not None else "val not finite"
        bits = line.get("val_bits_per_byte")
        suffix = "" if bits is None else f" ({bits:.4f} bits per byte)"
        self.message(f"step {line['step']}/{self._steps}  {self._validation}{suffix}")

    def close(self) -> None:
        try:
            if self._progress is not None:
                self._progress.stop()
            sys.stderr.flush()
        except OSError:
            # Python would flush again on exit, fail again, and replace the exit code.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)
