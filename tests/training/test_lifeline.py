"""A rank or a trial does not outlive the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Children write their process id when it is time to kill the launcher, and nothing after that.
BY_TORCHRUN = """
import os, subprocess, sys, time
child = "import os, sys, time; from training.lifeline import die_with_launcher; die_with_launcher();" \\
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
    from training.lifeline import die_with_launcher
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
    from training.lifeline import die_with_launcher
    die_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    Parallel(n_jobs=2)(delayed(trial)() for _ in range(2))
"""


def wait_for_end(pid: int, seconds: float = 60) -> None:
    """Until the process is gone, or a zombie of whoever has adopted it."""
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
    "script",
    [BY_TORCHRUN, SPAWNED.replace("{orphaned}", "False"), SPAWNED.replace("{orphaned}", "True"), IN_JOBLIB],
    ids=["torchrun", "spawned", "spawned and orphaned before it looks", "joblib"],
)
def test_a_child_dies_with_its_launcher(script: str, tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(script)
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "launcher.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    launcher.send_signal(signal.SIGKILL)
    try:
        wait_for_end(child)
    finally:
        if state_of(child) is not None:
            os.kill(child, signal.SIGKILL)
    assert launcher.communicate()[0] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_of_a_shell_outlives_it() -> None:
    """`nohup python train.py … &` in a shell that ends, also as a rank started by hand."""
    script = "from training.lifeline import die_with_launcher; die_with_launcher(); print('on', flush=True); input()"
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
