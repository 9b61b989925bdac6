"""A sweep on a real SLURM: two tasks a trial, a time limit in the middle of one, both records complete in the end.

Where SLURM is not installed, tests/training/test_launch_jobs.py shows the same through submitit's local executor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster, missing
from tests.training.runs import lines, prepare_corpus, summary

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 20, 6000  # steps; the long one is to meet its time limit, after about a minute, in the middle


@pytest.fixture
def slurm(tmp_path: Path):
    if reason := missing():
        pytest.skip(reason)
    with cluster(tmp_path / "slurm"):
        yield


def sweep(directory: Path, corpus: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, str(ROOT / "train.py"), "-m", "launcher=slurm", "launcher.nproc_per_node=2"),
        *("launcher.gpus_per_node=null", "launcher.timeout_minutes=2", "launcher.signal_seconds=40"),
        *(*corpus, "model=gpt2_nano", "optimizer=adamw", f"output_dir={directory / 'runs'}"),
        *("name='steps-${train.steps}'", f"train.steps={SHORT},{LONG}", "train.global_batch_size=4"),
        *("train.sequence_length=32", "train.precision=fp32", "train.compile=false", "train.device=cpu"),
        *("eval.interval=2000", "eval.tokens=256", "checkpoint.interval=null"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, cwd=directory)


def test_a_sweep_survives_its_time_limit_and_every_step_is_recorded_once(tmp_path: Path, slurm: None) -> None:
    corpus = prepare_corpus(tmp_path)
    done = sweep(tmp_path, corpus)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for steps in (SHORT, LONG):
        run = tmp_path / "runs" / f"steps-{steps}"
        assert summary(run)["status"] == "completed"
        assert [line["step"] for line in lines(run, "train")] == list(range(1, steps + 1))
        assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    resumed = [line for line in lines(tmp_path / "runs" / f"steps-{LONG}", "event") if line["event"] == "resumed"]
    assert resumed
    assert all(line["step"] > 0 for line in resumed)

    again = sweep(tmp_path, corpus)
    assert again.returncode == 0, again.stderr[-3000:]
