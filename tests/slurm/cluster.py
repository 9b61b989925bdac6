"""A SLURM of one node on this machine, for the time of a test: munged, slurmctld and slurmd as Debian packages them.

Needs root and the packages slurm-wlm and munge. Nothing outside of the given directory is written, but munge's socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# One node that is this machine; tasks are plain processes; no accounting. Jobs may queue again, at once.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=requeue_delay=1,sched_interval=5
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
KillWait=5
JobRequeue=1
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    absent = [program for program in PROGRAMS if _path(program) is None]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[None]:
    """A running cluster, which the commands sbatch, srun and scontrol of this process and its children talk to."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (directory / name).mkdir()
    host = socket.gethostname().split(".")[0]
    configuration = directory / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            directory=directory,
            cpus=os.cpu_count(),
            controller_port=_free_port(),
            daemon_port=_free_port(),
        )
    )
    with contextlib.ExitStack() as stack:
        stack.callback(os.environ.__delitem__, "SLURM_CONF")
        os.environ["SLURM_CONF"] = str(configuration)
        if not _munge_answers():
            stack.enter_context(_munged())
        for program in ("slurmctld", "slurmd"):
            log = stack.enter_context((directory / f"{program}.out").open("w"))
            process = subprocess.Popen([_path(program) or program, "-D"], stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
        stack.callback(_end_all_jobs, time.time() - 1)
        _wait_until(lambda: _succeeds("srun", "--ntasks=2", "--time=1", "true"), 60, f"no answer; see {directory}")
        yield


@contextlib.contextmanager
def _munged() -> Iterator[None]:
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge", "munge")
    command = ["runuser", "-u", "munge", "--", _path("munged") or "munged", "--foreground"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(_munge_answers, 30, "munged does not answer")
        yield
    finally:
        _end(process)


def _munge_answers() -> bool:
    return _succeeds("sh", "-c", "munge -n | unmunge")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _wait_until(condition, seconds: float, failure: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(failure)
        time.sleep(0.5)


def _end_all_jobs(began: float) -> None:
    """Before the daemons go: a job's processes outlive them, and would end others by ids that are no longer theirs."""
    subprocess.run(["scancel", f"--user={os.getuid()}"], capture_output=True, timeout=20)
    with contextlib.suppress(RuntimeError):
        _wait_until(lambda: not (_jobs() or _left_over(began)), 60, "jobs do not end")
    for process in _left_over(began):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _jobs() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, timeout=20).stdout.strip()


def _left_over(began: float) -> list[psutil.Process]:
    """SLURM's own processes of jobs begun since then."""
    names = ("slurmstepd", "slurm_script", "srun")
    found = psutil.process_iter(["name", "create_time", "status"])
    return [
        process
        for process in found
        if process.info["name"] in names
        and process.info["create_time"] >= began
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _path(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
