"""Sweeps (`-m`) through Hydra: trials run sequentially, in parallel (joblib) or as SLURM jobs (submitit).

A trial is an ordinary run with its own run directory. Rerunning a killed sweep's command skips the finished trials and
resumes the others, except those that jobs of the earlier sweep are still running.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from omegaconf import DictConfig

from data.errors import DataError
from training.compose import (
    PROJECT,
    Primary,
    check_hydra,
    compose,
    hydra_overrides,
    quoted,
    resolved,
    start_hydra,
    validate,
    with_local_launcher,
    worded_errors,
)
from training.config import ConfigurationError, LocalLauncherConfig, RunConfig
from training.exits import EXIT_FAILED, EXIT_HELD, EXIT_PREEMPTED, refuse
from training.launching.lifeline import die_with_launcher
from training.launching.ranks import in_job, refuse_absent_slurm, start
from training.mistakes import key_of
from training.reliability.signals import passed_on_to_workers, say, stop_pending
from training.secrets import redacted

_preempted = False  # a trial of this process was asked to stop: start no other


def sweep(overrides: Sequence[str], primary: Primary = PROJECT) -> int:
    """Run every trial and wait for all. Returns the highest of the trials' exit codes.

    Raises ConfigurationError or DataError before any trial has started, if one cannot be run or two are the same run.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode

    if "WORLD_SIZE" in os.environ:
        raise ConfigurationError(
            "-m under torchrun: every rank would run the whole sweep; use launcher.nproc_per_node=N instead"
        )
    configs = check_trials(trials(overrides, primary), primary)
    if any(isinstance(config.launcher, LocalLauncherConfig) and config.launcher.head for config in configs):
        raise ConfigurationError(
            "launcher.head does not work with -m, which would run the sweep on every node; start one run at a time, or "
            "choose launcher=slurm"
        )
    overrides = hydra_overrides(primary, overrides)
    hydra = start_hydra(primary)
    try:
        with worded_errors(overrides, primary):
            master = hydra.compose_config(primary.name, overrides, RunMode.MULTIRUN, with_log_configuration=False)
            check_hydra(master, overrides)
        from training.launching.inputs import refuse_absent_inputs  # imports numpy

        for config in configs:
            if config.launcher.name != "slurm":  # the nodes may have files that this machine lacks
                refuse_absent_inputs(config)
        refuse_absent_slurm(master.hydra.launcher)
        with passed_on_to_workers(master.hydra.launcher._target_, EXIT_PREEMPTED):
            batches = hydra.multirun(primary.name, run_trial, overrides, with_log_configuration=False)
    except (ConfigurationError, DataError):
        raise
    except HydraException as error:
        raise ConfigurationError(redacted(" ".join(str(error).split()))) from error
    except Exception as error:  # a task of a SLURM job ended without a result, or with an error
        say(f"error: a trial failed: {' '.join(str(error).split())}")
        return EXIT_FAILED
    finally:
        GlobalHydra.instance().clear()
    ended = [trial for batch in batches for trial in batch]
    if held := [" ".join(trial.overrides) for trial in ended if trial.return_value == EXIT_HELD]:
        say(
            f"skipped {len(held)} of {len(ended)} trials that other processes are running "
            f"({'; '.join(held[:3] + ['…'] * (len(held) > 3))}); rerun the same command when those have ended"
        )
    return max((trial.return_value for trial in ended), default=0)


def trials(overrides: Sequence[str], primary: Primary = PROJECT) -> list[list[str]]:
    """Return the overrides of each trial, without Hydra's own except hydra.searchpath."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with worded_errors(overrides, primary):
        parsed = OverridesParser.create().parse_overrides([quoted(override) for override in overrides])
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [
        [o for o in trial if not o.startswith("hydra") or o.startswith("hydra.searchpath=")]
        for batch in batches
        for trial in batch
    ]


def check_trials(trials: Sequence[Sequence[str]], primary: Primary = PROJECT) -> list[RunConfig]:
    """Return the trials' validated configurations. ConfigurationError if one is invalid, or two share a run directory."""
    named: dict[str, int] = {}
    configs: list[RunConfig] = []
    for number, overrides in enumerate(trials):
        configs.append(compose(overrides, primary))
        name = configs[-1].run_name
        if name in named:
            first = " ".join(o for o in trials[named[name]] if o not in overrides) or "the same values"
            second = " ".join(o for o in overrides if o not in trials[named[name]]) or "the same values"
            remedy = "they are the same run; leave one out"
            if "name" in map(key_of, overrides):
                remedy = "leave name= out, or make it differ, for example name='${optimizer.name}-${seed}'"
            raise ConfigurationError(
                f"name={name}: trials {named[name]} ({first}) and {number} ({second}) of the sweep would share this "
                f"run directory; {remedy}"
            )
        named[name] = number
    return configs


def run_trial(config: DictConfig) -> int:
    """Run one trial, wherever the launcher has put it. Returns its exit code; an exception ends the trial, not the sweep."""
    die_with_launcher()

    global _preempted
    if _preempted or stop_pending():
        return EXIT_PREEMPTED
    try:
        values = resolved(config)
        if not in_job():
            values = with_local_launcher(values)  # the record of a job names launcher=slurm; a sweep over it runs here
        code = start(validate(values))
    except (ConfigurationError, DataError) as error:
        return refuse(error)
    except Exception:
        if in_job():
            raise  # so that SLURM sees it
        traceback.print_exc(file=sys.stderr)
        return EXIT_FAILED
    _preempted = code == EXIT_PREEMPTED
    return code
