"""The command line of train.py: compose, validate, run here or start the ranks.

A run is composed by Hydra and validated before anything else happens. Hydra's own entry point is used only for what it
alone can do: --help, --info and completion. It writes no files.
"""

import itertools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from training.compose import CONFIG_DIRECTORY, Primary, compose_dictionary, resolved, validate
from training.config import ConfigurationError, RankRefusedError, RunConfig, RunHeldError, SlurmLauncherConfig
from training.launch import EXIT_HELD, in_job, run_in_job, start_ranks
from training.sweep import sweep

EXIT_CONFIGURATION = 2
SWEEP_FLAGS = ("-m", "--multirun")
NAME_FLAGS, PATH_FLAGS, ADDED_FLAGS = ("--config-name", "-cn"), ("--config-path", "-cp"), ("--config-dir", "-cd")
# Those that show something and run nothing.
HYDRA_FLAGS = ("-h", "--help", "--hydra-help", "-i", "--info", "-c", "--cfg", "-sc", "--shell-completion", "--version")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Rank 0 speaks."""
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, format="%(message)s")
    try:
        if any(argument.split("=")[0] in HYDRA_FLAGS for argument in arguments):
            return _hydra(arguments)
        overrides, primary = split_primary([a for a in arguments if a not in SWEEP_FLAGS])
        if any(argument in SWEEP_FLAGS for argument in arguments):
            return sweep(overrides, primary)
        config = validate(compose_dictionary(overrides, primary))
        if isinstance(config.launcher, SlurmLauncherConfig) and not in_job():
            return sweep(overrides, primary)  # of one trial: the launcher belongs to Hydra's sweeps
        return start(config)
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def start(config: RunConfig) -> int:
    """Run a validated configuration in this process, or in ranks that are started here. Returns the exit code."""
    if isinstance(config.launcher, SlurmLauncherConfig):
        return run_in_job(config)
    if config.launcher.nproc_per_node > 1 and "WORLD_SIZE" not in os.environ:
        return start_ranks(config)
    from training.run import execute

    return execute(config).exit_code


def refuse(error: Exception) -> int:
    """One line on each node's standard error, and the exit code of what cannot be run: not at all, or not now."""
    # What a node's ranks meet, those of other nodes may not.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankRefusedError):
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_HELD if isinstance(error, RunHeldError) else EXIT_CONFIGURATION


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def split_primary(arguments: Sequence[str]) -> tuple[list[str], Primary]:
    """Hydra's --config-name NAME (-cn), --config-path DIR (-cp) and --config-dir DIR (-cd) apart from the overrides.

    The primary file lies in the path (`configs` by default); the dir is one more place to look for it, and for choices of
    groups.

    Raises:
        ConfigurationError: another flag, which Hydra does not have; or no such file in the path.
    """
    overrides, name, path, added = [], "config", CONFIG_DIRECTORY, None
    waiting = iter(arguments)
    for argument in waiting:
        flag, _, value = argument.partition("=")
        if flag in NAME_FLAGS:
            name = (value or next(waiting, "config")).removesuffix(".yaml")
        elif flag in PATH_FLAGS:
            path = Path(value or next(waiting, ".")).absolute()
        elif flag in ADDED_FLAGS:
            added = Path(value or next(waiting, ".")).absolute()
            overrides.append(f"hydra.searchpath=['file://{added}']")
        elif argument.startswith("-"):
            raise ConfigurationError(f"{argument}: no such flag; overrides are written key=value, see --help")
        else:
            overrides.append(argument)
    if added is not None and not (path / f"{name}.yaml").is_file() and (added / f"{name}.yaml").is_file():
        path = added
    if path != CONFIG_DIRECTORY and not (path / f"{name}.yaml").is_file():
        raise ConfigurationError(f"--config-path {path}: there is no {name}.yaml; give a directory that has one")
    return overrides, Primary(name, path)


def _hydra(arguments: Sequence[str]) -> int:
    """Hydra's own flags (--help, --info, --cfg, completion), through Hydra's entry point."""
    import hydra
    from omegaconf import DictConfig

    primary = _refuse_what_hydra_would_call(arguments)
    if primary.directory != CONFIG_DIRECTORY:
        arguments = [*arguments, "--config-path", str(primary.directory)]  # Hydra's own is relative to this module

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name="config")
    def job(config: DictConfig) -> int:
        return run_job(resolved(config))

    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        job()
    finally:
        sys.argv = before
    return 0


def _refuse_what_hydra_would_call(arguments: Sequence[str]) -> Primary:
    """The file that the arguments begin with, its composition checked where it, or the overrides, may name code."""
    flags = (*NAME_FLAGS, *PATH_FLAGS, *ADDED_FLAGS)
    kept: list[str] = []
    for before, argument in itertools.pairwise(["", *arguments]):
        if argument.partition("=")[0] in flags or before in flags or ("=" in argument and not argument.startswith("-")):
            kept.append(argument)
    overrides, primary = split_primary(kept)
    if any(argument.startswith("-") or "hydra." in argument for argument in kept):
        compose_dictionary(overrides, primary)
    return primary


def run_job(values: dict[str, Any]) -> int:
    """One run of plain values; what is wrong with them or the data becomes an exit code."""
    try:
        return start(validate(values))
    except (ConfigurationError, DataError) as error:
        return refuse(error)
