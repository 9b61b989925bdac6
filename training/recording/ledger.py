"""The ledger of a run's costs: tokens, FLOPs and seconds by kind, and bytes communicated.

`seconds` in the record is training time: forward-backward, curvature, optimizer and data. Evaluation, checkpoints and
compilation are booked separately, so that comparisons of optimizers do not depend on how often a run evaluates or saves.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

Kind = Literal["forward_backward", "curvature", "optimizer", "data", "evaluation", "checkpoint", "compilation"]
TRAINING_KINDS: tuple[Kind, ...] = ("forward_backward", "curvature", "optimizer", "data")


@dataclass
class Entry:
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    count: int = 0


class CompilationClock:
    """Host seconds that torch.compile spends compiling in this process, measured by its start and end callbacks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._started = 0.0

    @classmethod
    def installed(cls) -> "CompilationClock":
        """Return this process's clock and hook it into torch.compile, again if torch._dynamo.reset() removed the hooks."""
        from torch._dynamo.callback import callback_handler

        if _CLOCK._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(_CLOCK._start)
            callback_handler.register_end_callback(_CLOCK._end)
        return _CLOCK

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.count += 1


_CLOCK = CompilationClock()  # of this process


class Ledger:
    """Cumulative costs by kind. On CUDA, seconds are device time from events, which need no synchronisation.

    Args:
        compilation: its seconds are booked as compilation instead of the kind during which they fell.
    """

    def __init__(self, device: torch.device, compilation: CompilationClock | None = None) -> None:
        self.entries: dict[Kind, Entry] = {kind: Entry() for kind in get_args(Kind)}
        self.bytes_communicated = 0
        self.shared_forwards = 0  # curvature passes that reused the training forward
        self._compilation = compilation or CompilationClock()
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[Kind, torch.cuda.Event, torch.cuda.Event, float]] = []

    @contextlib.contextmanager
    def measure(self, kind: Kind, tokens: int = 0, flops: int = 0, *, part: bool = False) -> Iterator[None]:
        """Book the block's time under `kind`, and its tokens and model FLOPs if it ends without an error.

        `part` books the time only; `add` counts the whole.
        """
        compiled = self._compilation.seconds
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._pending.append((kind, begin, end, self._compilation.seconds - compiled))
        else:
            started = time.perf_counter()
            yield
            self._book(kind, time.perf_counter() - started, self._compilation.seconds - compiled)
        if not part:
            self.add(kind, tokens, flops)

    def add(self, kind: Kind, tokens: int, flops: int) -> None:
        """Count something measured in parts, with its tokens and model FLOPs."""
        entry = self.entries[kind]
        entry.tokens += tokens
        entry.flops += flops
        entry.count += 1

    def _book(self, kind: Kind, seconds: float, compiling: float) -> None:
        self.entries[kind].seconds += max(0.0, seconds - compiling)
        if compiling:
            self.entries["compilation"].seconds += compiling
            self.entries["compilation"].count += 1

    def settle(self) -> None:
        """Convert completed CUDA events to seconds. Call it after a synchronisation."""
        while self._pending and self._pending[0][2].query():
            kind, begin, end, compiling = self._pending.pop(0)
            self._book(kind, begin.elapsed_time(end) / 1000, compiling)

    @property
    def flops(self) -> int:
        return sum(self.entries[kind].flops for kind in TRAINING_KINDS)

    @property
    def seconds(self) -> float:
        return sum(self.entries[kind].seconds for kind in TRAINING_KINDS)

    def as_dictionary(self) -> dict[str, dict[str, Any]]:
        return {kind: asdict(entry) for kind, entry in self.entries.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "entries": self.as_dictionary(),
            "bytes_communicated": self.bytes_communicated,
            "shared_forwards": self.shared_forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, values in state["entries"].items():
            self.entries[kind] = Entry(**values)
        self.bytes_communicated = state["bytes_communicated"]
        self.shared_forwards = state.get("shared_forwards", 0)  # older checkpoints lack it
