"""The command line of train.py: compose, validate, run here or start the ranks.

A run is composed by Hydra and validated before anything else happens. Hydra reads the flags and shows what --help, --cfg
and --info ask for; it writes no files.
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
    begin_hydra,
    compose_dictionary,
    hydra_overrides,
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
    """Run the command line; returns the exit code. Rank 0 speaks."""
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, format="%(message)s")
    try:
        asked, primary = parse(arguments)
        if asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
            return show(asked, primary)
        if asked.multirun:
            return sweep(asked.overrides, primary)
        config = validate(compose_dictionary(asked.overrides, primary))
        if isinstance(config.launcher, SlurmLauncherConfig) and not in_job():
            return sweep(asked.overrides, primary)  # of one trial: the launcher belongs to Hydra's sweeps
        return start(config)
    except (ConfigurationError, DataError) as error:
        return refuse(error)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def parse(arguments: Sequence[str]) -> tuple[Namespace, Primary]:
    """Hydra's flags and the overrides, and the file that the configuration begins with.

    --config-name names the file, which lies in --config-path (`configs` by default); --config-dir is one more place to look
    for it, and for choices of groups.

    Raises:
        ConfigurationError: another flag, which Hydra does not have; or no such file or directory.
    """
    asked = _parser(arguments).parse_intermixed_args(list(arguments))
    if asked.experimental_rerun is not None:
        raise ConfigurationError(
            "--experimental-rerun: would unpickle a file; run the configuration of a record instead"
        )
    name = (asked.config_name or "config").removesuffix(".yaml")
    path = CONFIG_DIRECTORY if asked.config_path is None else Path(asked.config_path).absolute()
    added = None if asked.config_dir is None else Path(asked.config_dir).absolute()
    if added is not None and not os.path.isdir(added):
        raise ConfigurationError(f"--config-dir {added}: there is no such directory; give one that has configurations")
    if added is not None and not os.path.isfile(path / f"{name}.yaml") and os.path.isfile(added / f"{name}.yaml"):
        path = added
    if not os.path.isfile(path / f"{name}.yaml"):
        flag = f"--config-name {name}" if asked.config_path is None else f"--config-path {path}"
        raise ConfigurationError(
            f"{flag}: there is no {name}.yaml in {path} that may be read; give a directory that has one"
        )
    return asked, Primary(name, path, added)


def _parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """Hydra's parser of the command line, whose mistakes in the arguments are one line."""
    from hydra._internal.utils import get_args_parser

    def refuse_flag(message: str) -> NoReturn:
        raise ConfigurationError(not_a_flag(message, arguments))

    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]
    return parser


def show(asked: Namespace, primary: Primary) -> int:
    """Answer --help, --hydra-help, --info, --cfg and --shell-completion about what the overrides compose."""
    values = {} if asked.shell_completion else compose_dictionary(asked.overrides, primary)
    if asked.help:
        from training.launching.help import help_text  # reads and parses the models' source

        return print_answer(help_text(values))
    with worded_errors(asked.overrides, primary):
        hydra = begin_hydra(primary)
        asked.overrides = hydra_overrides(primary, asked.overrides)
        if asked.hydra_help:
            hydra.hydra_help(primary.name, _parser(), asked)
        elif asked.cfg:
            return show_configuration(hydra, asked, primary)
        elif asked.info:
            hydra.show_info(asked.info, primary.name, asked.overrides)
        else:
            hydra.shell_completion(primary.name, asked.overrides)
    return 0


def show_configuration(hydra: "Hydra", asked: Namespace, primary: Primary) -> int:
    """Answer --cfg: Hydra's YAML, of a whole run with the meaning of each key as a comment."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            hydra.show_cfg(primary.name, asked.overrides, asked.cfg, asked.package, asked.resolve)
    except SystemExit:  # it has said that there is no such --package
        return EXIT_CONFIGURATION
    text = shown.getvalue()
    if asked.cfg == "job" and asked.package is None:
        from training.launching.help import annotated

        text = annotated(text) + "\n"
    return print_answer(text.removesuffix("\n"))


def print_answer(text: str) -> int:
    """Print a long answer; a reader such as `| head` may close the pipe before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
    return 0
