"""A sweep on a real SLURM: two tasks a trial, a time limit in the middle of one, both records complete in the end.

Where SLURM is not installed, tests/training/launching/test_launched_jobs.py shows the same through submitit's local executor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster, missing
from tests.training.runs import lines, prepare_corpus, summary
from training.exits import EXIT_HELD

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
# Steps, of a second at least in a sweep until it resumes. SLURM announces the end of two minutes after 50 to 80 s: 40 s ahead,
# and up to 30 s earlier, which is how often it looks. By then the ranks have started, and the long trial is in the middle.
SHORT, LONG = 2, 90


@pytest.fixture
def slurm(tmp_path: Path):
    if reason := missing():
        pytest.skip(reason)
    with cluster(tmp_path / "slurm"):
        yield


def overrides(directory: Path, corpus: list[str]) -> list[str]:
    """Of a run that saves only when it is told to."""
    return [
        *(*corpus, "model=gpt2_nano", "optimizer=adamw", f"output_dir={directory / 'runs'}"),
        *("name='steps-${train.steps}'", "train.global_batch_size=4", "train.sequence_length=32"),
        *("train.precision=fp32", "train.compile=false", "train.device=cpu"),
        *("eval.interval=2000", "eval.tokens=256", "checkpoint.interval=null"),
    ]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment_of_ranks() | environment, capture_output=True, text=True, timeout=1500, cwd=ROOT
    )


def environment_of_ranks() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def sweep(directory: Path, corpus: list[str], steps: str = f"{SHORT},{LONG}", minutes: int = 2) -> list[str]:
    """The command of a slow sweep whose trials are jobs of two tasks."""
    launcher = ["launcher=slurm", "launcher.nproc_per_node=2", "launcher.gpus_per_node=null"]
    limits = [f"launcher.timeout_minutes={minutes}", "launcher.signal_seconds=40", f"train.steps={steps}"]
    return [
        sys.executable,
        str(ROOT / "tests" / "slurm" / "slow.py"),
        "-m",
        *launcher,
        *limits,
        *overrides(directory, corpus),
    ]


def test_a_sweep_survives_its_time_limit_and_every_step_is_recorded_once(tmp_path: Path, slurm: None) -> None:
    corpus = prepare_corpus(tmp_path)
    done = run(sweep(tmp_path, corpus))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for steps in (SHORT, LONG):
        directory = tmp_path / "runs" / f"steps-{steps}"
        assert summary(directory)["status"] == "completed"
        assert [line["step"] for line in lines(directory, "train")] == list(range(1, steps + 1))
        assert json.loads((directory / "environment.json").read_text())["world_size"] == 2
    assert_resumed(tmp_path / "runs" / f"steps-{LONG}")

    again = run(sweep(tmp_path, corpus))
    assert again.returncode == 0, again.stderr[-3000:]


def test_a_sweep_restarted_while_its_job_runs_leaves_the_trial_to_it(tmp_path: Path, slurm: None) -> None:
    steps = 120
    command = sweep(tmp_path, prepare_corpus(tmp_path), steps=str(steps), minutes=30)
    directory = tmp_path / "runs" / f"steps-{steps}"
    record = directory / "metrics.jsonl"
    with (tmp_path / "parent.log").open("w") as log:
        parent = subprocess.Popen(command, env=environment_of_ranks(), stdout=log, stderr=log, cwd=ROOT)
        wait_until(lambda: record.exists() and '"step":5,' in record.read_text(), directory)
        parent.kill()
        parent.wait()

    second = run(command)
    assert not (directory / "summary.json").exists(), "the first job has ended too soon for this test"
    assert second.returncode == EXIT_HELD, second.stdout[-3000:] + second.stderr[-3000:]
    assert "skipped 1 of 1 trials that other processes are running" in second.stderr

    wait_until(lambda: (directory / "summary.json").exists(), directory)
    third = run(command)
    assert third.returncode == 0, third.stderr[-3000:]
    assert [line["step"] for line in lines(directory, "train")] == list(range(1, steps + 1))
    assert [line for line in lines(directory, "event") if line["event"] == "resumed"] == []


def wait_until(condition: Callable[[], bool], directory: Path, seconds: float = 900) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{directory}: nothing happens"
        time.sleep(1)


def assert_resumed(directory: Path) -> None:
    resumed = [line for line in lines(directory, "event") if line["event"] == "resumed"]
    assert resumed
    assert all(line["step"] > 0 for line in resumed)


def test_the_sbatch_script_requeues_its_run_at_the_time_limit_and_ends_when_it_is_cancelled(
    tmp_path: Path, slurm: None
) -> None:
    corpus = prepare_corpus(tmp_path)
    limits = ["--nodes=1", "--gpus-per-node=0", "--time=2", "--signal=B:USR1@40", f"--output={tmp_path}/log"]
    script = str(ROOT / "scripts" / "cluster" / "slurm.sbatch")
    steps = 100000  # more than fit into two minutes
    command = ["sbatch", "--parsable", *limits, script, *overrides(tmp_path, corpus), f"train.steps={steps}"]
    submitted = run(command, RANKS="2", PYTHON=sys.executable)
    assert submitted.returncode == 0, submitted.stderr
    directory = tmp_path / "runs" / f"steps-{steps}"
    record = directory / "metrics.jsonl"
    wait_until(lambda: record.exists() and '"resumed"' in record.read_text(), tmp_path / "log")
    cancelled = run(["scancel", submitted.stdout.strip()])
    assert cancelled.returncode == 0, cancelled.stderr
    wait_until(lambda: not run(["squeue", "--noheader"]).stdout.strip(), tmp_path / "log")
    assert summary(directory)["status"] == "preempted"
    done = [line["step"] for line in lines(directory, "train")]
    assert done == list(range(1, len(done) + 1))
    assert_resumed(directory)
