"""A run asked to stop finishes and saves its step and exits with 75; the same command resumes it."""

from __future__ import annotations

import functools
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import before, curve, lines, run, run_in_child, signal_self, summary, tiny
from training.exits import EXIT_PREEMPTED
from training.launching import command
from training.reliability.signals import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[3]


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
    from training.reliability import checkpoints

    before(checkpoints, "save", lambda: signal_self(signal.SIGTERM), lambda *arguments: arguments[1] == step)


def stop_in_set_up() -> None:
    from training import run

    before(run, "build_strategy", lambda: signal_self(signal.SIGTERM), lambda *arguments: True)


def stop_in_evaluation(step: int) -> None:
    """Ask to stop in the first of two forwards of an evaluation after so many updates."""
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
    """SIGTERM to all processes of a job arrives twice: from the system and from the launcher."""
    from training import loop
    from training.reliability import signals

    os.environ["TORCHELASTIC_RUN_ID"] = "some"
    signals.PASSED_ON_SECONDS = passed_on_seconds

    def twice() -> None:
        for _ in range(2):
            signal_self(signal.SIGTERM)
            time.sleep(0.3)

    before(loop, "forward_backward", twice, lambda run, *rest: run.state.step == step - 1)


def two_signals_while_stuck(step: int) -> None:
    """The main thread waits in C, as in a collective: no Python handler ever runs."""
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


@pytest.mark.parametrize("number", [number for number in STOP_SIGNALS if number is not signal.SIGTERM])
def test_every_stop_signal_ends_the_run_after_a_saved_step(
    number: signal.Signals, corpus: list[str], tmp_path: Path
) -> None:
    assert run_in_child(tiny(corpus, tmp_path), stop_in_step, 13, number) == EXIT_PREEMPTED
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert summary(tmp_path / "run")["steps"] == 13
    assert (tmp_path / "run" / "checkpoints" / "step-00000013").is_dir()


@pytest.mark.parametrize(
    ("act", "step"),
    [(functools.partial(stop_in_step, number=signal.SIGTERM), 13), (stop_in_refresh, 16), (stop_in_save, 10)],
)
def test_a_signal_in_a_step_a_refresh_or_a_save_loses_nothing_and_the_run_goes_on_bit_for_bit(
    act: Any, step: int, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, act, step) == EXIT_PREEMPTED
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert summary(tmp_path / "run")["steps"] == step
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed
    assert [line["step"] for line in lines(tmp_path / "run", "event")] == [step]


def test_an_evaluation_that_is_due_is_left_to_the_next_sitting(
    corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, stop_in_step, 16, signal.SIGTERM) == EXIT_PREEMPTED
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [0, 8]
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("step", [0, 16, 24])
def test_a_signal_interrupts_an_evaluation(
    step: int, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = tiny(corpus, tmp_path, "eval.micro_batch_size=8")
    assert run_in_child(overrides, stop_in_evaluation, step) == EXIT_PREEMPTED
    assert summary(tmp_path / "run")["steps"] == step
    assert f'"kind":"eval","step":{step},' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert step == 0 or (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_next_sitting(
    corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    assert run_in_child(tiny(corpus, tmp_path), stop_in_step, 24, signal.SIGTERM) == EXIT_PREEMPTED
    assert (tmp_path / "run" / "checkpoints" / "step-00000024").is_dir()
    assert run(tiny(corpus, tmp_path)) == 0
    assert summary(tmp_path / "run")["status"] == "completed"
    assert curve(tmp_path / "run") == undisturbed


def test_a_signal_that_a_launcher_passes_on_is_not_a_second_one(corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, two_signals_under_a_launcher, 13, 60.0) == EXIT_PREEMPTED
    assert summary(tmp_path / "run")["steps"] == 13
    assert run_in_child(overrides, two_signals_under_a_launcher, 16, 0.1) == 128 + signal.SIGTERM


def test_a_signal_in_set_up_ends_the_process_and_leaves_nothing(corpus: list[str], tmp_path: Path) -> None:
    assert run_in_child(tiny(corpus, tmp_path), stop_in_set_up) == EXIT_PREEMPTED
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_a_run_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).resolve().parents[3] / "train.py"), run_name="__main__")
    assert ended.value.code == EXIT_PREEMPTED
    assert capsys.readouterr().err == "SIGINT before training started: exiting\n"


def test_a_second_signal_ends_a_process_that_is_stuck_in_c(corpus: list[str], tmp_path: Path) -> None:
    assert run_in_child(tiny(corpus, tmp_path), two_signals_while_stuck, 13) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "summary.json").exists()


def test_previous_handlers_are_restored_after_a_run(corpus: list[str], tmp_path: Path) -> None:
    def state() -> list[Any]:
        return [[signal.getsignal(number) for number in STOP_SIGNALS], signal.pthread_sigmask(signal.SIG_BLOCK, ())]

    before_it = state()
    assert run(tiny(corpus, tmp_path, "train.steps=3")) == 0
    assert before_it == state()


def signal_the_group_while_a_child_works(step: int, number: int, report: Path) -> None:
    """Signal the process group, as a terminal does, while a child (such as a compiler) works."""
    from training import loop

    def signalled() -> None:
        os.setpgrp()
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)"], stdin=subprocess.PIPE
        )
        (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals")
        os.killpg(0, number)
        while not listener._args[-1].__self__():  # type: ignore[attr-defined]
            time.sleep(0.001)
        child.communicate()
        report.write_text(str(child.returncode))

    before(loop, "forward_backward", signalled, lambda run, *rest: run.state.step == step - 1)


def test_a_signal_to_the_process_group_does_not_reach_a_compiler(corpus: list[str], tmp_path: Path) -> None:
    report = tmp_path / "exit code"
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, signal_the_group_while_a_child_works, 13, signal.SIGINT, report) == EXIT_PREEMPTED
    assert summary(tmp_path / "run")["steps"] == 13
    assert report.read_text() == "7"


def signals_of_a_session_that_ends(step: int) -> None:
    """systemd sends SIGHUP after SIGTERM; when a terminal closes, the kernel and the shell each send it."""
    from training import loop

    def three() -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            signal_self(number)
            time.sleep(0.1)

    before(loop, "forward_backward", three, lambda run, *rest: run.state.step == step - 1)


def test_sighup_is_never_the_second_signal(corpus: list[str], tmp_path: Path) -> None:
    assert run_in_child(tiny(corpus, tmp_path), signals_of_a_session_that_ends, 13) == EXIT_PREEMPTED
    assert (tmp_path / "run" / "checkpoints" / "step-00000013").is_dir()


def hang_up_ignored(step: int) -> None:
    from training import loop

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before(
        loop,
        "forward_backward",
        lambda: os.kill(os.getpid(), signal.SIGHUP),
        lambda run, *rest: run.state.step == step - 1,
    )


def test_sighup_stays_ignored_under_nohup(corpus: list[str], tmp_path: Path) -> None:
    assert run_in_child(tiny(corpus, tmp_path), hang_up_ignored, 13) == 0
    assert summary(tmp_path / "run")["status"] == "completed"


def on_a_terminal(name: str) -> None:
    os.login_tty(os.open(name, os.O_RDWR))


def test_a_run_is_saved_when_its_terminal_closes(corpus: list[str], tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    overrides = tiny(corpus, tmp_path, "train.steps=100000", "checkpoint.interval=null", "eval.interval=100000")
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(run_in_child, overrides, on_a_terminal, os.ttyname(theirs))
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not code.done() and not (metrics.exists() and '"step":5,' in metrics.read_text()):
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 4096)
        os.close(theirs)
        os.close(ours)
        assert code.result() == EXIT_PREEMPTED
    saved = summary(tmp_path / "run")
    assert saved["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{saved['steps']:08d}").is_dir()


def test_a_signal_to_all_processes_of_a_step_leaves_the_resource_tracker_alive() -> None:
    code = (
        "import os, signal, time; from multiprocessing import resource_tracker as own; "
        "from training.reliability.signals import shield_resource_tracker; shield_resource_tracker(); "
        "tracker = own._resource_tracker; pid = tracker._pid; [os.kill(pid, n) for n in (signal.SIGUSR1, signal.SIGHUP)]; "
        "time.sleep(0.3); assert os.waitpid(pid, os.WNOHANG) == (0, 0); tracker._stop()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


WORKERS = """
import signal
from joblib import Parallel, delayed
from training.reliability.signals import passed_on_to_workers
with passed_on_to_workers("joblib", 75):
    masks = Parallel(n_jobs=2)(delayed(signal.pthread_sigmask)(signal.SIG_BLOCK, ()) for _ in range(2))
print(all({signal.SIGTERM, signal.SIGINT} <= mask for mask in masks))
"""


def test_a_sweeps_idle_worker_keeps_signals_pending() -> None:
    """If it died, joblib would kill the others, which are about to save."""
    done = subprocess.run([sys.executable, "-c", WORKERS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
