"""Asked to stop: the step is finished and saved, the exit code says so, and the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import before, curve, lines, run, run_in_child, signal_self, summary, tiny

PREEMPTED = 75


def stop_in_step(step: int, number: int) -> None:
    from training import loop

    before(loop, "forward_backward", lambda: signal_self(number), lambda run, *rest: run.state.step == step - 1)


def stop_in_refresh(step: int) -> None:
    from training.curvature import CurvaturePass

    before(
        CurvaturePass,
        "run_within_training",
        lambda: signal_self(signal.SIGTERM),
        lambda *arguments: arguments[3] == step,
    )


def stop_in_save(step: int) -> None:
    from training import checkpoints

    before(checkpoints, "save", lambda: signal_self(signal.SIGTERM), lambda *arguments: arguments[1] == step)


def stop_in_set_up() -> None:
    from training import run

    before(run, "build_strategy", lambda: signal_self(signal.SIGTERM), lambda *arguments: True)


def stop_in_evaluation(step: int) -> None:
    """In the first of two forwards of the evaluation after so many updates."""
    from data.batches import ValidationWindows
    from training import loop

    original = loop.validation_loss

    def stopped(strategy: Any, windows: ValidationWindows, *rest: Any) -> Any:
        forwards: list[None] = []
        before(
            strategy,
            "forward",
            lambda: signal_self(signal.SIGTERM),
            lambda *_: forwards.append(None) or len(forwards) == 1,
        )
        return original(strategy, windows, *rest)

    def evaluate(run: Any) -> bool:
        loop.validation_loss = stopped if run.state.step == step else original
        return evaluating(run)

    evaluating, loop.evaluate = loop.evaluate, evaluate


def two_signals_under_a_launcher(step: int, passed_on_seconds: float) -> None:
    """SIGTERM to all processes of a job reaches this one twice: from the system, and from its launcher."""
    from training import loop, signals

    os.environ["TORCHELASTIC_RUN_ID"] = "some"
    signals.PASSED_ON_SECONDS = passed_on_seconds

    def twice() -> None:
        for _ in range(2):
            signal_self(signal.SIGTERM)
            time.sleep(0.3)

    before(loop, "forward_backward", twice, lambda run, *rest: run.state.step == step - 1)


def two_signals_while_stuck(step: int) -> None:
    """The main thread waits in C, as in a collective: no handler of Python's ever runs."""
    import threading

    from training import loop

    def stuck() -> None:
        def twice() -> None:
            for _ in range(2):
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=twice, daemon=True).start()
        reading, _ = os.pipe()
        while True:
            os.read(reading, 1)

    before(loop, "forward_backward", stuck, lambda run, *rest: run.state.step == step - 1)


@pytest.fixture(scope="module")
def undisturbed(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(tiny(corpus, directory)) == 0
    return curve(directory / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_a_saved_step_and_it_goes_on_bit_for_bit(
    number: signal.Signals, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, stop_in_step, 13, number) == PREEMPTED
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert summary(tmp_path / "run")["steps"] == 13
    assert (tmp_path / "run" / "checkpoints" / "step-00000013").is_dir()
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed
    assert [line["step"] for line in lines(tmp_path / "run", "event")] == [13]


@pytest.mark.parametrize(
    ("act", "step", "saved"), [(stop_in_refresh, 16, 16), (stop_in_save, 10, 10), (stop_in_save, 20, 20)]
)
def test_a_signal_in_a_refresh_or_a_save_loses_nothing(
    act: Any, step: int, saved: int, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, act, step) == PREEMPTED
    assert summary(tmp_path / "run")["steps"] == saved
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


def test_an_evaluation_that_is_due_is_left_to_the_next_sitting(
    corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, stop_in_step, 16, signal.SIGTERM) == PREEMPTED
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [0, 8]
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("step", [0, 16, 24])
def test_a_signal_in_an_evaluation_is_obeyed_before_its_end(
    step: int, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path, "eval.micro_batch_size=8")
    assert run_in_child(overrides, stop_in_evaluation, step) == PREEMPTED
    assert summary(tmp_path / "run")["steps"] == step
    assert f'"kind":"eval","step":{step},' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert step == 0 or (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_next_sitting(
    corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    assert run_in_child(tiny(corpus, tmp_path), stop_in_step, 24, signal.SIGTERM) == PREEMPTED
    assert (tmp_path / "run" / "checkpoints" / "step-00000024").is_dir()
    assert run(tiny(corpus, tmp_path)) == 0
    assert summary(tmp_path / "run")["status"] == "completed"
    assert curve(tmp_path / "run") == undisturbed


def test_a_signal_that_a_launcher_passes_on_is_no_second_one(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, two_signals_under_a_launcher, 13, 60.0) == PREEMPTED
    assert summary(tmp_path / "run")["steps"] == 13
    assert run_in_child(overrides, two_signals_under_a_launcher, 16, 0.1) == 128 + signal.SIGTERM


def test_a_signal_in_set_up_ends_the_process_and_leaves_nothing(corpus: list[str], tmp_path: Path) -> None:
    assert run_in_child(tiny(corpus, tmp_path), stop_in_set_up) == PREEMPTED
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_a_process_that_is_stuck_in_c(corpus: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_in_child(tiny(corpus, tmp_path), two_signals_while_stuck, 13) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_handlers_of_before_are_there_after_a_run(corpus: list[str], tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert run(tiny(corpus, tmp_path, "train.steps=3")) == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
