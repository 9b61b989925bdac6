"""What is to be done with a run directory: begin, resume, leave alone. Nothing is changed here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.files import open_regular
from training import checkpoints, records
from training.checkpoints import Checkpoint, CheckpointError
from training.compose import validate_recorded
from training.config import ConfigurationError, RunConfig, flat
from training.records import RecordError, RunRecord, Status
from training.run_directory import refuse_to_replace, refuse_unnamed

#: Set by torchrun and by SLURM in a process that takes the place of one that ended.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Plan:
    """How a run begins."""

    finished: Status | None = None  # nothing is to be done
    checkpoint: Path | None = None  # where to go on from; verified
    metrics_bytes: int | None = None  # the record there is this run's and goes on after so much; None: a new one
    rejected: tuple[str, ...] = ()  # why newer checkpoints are passed over


def is_restart(names: Sequence[str] = RESTART_COUNTS) -> bool:
    """Whether a launcher has put this process in the place of one that ended."""
    return any(int(os.environ.get(name) or 0) > 0 for name in names)


def plan(config: RunConfig, directory: Path, *, restarted: bool = False) -> Plan:
    """Decide how the run begins.

    Args:
        restarted: this process takes the place of one that had begun the run, if there is one in the directory: the
            command's overwrite=true, resume=never or resume=<path> was obeyed then.

    Raises:
        ConfigurationError: the directory holds something else, or what `resume=` asks for cannot be done.
        OSError: the directory cannot be read.
    """
    if restarted and (directory / records.CONFIG_FILE).exists():
        own = config.resume == "never" or directory.resolve() in Path(config.resume).resolve().parents
        config = config.model_copy(update={"overwrite": False, "resume": "auto" if own else config.resume})
    given = None if config.resume in ("auto", "never") else Path(config.resume)
    if not (directory / records.CONFIG_FILE).exists():
        refuse_unnamed(directory)
        return Plan(checkpoint=_given_checkpoint(given, config) if given else None)
    if config.overwrite:
        refuse_to_replace(directory)
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
    _size(directory / records.METRICS_FILE)
    status = (_record(directory).summary or {}).get("status")
    if status in ("completed", "diverged"):
        return Plan(finished=status)
    try:
        newest, rejected = checkpoints.newest_valid(root, lambda checkpoint: _misfit(checkpoint, config, directory))
    except CheckpointError as error:
        raise ConfigurationError(f"{error}; correct its permissions, or overwrite=true begins anew") from error
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


def _misfit(checkpoint: Checkpoint, config: RunConfig, directory: Path) -> str | None:
    """Why a sound checkpoint in the run's own directory is not this run's."""
    metrics = directory / records.METRICS_FILE
    have = _size(metrics)
    if have < checkpoint.state["metrics_bytes"]:
        return f"{metrics} has {have} bytes and had {checkpoint.state['metrics_bytes']} at this checkpoint"
    expected = checkpoint.state.get("metrics_sha256")
    if expected is not None and records.sha256_of_start(metrics, checkpoint.state["metrics_bytes"]) != expected:
        return f"{metrics} is not what was written up to this checkpoint"
    try:
        theirs = validate_recorded(checkpoint.state["config"])
    except ConfigurationError as error:
        return f"its configuration cannot be read ({error})"
    if (theirs.identity(), theirs.seed) != (config.identity(), config.seed):
        return "it is of another configuration"
    return None


def _size(path: Path) -> int:
    """Bytes of a record's file; 0 where there is none.

    Raises:
        ConfigurationError: it cannot be read, or is no regular file.
    """
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}; restore it, or overwrite=true begins anew"
        ) from error


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
    except CheckpointError as error:
        raise ConfigurationError(f"resume={path}: {error}; give a checkpoint or a run directory") from error
    except OSError as error:
        raise ConfigurationError(
            f"resume={path}: {error.filename or path} cannot be read: {error.strerror}; correct the permissions, or give "
            "another checkpoint or run directory"
        ) from error
    optimizer = checkpoint.state["config"].get("optimizer")
    theirs = optimizer.get("name") if isinstance(optimizer, dict) else None
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
        there = validate_recorded(records.read_config(directory))
    except RecordError as error:
        raise ConfigurationError(f"{error}; give another name= or overwrite=true") from error
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{directory / records.CONFIG_FILE} cannot be read ({error}); give another name=, or remove the directory"
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
