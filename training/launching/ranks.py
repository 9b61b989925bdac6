"""Start a run in this process, in ranks on this machine and others (torch's elastic launch), or as a task of a SLURM job.

The configuration is composed and validated once, in the parent; the ranks receive plain values.
"""

import contextlib
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
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
from training.launching.gpus import take_gpus
from training.launching.lifeline import die_with_launcher
from training.launching.limits import descriptors_failure
from training.reliability.signals import handled_signals, say, shield_resource_tracker

NOT_STARTED = -1  # not an exit code: the rank has not started the run
#: Ranks that were asked to stop may take this long to save a checkpoint; then they are killed.
SAVING_SECONDS = 300
#: Nodes of one run may start this far apart.
JOINING_SECONDS = 600
PORT = 29500
#: A preempted task waits this long for SLURM to end it; then it exits.
REQUEUE_SECONDS = 120


def start(config: RunConfig) -> int:
    """Run a validated configuration in this process or in ranks that it starts. Returns the exit code."""
    if isinstance(config.launcher, SlurmLauncherConfig):
        return run_in_job(config)
    take_gpus(config.launcher.nproc_per_node)
    if "WORLD_SIZE" not in os.environ:  # torchrun's ranks check their inputs together
        from training.launching.inputs import refuse_absent_inputs  # imports numpy

        refuse_absent_inputs(config)
        if config.launcher.nproc_per_node * config.launcher.nodes > 1:
            return start_ranks(config)
    from training.run import execute

    return execute(config).exit_code


def in_job() -> bool:
    """Return whether this process is a task of a job started by submitit."""
    return "SUBMITIT_EXECUTOR" in os.environ


def refuse_absent_slurm(launcher: Mapping[str, Any]) -> None:
    """Raise ConfigurationError if Hydra's settings of a launcher are SLURM's, and its commands reach no controller."""
    if not str(launcher.get("_target_")).endswith(".SlurmLauncher"):
        return
    try:
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
        problem = "" if asked.returncode == 0 else (asked.stderr or asked.stdout).strip().rpartition("\n")[2]
    except OSError as error:
        problem = f"scontrol: {error.strerror}"
    if problem:
        raise ConfigurationError(
            f"launcher=slurm: no SLURM answers here ({problem}); start on a node of the cluster, or choose "
            "launcher=submitit, launcher=joblib or launcher=local"
        )


def start_ranks(config: RunConfig) -> int:
    """Start `launcher.nproc_per_node` ranks of the run on this machine and wait. Returns the exit code of the run.

    With `launcher.nodes`, the ranks meet those of the other nodes at `launcher.head`, and the code is this node's. If a rank
    dies, the others are stopped; with `launcher.max_restarts` all restart from the last checkpoint. A stop signal is passed
    on, the ranks of all nodes agree on it, and have `SAVING_SECONDS` to save.

    Raises ConfigurationError if this process may not open enough files.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from data.workers import usable_cores

    launcher = config.launcher
    assert not isinstance(launcher, SlurmLauncherConfig)
    ranks, nodes = launcher.nproc_per_node, launcher.nodes
    head = str(launcher.head) if nodes > 1 else "localhost:0"
    if failure := descriptors_failure(ranks):
        raise ConfigurationError(f"launcher.nproc_per_node={ranks}: {failure}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint=head if ":" in head else f"{head}:{PORT}",
        local_addr=address_towards(head) if nodes > 1 else None,
        rdzv_configs=meeting_of_nodes(head) if nodes > 1 else {},
        max_restarts=launcher.max_restarts,
        monitor_interval=0.5,
        start_method="spawn",
        signals_to_handle="",  # our handlers are installed earlier than torch's and cover SIGHUP
        shutdown_timeout=SAVING_SECONDS,
    )
    shield_resource_tracker()
    # torch does not report how signalled ranks end. The last element: whether this process was asked to stop.
    codes = multiprocessing.get_context("spawn").Array("i", [*[NOT_STARTED] * ranks, False], lock=False)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # never counts as the second signal (reliability/signals.py)
        codes[ranks] = True
        raise SignalException(f"process {os.getpid()} got signal {number}", sigval=signal.Signals(number))

    handlers = {number: signal.signal(number, stop) for number in handled_signals()}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals())  # blocked in a sweep's workers
    try:
        results: dict[int, int] = elastic_launch(launch, run_rank)(config.model_dump(mode="json"), codes)
    except ChildFailedError as error:
        if all(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
            return EXIT_PREEMPTED
        if any(failure.exitcode == EXIT_CONFIGURATION for failure in error.failures.values()):
            return EXIT_CONFIGURATION  # the rank has printed why
        say(f"error: {describe_failure(error)}")
        return EXIT_FAILED
    except SignalException as error:
        return code_of_stopped_ranks(error.sigval, codes[:ranks])
    except RendezvousError as error:
        say(f"error: the {nodes} nodes did not meet at launcher.head={head}: {' '.join(str(error).split())}")
        return EXIT_FAILED
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return max(results.values(), default=0)


def meeting_of_nodes(head: str) -> dict[str, Any]:
    """Return torch's settings for nodes that meet at `head` (host:port or host).

    torch finds the node that is the head by the addresses of its hostname, which on Debian is 127.0.1.1. So a node whose
    address on the way to the head is the head's is told.
    """
    settings: dict[str, Any] = {"read_timeout": JOINING_SECONDS, "join_timeout": JOINING_SECONDS}
    own = address_towards(head)
    with contextlib.suppress(OSError):
        heads, hostnames = (
            {found[4][0] for found in socket.getaddrinfo(name, None)}
            for name in (head.partition(":")[0], socket.gethostname())
        )
        if own in heads and own not in hostnames:
            settings["is_host"] = True
    return settings


def address_towards(head: str) -> str | None:
    """Return this machine's address on the way to `head` (host:port or host); None if that is a loopback address or unknown.

    With None, torch announces the machine's full name, which other machines may not resolve.
    """
    with contextlib.suppress(OSError):
        family, kind, _, _, where = socket.getaddrinfo(head.partition(":")[0], PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing
            address: str = probe.getsockname()[0]
        return None if ipaddress.ip_address(address).is_loopback else address
    return None


def code_of_stopped_ranks(signalled: signal.Signals, codes: Sequence[int]) -> int:
    """Return the exit code of a run whose ranks were asked to stop. Prints a line if a rank could not report its end.

    Args:
        codes: each rank's exit code; `NOT_STARTED` if it had not started training, `EXIT_FAILED` if it started and died
            before the end.
    """
    if EXIT_FAILED in codes:
        missing = ", ".join(str(rank) for rank, code in enumerate(codes) if code == EXIT_FAILED)
        say(
            f"error: {signalled.name}: rank {missing} ended before the run was saved; rerun the same command to resume "
            "from the last checkpoint"
        )
        return EXIT_FAILED
    if NOT_STARTED in codes:
        say(f"{signalled.name} before training started: nothing to save")
        return EXIT_PREEMPTED
    return max(codes)


def describe_failure(error: Any) -> str:
    """Describe in one line which rank failed first and how. Ranks that only lost a peer do not count."""
    failures = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != EXIT_RANK_LOST}
    rank, failure = min((failures or error.failures).items(), key=lambda pair: pair[1].timestamp)
    how = f"exit code {failure.exitcode}"
    said = failure.message.get("message", how) if isinstance(failure.message, dict) else failure.message
    if failure.exitcode < 0:
        how = f"killed by {signal.Signals(-failure.exitcode).name}"
    elif isinstance(said, str) and "To enable traceback" not in said:
        how = said.strip().splitlines()[-1]
    return f"rank {rank} failed ({how}) and the others were stopped; rerun the same command to resume from the last checkpoint"


def run_rank(values: dict[str, Any], codes: Any) -> int:
    """Validate again (cheap) and run as one rank. Returns the exit code and stores it in `codes`.

    Args:
        values: the configuration.
        codes: shared with the launcher: the exit codes of this machine's ranks, and whether the launcher was asked to stop.
    """
    die_with_launcher()

    from training.run import execute

    # A terminal sends Ctrl-C to its whole process group, and the parent passes it on: twice would mean "stop immediately".
    os.setpgrp()
    logging.basicConfig(level=logging.INFO if os.environ.get("RANK") == "0" else logging.WARNING, format="%(message)s")
    place = int(os.environ["LOCAL_RANK"])

    def begun() -> None:
        codes[place] = EXIT_FAILED

    codes[place] = NOT_STARTED  # after a restart
    refused = False
    try:
        code = execute(validate(values), begun).exit_code
    except (ConfigurationError, DataError) as error:
        code, refused = refuse(error), isinstance(error, RankRefusedError)
    codes[place] = code
    if code == EXIT_PREEMPTED and place == 0:
        _stop_launcher(codes)
    # A parent that was told to stop no longer reads results, and a child that returns one blocks until it is read. If one
    # rank alone is refused, a normal return would count as success and the others would wait for it.
    if code == EXIT_PREEMPTED or refused:
        sys.exit(code)
    return code


def _stop_launcher(codes: Any) -> None:
    """Pass on a signal that only a rank, or another machine, has got: the launcher would restart the ranks that have saved."""
    until = time.monotonic() + SAVING_SECONDS
    while any(code != EXIT_PREEMPTED for code in codes[:-1]) and time.monotonic() < until:
        time.sleep(0.01)
    if not codes[len(codes) - 1]:
        os.kill(os.getppid(), signal.SIGUSR1)


def run_in_job(config: RunConfig) -> int:
    """Run this task of a SLURM job as a rank. Returns the exit code of the run.

    SLURM announces the time limit `launcher.signal_seconds` ahead. The run then saves and the job is requeued, as it is
    after a preemption.
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
    """Yield a function that returns whether SLURM has announced the time limit (SIGUSR2). The run receives SIGUSR1.

    SIGTERM does not count: it means scancel, or a preemption after which SLURM requeues the job itself.
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
    """End this task without a result: the job is requeued or cancelled, not finished."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_PREEMPTED))
    sys.stdout.flush()
    sys.stderr.flush()
    if requeue and environment.global_rank == 0:
        environment._requeue(0)  # submitit's hook for each cluster type; `scontrol requeue` on SLURM
    # A task that exits by itself would end the job, perhaps before it is requeued.
    if environment.name() == "slurm":
        time.sleep(REQUEUE_SECONDS)
    os._exit(EXIT_PREEMPTED)
