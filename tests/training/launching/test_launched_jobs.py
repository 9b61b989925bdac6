"""Sweeps, sequential, parallel and as jobs: killed ones resume, each trial in its own run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.slurm.cluster import missing
from tests.training.runs import Session, before, kill_self, lines, run, run_in_child, summary
from training.config import ConfigurationError
from training.exits import EXIT_HELD
from training.launching.sweep import check_trials, trials
from training.reliability.run_directory import RunDirectory

NAMES = "name='${optimizer.name}-${seed}'"


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the sessions' logs; a sweep's directory holds only its trials."""
    return tmp_path_factory.mktemp("said")


def steps(directory: Path) -> list[int]:
    return [line["step"] for line in lines(directory, "train")]


def resumed_at(directory: Path) -> list[int]:
    return [line["step"] for line in lines(directory, "event") if line["event"] == "resumed"]


def test_a_killed_sweep_skips_finished_trials_and_resumes_the_others(tiny: list[str], tmp_path: Path) -> None:
    sweep = ["-m", *tiny, NAMES, f"output_dir={tmp_path}", "optimizer=adamw,lion"]
    assert run_in_child(sweep, kill_in_trial, "lion", 8) == -signal.SIGKILL
    finished = (tmp_path / "adamw-0" / "summary.json").stat().st_mtime_ns
    assert "status" not in (summary(tmp_path / "lion-0") if (tmp_path / "lion-0" / "summary.json").exists() else {})

    assert run(sweep) == 0
    assert (tmp_path / "adamw-0" / "summary.json").stat().st_mtime_ns == finished
    assert summary(tmp_path / "lion-0")["status"] == "completed"
    assert steps(tmp_path / "lion-0") == list(range(1, 13))
    assert resumed_at(tmp_path / "lion-0") == [5]
    assert resumed_at(tmp_path / "adamw-0") == []


@torch._dynamo.config.patch(recompile_limit=2)  # monkeypatch would hide the setting from every later test
def test_every_trial_of_a_sweep_is_compiled(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code compiled for one trial does not count against the recompilation limit of the next."""
    counter = CompileCounter()
    work = torch.compile(lambda x: x + 1, backend=counter, dynamic=False)
    shapes = iter(range(2, 100))

    def compiles_twice(run: Any) -> str:
        work(torch.ones(next(shapes)))
        work(torch.ones(next(shapes)))
        return "completed"

    monkeypatch.setattr("training.run.train", compiles_twice)
    assert run(["-m", *tiny, f"output_dir={tmp_path}", NAMES, "optimizer=adamw", "seed=0,1"]) == 0
    assert counter.frame_count == 4


def kill_in_trial(optimizer: str, step: int) -> None:
    from training.loop import Reporter

    before(
        Reporter,
        "step",
        kill_self,
        lambda self, at, *_: at == step and self._run.config.optimizer.name == optimizer,
    )


def test_a_parallel_sweep_saves_its_trials_when_the_terminal_closes(
    tiny: list[str], tmp_path: Path, said: Path
) -> None:
    """The third trial waits for a worker and does not start."""
    sweep = ["-m", "launcher=joblib", "hydra.launcher.n_jobs=2", *tiny, NAMES, f"output_dir={tmp_path}", "seed=0,1,2"]
    sweep += ["optimizer=adamw", "train.steps=100000", "eval.interval=100000", "checkpoint.interval=null"]
    with Session(sweep, said) as session:
        for seed in (0, 1):
            session.wait_for(tmp_path / f"adamw-{seed}" / "metrics.jsonl", '"step":5,')
        for _ in range(2):  # the group and the parent in it, as when a terminal closes
            os.killpg(session.pid, signal.SIGHUP)
            os.kill(session.pid, signal.SIGHUP)
        code, _, errors = session.end()
    assert code == 75, errors[-3000:]
    for seed in (0, 1):
        saved = summary(tmp_path / f"adamw-{seed}")
        assert saved["status"] == "preempted"
        assert (tmp_path / f"adamw-{seed}" / "checkpoints" / f"step-{saved['steps']:08d}").is_dir()
    assert not (tmp_path / "adamw-2").exists()


@pytest.mark.skipif(missing() is None, reason="make test-slurm shows it on a SLURM")
def test_jobs_of_two_tasks_save_at_the_time_limit_and_resume(tiny: list[str], tmp_path: Path, said: Path) -> None:
    """What launcher=slurm does, through submitit's local executor; on a real SLURM: make test-slurm."""
    sweep = ["-m", "launcher=submitit", "launcher.nproc_per_node=2", *tiny, NAMES, f"output_dir={tmp_path}"]
    sweep += ["optimizer=adamw", "seed=0", "train.steps=400", "eval.interval=400", "checkpoint.interval=null"]
    with Session(sweep, said) as session:
        session.wait_for(tmp_path / "adamw-0" / "metrics.jsonl", '"step":5,')
        tasks = [p for p in psutil.Process(session.pid).children(recursive=True) if of_trial(p, tmp_path / "adamw-0")]
        for task in tasks:
            task.send_signal(signal.SIGUSR2)
        code, output, errors = session.end()
    assert code == 0, (output + errors)[-3000:]
    assert summary(tmp_path / "adamw-0")["status"] == "completed"
    assert steps(tmp_path / "adamw-0") == list(range(1, 401))
    assert len(resumed_at(tmp_path / "adamw-0")) == 1


@pytest.mark.parametrize("launcher", ["local", "joblib"])
def test_a_trial_that_another_process_runs_is_skipped_and_the_others_run(
    launcher: str, tiny: list[str], tmp_path: Path, said: Path
) -> None:
    """One after the other, and side by side; the next sweep passes over what is finished."""
    sweep = ["-m", f"launcher={launcher}", *tiny, NAMES, f"output_dir={tmp_path}", "optimizer=adamw,lion,signum"]
    (tmp_path / "adamw-0").mkdir()
    holder = RunDirectory(tmp_path / "adamw-0")
    holder.take()
    with Session(sweep, said) as session:
        code, _, errors = session.end()
    assert code == EXIT_HELD, errors[-3000:]
    assert f"adamw-0 is being run by process {os.getpid()} on " in errors
    assert "skipped 1 of 3 trials that other processes are running" in errors
    assert [path.name for path in (tmp_path / "adamw-0").iterdir()] == [".lock"]
    others = [tmp_path / name for name in ("lion-0", "signum-0")]
    for other in others:
        assert steps(other) == list(range(1, 13))
    finished = [(other / "summary.json").stat().st_mtime_ns for other in others]
    holder.close()
    assert run(["-m", *sweep[2:]]) == 0
    assert steps(tmp_path / "adamw-0") == list(range(1, 13))
    assert [(other / "summary.json").stat().st_mtime_ns for other in others] == finished
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"adamw-0", "lion-0", "signum-0"}


def test_a_sweep_restarted_while_its_jobs_still_run_skips_their_trials(
    tiny: list[str], tmp_path: Path, said: Path
) -> None:
    """The parent is killed but its job survives, as on SLURM; the new job of the same trial exits immediately."""
    sweep = ["-m", "launcher=submitit", *tiny, NAMES, f"output_dir={tmp_path}"]
    sweep += ["optimizer=adamw", "seed=0", "train.steps=400", "eval.interval=400", "checkpoint.interval=null"]
    directory = tmp_path / "adamw-0"
    with Session(sweep, said) as parent:
        parent.wait_for(directory / "metrics.jsonl", '"step":5,')
        os.kill(parent.pid, signal.SIGKILL)
        holder = int((directory / ".lock").read_text().split()[1])
        os.kill(holder, signal.SIGSTOP)  # while the second sweep comes and goes
        with Session(sweep, said) as session:
            code, _, errors = session.end()
        os.kill(holder, signal.SIGCONT)
        assert code == EXIT_HELD, errors[-3000:]
        assert "skipped 1 of 1 trials that other processes are running" in errors
        parent.wait_for(directory / "summary.json", '"completed"')
    assert steps(directory) == list(range(1, 401))
    assert resumed_at(directory) == []


def of_trial(process: psutil.Process, directory: Path) -> bool:
    """Return whether the process is a task of the trial's job: a sibling of the one with the trial's record open."""

    def holds(candidate: psutil.Process) -> bool:
        try:
            return any(file.path.startswith(str(directory)) for file in candidate.open_files())
        except psutil.Error:
            return False

    try:
        return "submitit.core._submit" in process.cmdline() and any(
            holds(sibling) for sibling in process.parent().children()
        )
    except psutil.Error:
        return False


def test_trials_that_would_share_a_run_directory_are_refused_before_the_first_starts() -> None:
    with pytest.raises(ConfigurationError, match=r"trials 0 \(seed=0\) and 1 \(seed=1\) .* would share"):
        check_trials(trials(["name=one", "seed=0,1"]))
    with pytest.raises(ConfigurationError, match=r"trials 0 \(strategy=ddp\) and 1 \(strategy=fsdp\)"):
        check_trials(trials(["strategy=ddp,fsdp"]))
    check_trials(trials(["optimizer=adamw,lion", "seed=0,1"]))


def test_a_mistake_in_any_trial_is_an_error_before_the_first_starts(tmp_path: Path) -> None:
    assert run(["-m", f"output_dir={tmp_path}", "optimizer=adamw", "optimizer.lr=1e-3,-1"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["-m", f"output_dir={tmp_path}", "seed=0,1"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_leaves_no_time_to_train_is_refused() -> None:
    line = (
        r"launcher\.signal_seconds=120 is not shorter than launcher\.timeout_minutes=2; .*launcher\.signal_seconds=60$"
    )
    with pytest.raises(ConfigurationError, match=line):
        check_trials([["launcher=slurm", "launcher.timeout_minutes=2"]])
