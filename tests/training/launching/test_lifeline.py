"""A rank or a trial does not outlive the process that started it."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from training.launching import jobs, lifeline, sweep
from training.launching import ranks as launch

ROOT = Path(__file__).resolve().parents[3]

# Each child writes its process id once it runs; the last one first waits to be orphaned.
BY_TORCHRUN = """
import os, subprocess, sys, time
child = "import os, sys, time; from training.launching.lifeline import die_with_launcher; die_with_launcher();" \\
    "print(os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"}, start_new_session=True)
time.sleep(600)
"""
SPAWNED = """
import multiprocessing, os, signal, sys, time

def rank(orphaned):
    if orphaned:
        parent = os.getppid()
        print(os.getpid(), flush=True)
        while os.getppid() == parent:
            time.sleep(0.01)
    os.environ["TORCHELASTIC_RUN_ID"] = "x"  # as torch does in the child
    from training.launching.lifeline import die_with_launcher
    die_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=rank, args=({orphaned},)).start()
    time.sleep(600)
"""
IN_JOBLIB = """
import os, time
from joblib import Parallel, delayed

def trial():
    from training.launching.lifeline import die_with_launcher
    die_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    Parallel(n_jobs=2)(delayed(trial)() for _ in range(2))
"""


def wait_for_end(pid: int, seconds: float = 60) -> None:
    """Wait until the process is gone or a zombie."""
    until = time.monotonic() + seconds
    while (state := state_of(pid)) not in (None, "Z"):
        assert time.monotonic() < until, f"process {pid} is alive ({state})"
        time.sleep(0.02)


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[0]
    except OSError:
        return None


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(
    ("script", "children"),
    [
        (BY_TORCHRUN, 1),
        (IN_JOBLIB, 2),
        (SPAWNED.replace("{orphaned}", "False"), 1),
        (SPAWNED.replace("{orphaned}", "True"), 1),
    ],
    ids=["torchrun", "joblib", "spawned", "spawned and orphaned before it looks"],
)
def test_a_child_dies_with_its_launcher(script: str, children: int, tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(script)
    written = tmp_path / "written"
    with written.open("w") as file:
        launcher = subprocess.Popen(
            [sys.executable, str(tmp_path / "launcher.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=file
        )
    until = time.monotonic() + 60
    while written.read_text().count("\n") < children:
        assert time.monotonic() < until
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    pids = [int(pid) for pid in written.read_text().split()]
    try:
        for pid in pids:
            wait_for_end(pid)
    finally:
        for pid in pids:
            if state_of(pid) is not None:
                os.kill(pid, signal.SIGKILL)
    assert len(written.read_text().split()) == children


@pytest.mark.parametrize(
    "entry",
    [
        lambda: runpy.run_path(str(ROOT / "train.py"), run_name="__main__"),
        lambda: launch.run_rank({}, []),
        lambda: sweep.run_trial(OmegaConf.create()),
        lambda: jobs.run_logged(OmegaConf.create()),
    ],
    ids=["train.py", "rank", "trial of a sweep", "trial of a study"],
)
def test_every_entry_point_of_a_rank_or_trial_starts_with_die_with_launcher(
    entry: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Called(BaseException):
        pass

    def call() -> None:
        raise Called

    for module in (lifeline, launch, sweep, jobs):
        monkeypatch.setattr(module, "die_with_launcher", call)
    with pytest.raises(Called):
        entry()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_started_by_a_shell_outlives_it() -> None:
    """`nohup python train.py … &` in a shell that ends, also as a rank started by hand."""
    script = "from training.launching.lifeline import die_with_launcher; die_with_launcher(); print('on', flush=True); input()"
    shell = f'"{sys.executable}" -c "{script}; print(\'lives\')" <&3 & '
    reading, writing = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.Popen(
        ["bash", "-c", shell.replace("<&3", f"<&{reading}")],
        env=environment,
        pass_fds=[reading],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.wait() == 0
    os.write(writing, b"\n")
    assert done.communicate()[0] == "on\nlives\n"
