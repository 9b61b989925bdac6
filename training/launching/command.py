"""The command line of train.py: compose and validate the configuration, then run it here or start its ranks.

Hydra composes the configuration, parses the flags and answers --cfg and --info. It writes no files.
"""

import contextlib
import io
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data.errors import DataError
from training.compose import (
    CONFIG_DIRECTORY,
    Primary,
    compose_dictionary,
    hydra_overrides,
    start_hydra,
    validate,
    worded_errors,
)
from training.config import ConfigurationError, SlurmLauncherConfig
from training.exits import EXIT_CONFIGURATION, refuse
from training.launching.ranks import in_job, start
from training.launching.sweep import sweep
from training.mistakes import not_a_flag

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code. Only rank 0 logs at INFO."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")
    try:
        flags, primary = parse(arguments)
        if flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
            return show(flags, primary)
        if flags.multirun:
            return sweep(flags.overrides, primary)
        config = validate(compose_dictionary(flags.overrides, primary))
        if isinstance(config.launcher, SlurmLauncherConfig) and not in_job():
            return sweep(flags.overrides, primary)  # a sweep of one trial: Hydra has launchers only for sweeps
        return start(config)
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def parse(arguments: Sequence[str]) -> tuple[Namespace, Primary]:
    """Parse Hydra's flags and the overrides, and find the primary configuration file.

    --config-name names the file and --config-path its directory (`configs` by default). --config-dir is searched as well,
    for that file and for choices of groups. Raises ConfigurationError if a flag is unknown, or a path does not exist.
    """
    flags = _parser(arguments).parse_intermixed_args(list(arguments))
    if flags.experimental_rerun is not None:
        raise ConfigurationError("--experimental-rerun: would unpickle a file; run a record's configuration instead")
    name = (flags.config_name or "config").removesuffix(".yaml")
    path = CONFIG_DIRECTORY if flags.config_path is None else Path(flags.config_path).absolute()
    added = None
    if flags.config_dir is not None:
        added = Path(flags.config_dir).absolute()
        if not os.path.isdir(added):
            raise ConfigurationError(f"--config-dir {added}: no such directory; give one that holds configurations")
        try:
            os.scandir(added).close()
        except OSError as error:
            reason = f"cannot be read: {error.strerror}; correct its permissions"
            raise ConfigurationError(f"--config-dir {added}: {reason}") from error
        if not os.path.isfile(path / f"{name}.yaml") and os.path.isfile(added / f"{name}.yaml"):
            path = added
    if not os.path.isfile(path / f"{name}.yaml"):
        flag = f"--config-name {name}" if flags.config_path is None else f"--config-path {path}"
        raise ConfigurationError(f"{flag}: no readable {name}.yaml in {path}; give a directory that has one")
    return flags, Primary(name, path, added)


def _parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """Return Hydra's argument parser, with its errors reworded as one line."""
    from hydra._internal.utils import get_args_parser

    def refuse_flag(message: str) -> NoReturn:
        raise ConfigurationError(not_a_flag(message, arguments))

    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]
    return parser


def show(flags: Namespace, primary: Primary) -> int:
    """Answer --help, --hydra-help, --info, --cfg and --shell-completion for the composed configuration.

    Raises ConfigurationError if it cannot be composed, and with --cfg job if a run would refuse it.
    """
    values = {} if flags.shell_completion else compose_dictionary(flags.overrides, primary)
    if flags.help:
        from training.launching.help import help_text  # slow: parses the source of config.py

        return print_answer(help_text(values))
    if flags.cfg == "job":
        validate(values)
    with worded_errors(flags.overrides, primary):
        hydra = start_hydra(primary)
        flags.overrides = hydra_overrides(primary, flags.overrides)
        if flags.hydra_help:
            hydra.hydra_help(primary.name, _parser(), flags)
        elif flags.cfg:
            return show_configuration(hydra, flags, primary)
        elif flags.info:
            hydra.show_info(flags.info, primary.name, flags.overrides)
        else:
            hydra.shell_completion(primary.name, flags.overrides)
    return 0


def show_configuration(hydra: "Hydra", flags: Namespace, primary: Primary) -> int:
    """Answer --cfg with Hydra's YAML. For a whole run, the meaning of each key follows as a comment."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            hydra.show_cfg(primary.name, flags.overrides, flags.cfg, flags.package, flags.resolve)
    except SystemExit:  # Hydra has printed that the --package does not exist
        return EXIT_CONFIGURATION
    text = shown.getvalue()
    if flags.cfg == "job" and flags.package is None:
        from training.launching.help import annotated

        text = annotated(text) + "\n"
    return print_answer(text.removesuffix("\n"))


def print_answer(text: str) -> int:
    """Print a long answer. A reader such as `| head` may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again on exit
    return 0
