"""Tiny whole runs for tests: a corpus of a few thousand tokens, a model of a few thousand weights, seconds a run."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data import prepare
from training.compose import compose
from training.corpus import source_of, token_directory_of, tokenizer_of
from training.launching import command
from training.reliability.signals import STOP_SIGNALS, StopSignals

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ("the light", "a ship", "nobody", "the old keeper", "every winter", "her brother", "the sea")
VERBS = ("came over", "was lost in", "remembered", "spoke of", "turned from", "waited for")
OBJECTS = ("the grey water", "the harbour", "a long night", "the first snow", "its own shadow", "the narrow road")

# What differs between two runs of one curve: clocks, and what is read off them.
CLOCKED = ("seconds", "tokens_per_second")


def write_corpus(directory: Path, documents: int = 160) -> Path:
    """Sentences of a small grammar, so that there is something to learn; one document a line."""
    generator = np.random.default_rng(0)
    path = directory / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            sentences = [
                f"{generator.choice(SUBJECTS)} {generator.choice(VERBS)} {generator.choice(OBJECTS)}"
                for _ in range(generator.integers(6, 20))
            ]
            file.write(json.dumps({"text": ". ".join(sentences) + "."}) + "\n")
    return path


def corpus_overrides(directory: Path) -> list[str]:
    return [
        "data=text",
        f"data.paths=[{directory}/corpus.jsonl]",
        f"data.directory={directory}/tokens",
        "data.validation.fraction=0.2",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
    ]


def prepare_corpus(directory: Path, documents: int = 160) -> list[str]:
    """Write and prepare the corpus; returns the overrides that choose it."""
    write_corpus(directory, documents)
    overrides = corpus_overrides(directory)
    config = compose(overrides)
    prepare(source_of(config), tokenizer_of(config), token_directory_of(config), workers=1)
    return overrides


def tiny(corpus: Sequence[str], output_dir: Path, *overrides: str, name: str = "run") -> list[str]:
    """The command line of a tiny run: 24 steps in float32, a refresh of the Hessian every 5, a checkpoint every 10."""
    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    optimizer = next((o.split("=")[1] for o in overrides if o.startswith("optimizer=")), "sophiag")
    defaults = [
        f"name={name}",
        f"output_dir={output_dir}",
        "model=gpt2_nano",
        "model.n_embd=32",
        "optimizer=sophiag",
        "train.steps=24",
        "train.global_batch_size=8",
        "train.sequence_length=16",
        "train.precision=fp32",
        "train.compile=false",
        "train.device=cpu",
        "eval.interval=8",
        "eval.tokens=256",
        "checkpoint.interval=10",
        "schedule.warmup_steps=2",
    ]
    if optimizer in ("sophiag", "sophiah", "adahessian"):
        defaults.append("optimizer.hessian_interval=5")
    return [*corpus, *(d for d in defaults if d.split("=")[0] not in given), *overrides]


def run(overrides: Sequence[str]) -> int:
    """The command line in this process; its exit code."""
    return command.main(overrides)


def lines(run_directory: Path, *kinds: str) -> list[dict[str, Any]]:
    """The record's lines, strictly parsed."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    text = (run_directory / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    parsed = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in parsed if not kinds or line["kind"] in kinds]


def curve(run_directory: Path) -> list[dict[str, Any]]:
    """What must not depend on how often a run was interrupted: all lines but events, without their clocks."""
    return [
        {key: value for key, value in line.items() if key not in CLOCKED}
        for line in lines(run_directory, "train", "eval", "hessian")
    ]


def signals_of_this_run() -> StopSignals:
    """What tells the run in this process that it is asked to stop."""
    (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals")
    asked_to_stop: StopSignals = listener._args[-1].__self__  # type: ignore[attr-defined]
    return asked_to_stop


def signal_self(number: int) -> None:
    """Send this process, which is in a run, a signal; returns once the run knows that it is asked to stop."""
    os.kill(os.getpid(), number)
    asked_to_stop = signals_of_this_run()
    while not asked_to_stop():
        time.sleep(0.001)


def summary(run_directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_directory / "summary.json").read_text())
    return values


# Processes of their own, to be killed. A fork server has the imports done once; a child starts in a fraction of a second.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["training.run", "training.launching.command", "training.strategies.ddp", "tests.training.runs"]
)


def run_in_child(
    overrides: Iterable[str],
    prepare_child: Callable[..., None] | None = None,
    *arguments: Any,
    errors: Path | None = None,
) -> int:
    """The command line in a child process, after `prepare_child(*arguments)` there; the exit code, -n for signal n.

    Args:
        errors: a file for what the child says on standard error.
    """
    process = _SERVER.Process(target=_child, args=(list(overrides), prepare_child, arguments, errors))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError("the run hangs")
    assert process.exitcode is not None
    return process.exitcode


def _child(
    overrides: list[str],
    prepare_child: Callable[..., None] | None,
    arguments: tuple[Any, ...],
    errors: Path | None,
) -> None:
    import torch

    if errors is not None:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if prepare_child is not None:
        prepare_child(*arguments)
    raise SystemExit(command.main(overrides))


class Session:
    """The command line in a session of its own, as a terminal or a scheduler starts it; stop signals are blocked, as in a
    worker of a sweep. A context manager, which kills what is left of it."""

    def __init__(self, overrides: Sequence[str], directory: Path) -> None:
        self._said = [directory / f"{next(_NUMBERS)}.{stream}" for stream in ("out", "err")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = _SERVER.Process(target=_session, args=([*overrides], self._said, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it may not have its session yet
        self._process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait_for(self, path: Path, text: str, seconds: float = 120) -> None:
        """Until the file of the run has the text."""
        until = time.monotonic() + seconds
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < until, f"{path} has no {text!r}: {self._said[1].read_text()[-3000:]}"
            time.sleep(0.02)

    def end(self, seconds: float = 240) -> tuple[int, str, str]:
        """The exit code, and what was said on standard output and error."""
        self._process.join(seconds)
        out, err = (path.read_text() for path in self._said)
        assert self._process.exitcode is not None, f"the session hangs: {err[-3000:]}"
        return self._process.exitcode, out, err


_NUMBERS = itertools.count()


def _session(overrides: list[str], said: list[Path], environment: dict[str, str]) -> None:
    import torch

    os.setsid()
    os.environ.update(environment)
    for descriptor, path in enumerate(said, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    code = command.main(overrides)
    threading._shutdown()  # type: ignore[attr-defined]  # before processes are waited for, as in an interpreter that ends
    raise SystemExit(code)


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, act: Callable[..., Any], when: Callable[..., bool]) -> None:
    """In this process, have `act` called before each call of `owner.name` whose arguments fulfil `when`."""
    original = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        if when(*arguments, **named):
            act()
        return original(*arguments, **named)

    setattr(owner, name, replaced)
