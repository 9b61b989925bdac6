"""The command line of train.py: compose, validate, run here or start the ranks.

A single run is composed by Hydra and validated before anything else happens. Hydra's own entry point is used only for what it
alone can do: sweeps (-m), --help, --info and completion. It writes no files.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from data.errors import DataError
from training.compose import CONFIG_DIRECTORY, compose_dictionary, resolved, validate
from training.config import ConfigurationError, RunConfig

EXIT_CONFIGURATION = 2
HYDRA_FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "-i", "--info", "-c", "--cfg", "-p", "--package")
HYDRA_FLAGS += ("--resolve", "-sc", "--shell-completion", "--version", "-cp", "--config-path", "-cd", "--config-dir")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Rank 0 speaks."""
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, format="%(message)s")
    try:
        if any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
            return _hydra(arguments)
        overrides, config_name = _split_config_name(arguments)
        return start(validate(compose_dictionary(overrides, config_name)))
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def start(config: RunConfig) -> int:
    """Run a validated configuration in this process, or in ranks that are started here. Returns the exit code."""
    if config.launcher.nproc_per_node > 1 and "WORLD_SIZE" not in os.environ:
        from training.launch import start_ranks

        return start_ranks(config)
    from training.run import execute

    return execute(config).exit_code


def refuse(error: Exception) -> int:
    """One line on rank 0's standard error, and the exit code of a configuration that cannot be run."""
    if _rank() == 0:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_CONFIGURATION


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _split_config_name(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Hydra's --config-name NAME (or -cn) apart from the overrides.

    Raises:
        ConfigurationError: another flag, which Hydra does not have.
    """
    overrides, name = [], "config"
    waiting = iter(arguments)
    for argument in waiting:
        flag, _, value = argument.partition("=")
        if flag in ("--config-name", "-cn"):
            name = value or next(waiting, "config")
        elif argument.startswith("-"):
            raise ConfigurationError(f"{argument}: no such flag; overrides are written key=value, see --help")
        else:
            overrides.append(argument)
    return overrides, name


def _hydra(arguments: Sequence[str]) -> int:
    """Sweeps and Hydra's own flags, through Hydra's entry point. A sweep's exit code is that of its worst job."""
    import hydra
    from omegaconf import DictConfig

    if "-m" in arguments or "--multirun" in arguments:
        if "WORLD_SIZE" in os.environ:
            raise ConfigurationError("-m under torchrun: every rank would run the whole sweep; use launcher.nproc_per_node=N")
        overrides, name = _split_config_name([a for a in arguments if a not in ("-m", "--multirun")])
        _check_sweep(overrides, name)
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name="config")
    def job(config: DictConfig) -> Any:
        code = run_job(resolved(config))
        codes.append(code)
        return code

    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        job()
    finally:
        sys.argv = before
    return max(codes, default=0)


def run_job(values: dict[str, Any]) -> int:
    """One job of a sweep; its errors end it, not the sweep."""
    try:
        return start(validate(values))
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def _check_sweep(overrides: Sequence[str], config_name: str) -> None:
    """Refuse a sweep with a mistake in any of its jobs before the first one starts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        compose_dictionary(overrides, config_name)  # words the error
        raise
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        for job_overrides in batch:
            validate(compose_dictionary([o for o in job_overrides if not o.startswith("hydra")], config_name))
