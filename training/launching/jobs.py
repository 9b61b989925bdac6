"""Launch a list of runs through any of Hydra's launchers: sequential, parallel (joblib) or on SLURM (submitit).

Hydra's multirun expands products of values. A study has a list of overrides per run, which the launchers accept as well.
"""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from data.errors import DataError
from training.compose import (
    PROJECT,
    check_hydra,
    quoted,
    refuse_hydra_overrides,
    resolved,
    start_hydra,
    validate,
    worded_errors,
)
from training.config import ConfigurationError
from training.exits import EXIT_FAILED, EXIT_PREEMPTED, refuse
from training.launching.lifeline import die_with_launcher
from training.launching.ranks import refuse_absent_slurm, start
from training.mistakes import key_of, unquoted
from training.reliability.signals import passed_on_to_workers, stop_pending


def launch(jobs: Sequence[Sequence[str]], launcher: Sequence[str] = ()) -> list[int]:
    """Run every job, wait for all, and return their exit codes (those of train.py) in order.

    A job's output goes to `<output_dir>/<name>.log`. An exception ends the job with exit code 1 and its traceback there.

    Args:
        jobs: overrides of each run; `name=` is required.
        launcher: Hydra overrides that choose and configure the launcher, such as `hydra/launcher=joblib`.

    Raises ConfigurationError if the launcher does not exist, or a job's overrides cannot be composed.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    for job in jobs:
        refuse_hydra_overrides(job)
    try:
        with worded_errors(launcher):
            hydra = start_hydra()
            overrides = [quoted(override) for override in launcher]
            config = hydra.compose_config(
                PROJECT.name, overrides, RunMode.MULTIRUN, with_log_configuration=False, from_shell=False
            )
            check_hydra(config, launcher)
            refuse_absent_slurm(config.hydra.launcher)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            plugin = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=run_logged, config=config
            )
            with passed_on_to_workers(config.hydra.launcher._target_, EXIT_PREEMPTED), _lost_jobs_fail(launcher):
                returns = plugin.launch([[quoted(override) for override in job] for job in jobs], initial_job_idx=0)
            return [int(one.return_value) for one in returns]
    finally:
        GlobalHydra.instance().clear()


@contextlib.contextmanager
def _lost_jobs_fail(launcher: Sequence[str]) -> Iterator[None]:
    """Let a job of submitit that ends without a result fail alone, as after a node failure or an scancel.

    Hydra's launcher waits for the jobs one by one, and the error of one would leave the others running unwatched.
    """
    if not _given(launcher).get("hydra/launcher", "basic").startswith("submitit"):
        yield
        return
    import submitit
    from hydra.core.utils import JobReturn, JobStatus

    results = submitit.Job.results

    def or_failure(job: submitit.Job[JobReturn]) -> list[JobReturn]:
        try:
            return results(job)
        except submitit.core.utils.UncompletedJobError as error:
            reason = str(error).strip().splitlines()[0]
            logging.getLogger(__name__).error("job %s ended without a result: %s", job.job_id, reason)
            return [JobReturn(_return_value=1, status=JobStatus.COMPLETED)]

    submitit.Job.results = or_failure  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        submitit.Job.results = results  # type: ignore[method-assign]


def side_by_side(launcher: Sequence[str]) -> int | None:
    """Return how many jobs a launcher runs in parallel; None if it queues them all."""
    chosen = _given(launcher)
    match chosen.get("hydra/launcher", "basic"):
        case "basic":
            return 1
        case "joblib":
            jobs = int(chosen.get("hydra.launcher.n_jobs", -1))
            return jobs if jobs > 0 else os.cpu_count() or 1
        case _:
            return None


def _given(launcher: Sequence[str]) -> dict[str, str]:
    return {key_of(given): unquoted(given.partition("=")[2]) for given in launcher}


def run_logged(config: DictConfig) -> int:
    """Validate and run one job, with its output in its log."""
    die_with_launcher()

    if stop_pending():
        return EXIT_PREEMPTED
    values = resolved(config)
    log = Path(values["output_dir"], f"{values['name']}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return start(validate(values))
        except (ConfigurationError, DataError) as error:
            return refuse(error)
        except Exception:
            traceback.print_exc(file=file)
            return EXIT_FAILED
