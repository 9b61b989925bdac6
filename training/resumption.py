"""What is to be done with a run directory: begin, go on, leave alone. Nothing is changed here.

One process at a time has a run directory: its lock lies in it and goes with the process, however that ends.
"""

import fcntl
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from training import checkpoints, records
from training.checkpoints import Checkpoint
from training.compose import validate
from training.config import ConfigurationError, RunConfig, RunHeldError, flat
from training.records import RecordError, RunRecord, Status

LOCK_FILE = ".lock"
#: Set by torchrun and by SLURM in a process that takes the place of one that ended.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Plan:
    """How a run begins."""

    finished: Status | None = None  # nothing is to be done
    checkpoint: Path | None = None  # where to go on from; verified
    metrics_bytes: int | None = None  # the record there is this run's and goes on after so much; None: a new one
    rejected: tuple[str, ...] = ()  # why newer checkpoints are passed over


class RunLock:
    """Held by rank 0 of a run from before its directory is changed until the process ends.

    Raises:
        RunHeldError: another process has it; host and process are named.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_FILE
        self._file: TextIO = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RunHeldError(
                f"{directory} is being run by {holder}; wait for it, stop it, or give another name="
            ) from error
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: the file system has no locks (%s); see to it yourself that no other process runs this",
                directory,
                error.strerror,
            )
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_restart() -> bool:
    """Whether a launcher has put this process in the place of one that ended."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTART_COUNTS)


def plan(config: RunConfig, directory: Path) -> Plan:
    """Decide how the run begins.

    Raises:
        ConfigurationError: the directory holds something else, or what `resume=` asks for cannot be done.
    """
    if is_restart() and (directory / records.CONFIG_FILE).exists():
        # The command's overwrite=true, resume=never or resume=<path> was obeyed when the run began.
        config = config.model_copy(update={"overwrite": False, "resume": "auto"})
    given = None if config.resume in ("auto", "never") else Path(config.resume)
    if not (directory / records.CONFIG_FILE).exists():
        _refuse_foreign(directory)
        return Plan(checkpoint=_given_checkpoint(given, config) if given else None)
    if config.overwrite:
        return Plan(checkpoint=_given_checkpoint(given, config) if given else None)
    there = _same_run(config, directory)
    root = directory / "checkpoints"
    if given is not None and directory.resolve() in (given.resolve(), *given.resolve().parents):
        chosen = Checkpoint(_given_checkpoint(given, config), verify=False)
        if reason := _misfit(chosen, config, directory):
            raise ConfigurationError(f"resume={config.resume}: {reason}; choose another checkpoint")
        return Plan(checkpoint=chosen.directory, metrics_bytes=chosen.state["metrics_bytes"])
    if given is not None and there.resume != config.resume:
        raise ConfigurationError(
            f"resume={config.resume}: {directory} already has a run of its own; give another name= or overwrite=true"
        )
    if config.resume == "never":
        raise ConfigurationError(
            f"resume=never: {directory} exists; choose resume=auto to go on, overwrite=true to replace it"
        )
    status = (_record(directory).summary or {}).get("status")
    if status in ("completed", "diverged"):
        return Plan(finished=status)
    newest, rejected = checkpoints.newest_valid(root, lambda checkpoint: _misfit(checkpoint, config, directory))
    if newest is not None:
        return Plan(checkpoint=newest.directory, metrics_bytes=newest.state["metrics_bytes"], rejected=tuple(rejected))
    if rejected:
        raise ConfigurationError(
            f"{directory}: no checkpoint can be used ({'; '.join(rejected)}); restore one, or overwrite=true begins anew"
        )
    return Plan(checkpoint=_given_checkpoint(given, config) if given else None, metrics_bytes=0)


def check_tokens(directory: Path, manifest_sha256: str) -> None:
    """Raise ConfigurationError where a run that goes on was begun on other tokens."""
    recorded = _record(directory).environment.get("data_manifest_sha256")
    if recorded is not None and recorded != manifest_sha256:
        raise ConfigurationError(
            f"{directory} was begun on other tokens (manifest {recorded[:12]}, now {manifest_sha256[:12]}); restore "
            "them, give another name=, or overwrite=true begins anew"
        )


def _record(directory: Path) -> RunRecord:
    try:
        return RunRecord.open(directory)
    except RecordError as error:
        raise ConfigurationError(f"{error}; restore or remove that file, or overwrite=true begins anew") from error


def _refuse_foreign(directory: Path) -> None:
    """A run takes only a directory that is not there, is empty, or is one that a run was about to take."""
    try:
        found = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be a run directory: {error.strerror}; choose another output_dir="
        ) from error
    if found:
        raise ConfigurationError(
            f"{directory} holds {', '.join(found[:3])} and no {records.CONFIG_FILE}: it is no run directory; "
            "give another name= or output_dir="
        )


def _misfit(checkpoint: Checkpoint, config: RunConfig, directory: Path) -> str | None:
    """Why a sound checkpoint in the run's own directory is not this run's."""
    metrics = directory / records.METRICS_FILE
    have = metrics.stat().st_size if metrics.exists() else 0
    if have < checkpoint.state["metrics_bytes"]:
        return f"{metrics} has {have} bytes and had {checkpoint.state['metrics_bytes']} at this checkpoint"
    try:
        theirs = validate(checkpoint.state["config"])
    except ConfigurationError as error:
        return f"its configuration cannot be read ({error})"
    if (theirs.identity(), theirs.seed) != (config.identity(), config.seed):
        return "it is of another configuration"
    return None


def _given_checkpoint(path: Path, config: RunConfig) -> Path:
    """The checkpoint that `resume=<path>` names: itself, or the newest valid one of a run directory."""
    try:
        if path.is_dir() and not (path / checkpoints.MANIFEST_FILE).exists():
            checkpoint, rejected = checkpoints.newest_valid(path / "checkpoints")
            if checkpoint is None:
                reason = "; ".join(rejected) or "there is none"
                raise ConfigurationError(f"resume={path}: no valid checkpoint in {path / 'checkpoints'} ({reason})")
        else:
            checkpoint = Checkpoint(path)
    except checkpoints.CheckpointError as error:
        raise ConfigurationError(f"resume={path}: {error}; give a checkpoint or a run directory") from error
    theirs = checkpoint.state["config"]["optimizer"]["name"]
    if theirs != config.optimizer.name:
        raise ConfigurationError(
            f"optimizer={config.optimizer.name}: {checkpoint.directory} has the state of optimizer={theirs}; choose that, "
            "or begin with its weights alone: scripts/export.py and model.init_from="
        )
    if checkpoint.step >= config.train.steps:
        raise ConfigurationError(
            f"train.steps={config.train.steps}: {checkpoint.directory} has made {checkpoint.step} steps already; "
            "choose more steps or an earlier checkpoint"
        )
    return checkpoint.directory


def _same_run(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration of the run in the directory, which is this one's.

    Raises:
        ConfigurationError: it is another one's; the differing keys are named.
    """
    try:
        there = validate(yaml.safe_load((directory / records.CONFIG_FILE).read_text()))
    except (ConfigurationError, yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{directory / records.CONFIG_FILE} cannot be read ({error}); give another name= or overwrite=true"
        ) from error
    if there.identity() == config.identity() and there.seed == config.seed:
        return there
    here_values, there_values = flat(config.model_dump(mode="json")), flat(there.model_dump(mode="json"))
    relevant = set(flat(config.identity())) | set(flat(there.identity())) | {"seed"}
    differing = sorted(key for key in relevant if here_values.get(key) != there_values.get(key))
    shown = ", ".join(f"{key}={there_values.get(key)} there and {here_values.get(key)} here" for key in differing[:4])
    raise ConfigurationError(
        f"name={config.run_name}: {directory} is a run of another configuration ({shown}); "
        "give another name= or overwrite=true"
    )
