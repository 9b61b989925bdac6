"""Decide what to do with a run directory: start, resume, or leave it alone. This module changes no files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import open_regular
from training import records
from training.compose import validate_recorded
from training.config import ConfigurationError, RunConfig, refusal
from training.records import RecordError, RunRecord, Status, flatten
from training.reliability import checkpoints
from training.reliability.checkpoints import Checkpoint, CheckpointError
from training.reliability.run_directory import refuse_to_replace, refuse_unnamed

SAME_COMMAND = "rerun the same command"


@dataclass(frozen=True)
class Decision:
    """How a run starts."""

    finished: Status | None = None  # nothing to do
    origin: str | None = None  # the other run's checkpoint with which a finished one began
    checkpoint: Path | None = None  # to resume from; verified
    metrics_bytes: int | None = None  # the record continues after this many bytes; None: a new record
    rejected: tuple[str, ...] = ()  # why newer checkpoints were rejected


def is_restart(started: bool | None, directory: Path) -> bool:
    """Return whether a launcher started this process to replace one that ended and had reached the run.

    Args:
        started: whether an earlier start of this torchrun job reached the run, or None if nobody knows. torchrun's counter
            tells less: it does not change when nodes join or leave, and counts starts that never reached the run.
        directory: of the run; its record names the last SLURM job that reached it, since SLURM only counts starts.
    """
    if started or (started is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0):
        return True
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 or not (directory / records.CONFIG_FILE).exists():
        return False
    job = os.environ.get("SLURM_JOB_ID")
    return bool(_record(directory).environment.get("slurm_job", job) == job)


def how_to_resume(config: RunConfig, directory: Path) -> str:
    """Return the command that resumes a run that this configuration has started."""
    changes = ["without overwrite=true"] if config.overwrite else []
    changes += ["with resume=auto"] if _starts_again(config, directory) else []
    return f"rerun the command {' and '.join(changes)}" if changes else SAME_COMMAND


def _starts_again(config: RunConfig, directory: Path) -> bool:
    """Return whether `resume=` would not continue this run: it is never, or a checkpoint of the run's own."""
    return config.resume == "never" or directory.resolve() in Path(config.resume).resolve().parents


def _is_in(directory: Path, path: Path) -> bool:
    return directory.resolve() in (path.resolve(), *path.resolve().parents)


def decide(config: RunConfig, directory: Path, *, restarted: bool = False) -> Decision:
    """Decide how the run starts.

    Args:
        restarted: this process replaces one that ended. If that one started the run, it has obeyed the command's
            overwrite=true, resume=never or resume=<path> already.

    Raises:
        ConfigurationError: the directory holds something else, or what `resume=` asks for cannot be done.
        OSError: the directory cannot be read.
    """
    if restarted and (directory / records.CONFIG_FILE).exists():
        resume = "auto" if _starts_again(config, directory) else config.resume
        config = config.model_copy(update={"overwrite": False, "resume": resume})
    if not (directory / records.CONFIG_FILE).exists():
        refuse_unnamed(directory)
        return Decision(checkpoint=_given_checkpoint(config))
    if config.overwrite:
        refuse_to_replace(directory)
        return Decision(checkpoint=_given_checkpoint(config))
    there = _same_run(config, directory)
    given = None if config.resume in ("auto", "never") else Path(config.resume).resolve()
    if given is not None and _is_in(directory, given):
        checkpoint = _given_checkpoint(config)
        assert checkpoint is not None
        chosen = Checkpoint(checkpoint, verify=False)
        if reason := _misfit(chosen, config, directory):
            raise ConfigurationError(f"resume={config.resume}: {reason}; choose another checkpoint")
        return Decision(checkpoint=chosen.directory, metrics_bytes=chosen.state.metrics_bytes)
    origin = None if there.resume in ("auto", "never") else there.resume  # the checkpoint with which it began
    if given is not None and there.resume != config.resume:
        raise ConfigurationError(
            f"resume={config.resume}: {directory} already holds a run; give another name= or overwrite=true"
        )
    if config.resume == "never":
        raise ConfigurationError(
            f"resume=never: {directory} exists; choose resume=auto to resume it, or overwrite=true to replace it"
        )
    _size(directory / records.METRICS_FILE)
    status = (_record(directory).summary or {}).get("status")
    if status in ("completed", "diverged"):
        return Decision(finished=status, origin=origin)
    try:
        newest, rejected = checkpoints.newest_valid(
            directory / "checkpoints", lambda checkpoint: _misfit(checkpoint, config, directory)
        )
    except CheckpointError as error:
        raise refusal(f"{error}; correct its permissions, or start over with overwrite=true", error) from error
    if newest is not None:
        return Decision(checkpoint=newest.directory, metrics_bytes=newest.state.metrics_bytes, rejected=tuple(rejected))
    if rejected:
        raise ConfigurationError(
            f"{directory}: no usable checkpoint ({'; '.join(rejected)}); restore one, or start over with overwrite=true"
        )
    started = config if origin is None else config.model_copy(update={"resume": origin})
    return Decision(checkpoint=_given_checkpoint(started), metrics_bytes=0)


def check_tokens(directory: Path, manifest_sha256: str) -> None:
    """Raise ConfigurationError if the run being resumed was started on other tokens."""
    recorded = _record(directory).environment.get("data_manifest_sha256")
    if recorded is not None and recorded != manifest_sha256:
        raise ConfigurationError(
            f"{directory} was started on other tokens (manifest {recorded[:12]}, now {manifest_sha256[:12]}); restore "
            "them, give another name=, or start over with overwrite=true"
        )


def _record(directory: Path) -> RunRecord:
    try:
        return RunRecord.open(directory)
    except RecordError as error:
        raise refusal(f"{error}; restore or remove that file, or start over with overwrite=true", error) from error


def _misfit(checkpoint: Checkpoint, config: RunConfig, directory: Path) -> str | None:
    """Return why an undamaged checkpoint in the run's own directory does not belong to this run, or None."""
    metrics = directory / records.METRICS_FILE
    have = _size(metrics)
    if have < checkpoint.state.metrics_bytes:
        return f"{metrics} has {have} bytes, but had {checkpoint.state.metrics_bytes} at this checkpoint"
    expected = checkpoint.state.metrics_sha256
    if expected is not None and records.sha256_of_start(metrics, checkpoint.state.metrics_bytes) != expected:
        return f"{metrics} has changed since this checkpoint"
    try:
        theirs = validate_recorded(checkpoint.state.config)
    except ConfigurationError as error:
        return f"its configuration cannot be read ({error})"
    if (theirs.identity(), theirs.seed) != (config.identity(), config.seed):
        return "it has another configuration"
    return None


def _size(path: Path) -> int:
    """Return the bytes of a record's file, 0 if it does not exist. ConfigurationError if it is not a readable file."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise refusal(
            f"{path} cannot be read: {error.strerror}; restore it, or start over with overwrite=true", error
        ) from error


def _given_checkpoint(config: RunConfig) -> Path | None:
    """Return the checkpoint that `resume=<path>` names, the path itself or a run directory's newest valid one, if any."""
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume)
    try:
        if path.is_dir() and not (path / checkpoints.MANIFEST_FILE).exists():
            newest, rejected = checkpoints.newest_valid(path / "checkpoints")
            if newest is None:
                reason = "; ".join(rejected) or "it holds none"
                raise ConfigurationError(f"resume={path}: no valid checkpoint in {path / 'checkpoints'} ({reason})")
            checkpoint = newest
        else:
            checkpoint = Checkpoint(path)
    except CheckpointError as error:
        raise refusal(f"resume={path}: {error}; give a checkpoint or a run directory", error) from error
    except OSError as error:
        raise refusal(
            f"resume={path}: {error.filename or path} cannot be read: {error.strerror}; correct the permissions, or give "
            "another checkpoint or run directory",
            error,
        ) from error
    theirs = checkpoint.state.config.get("optimizer")
    theirs = theirs if isinstance(theirs, dict) else {}
    if _named(theirs) != _named(config.optimizer.model_dump()):
        raise ConfigurationError(
            f"optimizer={_named(config.optimizer.model_dump())}: {checkpoint.directory} has the state of optimizer="
            f"{_named(theirs)}; choose that, or start from its weights only: scripts/export.py and model.init_from="
        )
    if checkpoint.step >= config.train.steps:
        raise ConfigurationError(
            f"train.steps={config.train.steps}: {checkpoint.directory} is at step {checkpoint.step} already; "
            "choose more steps or an earlier checkpoint"
        )
    return checkpoint.directory


def _named(optimizer: Mapping[str, Any]) -> str:
    """Return what `optimizer=` was given, with an external one's factory."""
    factory = optimizer.get("factory")
    return str(optimizer.get("name")) + (f" optimizer.factory={factory}" if factory else "")


def _same_run(config: RunConfig, directory: Path) -> RunConfig:
    """Return the configuration of the run in the directory. ConfigurationError with the keys that differ if it is another."""
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
    here_values, there_values = flatten(config.model_dump(mode="json")), flatten(there.model_dump(mode="json"))
    relevant = set(flatten(config.identity())) | set(flatten(there.identity())) | {"seed"}
    differing = sorted(key for key in relevant if here_values.get(key) != there_values.get(key))
    shown = ", ".join(f"{key}={there_values.get(key)} there and {here_values.get(key)} here" for key in differing[:4])
    raise ConfigurationError(
        f"name={config.run_name}: {directory} is a run with another configuration ({shown}); "
        "give another name= or overwrite=true"
    )
