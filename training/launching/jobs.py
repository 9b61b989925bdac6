"""A list of runs through any of Hydra's launchers: one after the other, side by side (joblib), on SLURM (submitit).

Hydra's own multirun takes products of values; a study has a list of overrides for each run, which the launchers take as
well.
"""

import contextlib
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.compose import (
    PROJECT,
    begin_hydra,
    check_hydra,
    quoted,
    refuse_reach_of_overrides,
    resolved,
    worded_errors,
)
from training.exits import EXIT_FAILED, EXIT_PREEMPTED
from training.launching.lifeline import die_with_launcher
from training.launching.ranks import refuse_absent_slurm, run_job
from training.reliability.signals import passed_on_to_workers, stop_pending


def launch(jobs: Sequence[Sequence[str]], launcher: Sequence[str] = ()) -> list[int]:
    """Run every job and wait for all of them. Returns exit codes as of train.py, in order.

    A job's output goes to `<output_dir>/<name>.log`, and what it raises becomes exit code 1 with the traceback there.

    Args:
        jobs: overrides of each run; `name=` is needed.
        launcher: Hydra overrides that choose and set the launcher, such as `hydra/launcher=joblib`.

    Raises:
        ConfigurationError: there is no such launcher, or a job's overrides cannot be composed.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    for job in jobs:
        refuse_reach_of_overrides(job)
    try:
        with worded_errors(launcher):
            hydra = begin_hydra()
            config = hydra.compose_config(
                PROJECT.name,
                overrides=[quoted(override) for override in launcher],
                run_mode=RunMode.MULTIRUN,
                with_log_configuration=False,
                from_shell=False,
            )
            check_hydra(config, launcher)
            refuse_absent_slurm(config.hydra.launcher)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            plugin = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=run_logged, config=config
            )
            with passed_on_to_workers(config.hydra.launcher._target_, EXIT_PREEMPTED):
                returns = plugin.launch([[quoted(override) for override in job] for job in jobs], initial_job_idx=0)
            return [int(one.return_value) for one in returns]
    finally:
        GlobalHydra.instance().clear()


def side_by_side(launcher: Sequence[str]) -> int | None:
    """How many jobs a launcher runs side by side; None for all that there are (a queue)."""
    chosen = {key: value.strip("'\"") for key, _, value in (given.lstrip("+").partition("=") for given in launcher)}
    match chosen.get("hydra/launcher", "basic"):
        case "basic":
            return 1
        case "joblib":
            jobs = int(chosen.get("hydra.launcher.n_jobs", -1))
            return jobs if jobs > 0 else os.cpu_count() or 1
        case _:
            return None


def run_logged(config: DictConfig) -> int:
    """One job: validate and run, its output in its log."""
    die_with_launcher()

    import torch

    if stop_pending():
        return EXIT_PREEMPTED
    values: dict[str, Any] = resolved(config)
    log = Path(str(values["output_dir"])) / f"{values['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Compiled code of the previous job's model in this process counts against the limit of recompilations.
    torch._dynamo.reset()
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return run_job(values)
        except Exception:
            traceback.print_exc(file=file)
            return EXIT_FAILED
