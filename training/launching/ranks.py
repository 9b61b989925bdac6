"""Start a run: in this process, in ranks on this machine by torch's elastic launch, or as a task of a SLURM job.

The configuration is composed and validated once, in the parent; the ranks receive plain values.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from data.errors import DataError
from training.compose import validate
from training.config import ConfigurationError, RankRefusedError, RunConfig, SlurmLauncherConfig
from training.exits import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_PREEMPTED, EXIT_RANK_LOST, refuse
from training.launching.lifeline import die_with_launcher
from training.launching.limits import descriptors_failure
from training.reliability.signals import heeded

NOT_BEGUN = -1  # no exit code: a rank that has not begun the run
#: How long ranks may take to save a checkpoint after they were asked to stop, before they are killed.
SAVING_SECONDS = 300
#: How long a preempted task waits for SLURM to end it before it ends itself.
REQUEUE_SECONDS = 120


def start(config: RunConfig) -> int:
    """Run a validated configuration in this process, or in ranks that are started here. Returns the exit code."""
    if isinstance(config.launcher, SlurmLauncherConfig):
        return run_in_job(config)
    if "WORLD_SIZE" not in os.environ:  # the ranks of torchrun find it out together
        # Imports numpy, which a refusal of the configuration need not wait for.
        from training.launching.inputs import refuse_absent_inputs

        refuse_absent_inputs(config)
        if config.launcher.nproc_per_node > 1:
            return start_ranks(config)
    from training.run import execute

    return execute(config).exit_code


def run_job(values: dict[str, Any]) -> int:
    """One run of plain values; what is wrong with them or the data becomes an exit code."""
    try:
        return start(validate(values))
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def in_job() -> bool:
    """Whether this process is a task of a job that submitit has started."""
    return "SUBMITIT_EXECUTOR" in os.environ


def refuse_absent_slurm(launcher: Mapping[str, Any]) -> None:
    """Refuse Hydra's settings of a launcher for SLURM where no SLURM answers.

    Raises:
        ConfigurationError: its commands are not installed, or find no controller.
    """
    if not str(launcher.get("_target_")).endswith(".SlurmLauncher"):
        return
    try:
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
        problem = "" if asked.returncode == 0 else (asked.stderr or asked.stdout).strip().rpartition("\n")[2]
    except OSError as error:
        problem = f"scontrol: {error.strerror}"
    if problem:
        raise ConfigurationError(
            f"launcher=slurm: no SLURM answers here ({problem}); start on a node of the cluster, or choose launcher=submitit, "
            "launcher=joblib or launcher=local"
        )


def start_ranks(config: RunConfig) -> int:
    """Start `launcher.nproc_per_node` ranks of the run on this machine and wait. Returns the exit code of the run.

    A rank that dies ends the others; with `launcher.max_restarts` all are started again and go on from the last
    checkpoint. A stop signal is passed on, and the ranks have `SAVING_SECONDS` to save.

    Raises:
        ConfigurationError: this process may not have enough files open.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ranks = config.launcher.nproc_per_node
    if (failure := descriptors_failure(ranks)) is not None:
        raise ConfigurationError(f"launcher.nproc_per_node={ranks}: {failure}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=getattr(config.launcher, "max_restarts", 0),
        monitor_interval=0.5,
        start_method="spawn",
        signals_to_handle="",  # ours are there before torch's would be, and know SIGHUP
        shutdown_timeout=SAVING_SECONDS,
    )
    # torch does not say how ranks end that were signalled.
    codes = multiprocessing.get_context("spawn").Array("i", [NOT_BEGUN] * ranks, lock=False)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # never counts as the second signal (reliability/signals.py)
        raise SignalException(f"process {os.getpid()} got signal {number}", sigval=signal.Signals(number))

    handlers = {number: signal.signal(number, stop) for number in heeded()}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded())  # the workers of a sweep have them blocked
    try:
        results: dict[int, int] = elastic_launch(launch, run_rank)(config.model_dump(mode="json"), codes)
    except ChildFailedError as error:
        if all(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
            return EXIT_PREEMPTED
        if any(failure.exitcode == EXIT_CONFIGURATION for failure in error.failures.values()):
            return EXIT_CONFIGURATION  # the rank has said why
        print(f"error: {describe_failure(error)}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except SignalException as error:
        return code_of_stopped_ranks(error.sigval, list(codes))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return max(results.values(), default=0)


def code_of_stopped_ranks(signalled: signal.Signals, codes: Sequence[int]) -> int:
    """The exit code of a run whose ranks were asked to stop, and a line unless all of them have said how it ended.

    Args:
        codes: what each rank returned; `NOT_BEGUN` of one that had not begun the run, `EXIT_FAILED` of one that began it
            and did not get to its end.
    """
    if EXIT_FAILED in codes:
        missing = ", ".join(str(rank) for rank, code in enumerate(codes) if code == EXIT_FAILED)
        print(
            f"error: {signalled.name}: rank {missing} ended before the run was saved; the same command resumes from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_FAILED
    if NOT_BEGUN in codes:
        print(f"{signalled.name} before training has begun: nothing to save", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    return max(codes)


def describe_failure(error: Any) -> str:
    """Which rank failed first and how, in a line; a rank that only lost another one is not it."""
    failures = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != EXIT_RANK_LOST}
    rank, failure = min((failures or error.failures).items(), key=lambda pair: pair[1].timestamp)
    how = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"killed by {signal.Signals(-failure.exitcode).name}"
    elif isinstance(failure.message, dict):
        how = str(failure.message.get("message", how)).strip().splitlines()[-1]
    elif isinstance(failure.message, str) and "To enable traceback" not in failure.message:
        how = failure.message.strip().splitlines()[-1]
    return f"rank {rank} failed ({how}) and the others were stopped; rerun the same command to resume from the last checkpoint"


def run_rank(values: dict[str, Any], codes: Any) -> int:
    """One rank's work: validate again (cheap), run, and return the exit code, which is also left in `codes`."""
    die_with_launcher()

    from training.run import execute

    # A terminal's Ctrl-C goes to its whole process group. The parent passes it on; twice would mean "at once".
    os.setpgrp()
    logging.basicConfig(level=logging.INFO if os.environ.get("RANK") == "0" else logging.WARNING, format="%(message)s")
    place = int(os.environ["LOCAL_RANK"])
    codes[place] = EXIT_FAILED
    refused = False
    try:
        code = execute(validate(values)).exit_code
    except (ConfigurationError, DataError) as error:
        code, refused = refuse(error), isinstance(error, RankRefusedError)
    codes[place] = code
    # A parent that was told to stop no longer reads results, and a child that returns one waits until it is read. A rank
    # that is refused alone would count as one that has succeeded, and the others would wait.
    if code == EXIT_PREEMPTED or refused:
        sys.exit(code)
    return code


def run_in_job(config: RunConfig) -> int:
    """This task of a SLURM job as a rank of the run. Returns the exit code of the run.

    SLURM announces the time limit `launcher.signal_seconds` ahead. The run then saves, and the job queues again; so it
    does when it is preempted.
    """
    import submitit

    from training.run import execute

    assert isinstance(config.launcher, SlurmLauncherConfig)
    environment = submitit.JobEnvironment()
    if environment.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    with announced_time_limit() as at_limit:
        code = execute(config).exit_code
    if code == EXIT_PREEMPTED:
        _leave_job(environment, requeue=config.launcher.requeue and at_limit())
    return code


@contextlib.contextmanager
def announced_time_limit() -> Iterator[Callable[[], bool]]:
    """A function that says whether SLURM has announced the time limit (SIGUSR2), which the run is told as SIGUSR1.

    Other requests to stop (SIGTERM: preemption by SLURM, which queues the job itself, or scancel) do not count.
    """
    announced: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        announced.append(number)
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR2, handle)
    try:
        yield lambda: bool(announced)
    finally:
        signal.signal(signal.SIGUSR2, previous)


def _leave_job(environment: Any, *, requeue: bool) -> None:
    """End this task without a result: the job is not over, it waits in the queue or has been cancelled."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_PREEMPTED))
    sys.stdout.flush()
    sys.stderr.flush()
    if requeue and environment.global_rank == 0:
        environment._requeue(0)  # submitit's own hook for every cluster it knows; on SLURM `scontrol requeue`
    # A task that ended of itself would end the job, perhaps before it is in the queue.
    if environment.name() == "slurm":
        time.sleep(REQUEUE_SECONDS)
    os._exit(EXIT_PREEMPTED)
