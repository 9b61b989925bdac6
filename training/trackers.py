"""Mirrors of the run record: Weights & Biases and TensorBoard. The record (metrics.jsonl) is written first and never waits.

A tracker never stops a run: whatever it raises becomes one warning, and the tracker is left alone from then on.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import RunConfig

log = logging.getLogger(__name__)

AXES = ("step", "tokens", "flops", "seconds")
PREFIXES = {"train": "train", "eval": "val", "hessian": "hessian"}


class Tracker(ABC):
    """Receives the record's lines as they are written, on rank 0."""

    @abstractmethod
    def log(self, line: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def finish(self, summary: Mapping[str, Any]) -> None: ...


class NoTracker(Tracker):
    """tracker=none: the record alone."""

    def log(self, line: Mapping[str, Any]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass


class ForgivingTracker(Tracker):
    """Passes on to another tracker until it fails; then one warning, and the run goes on without it."""

    def __init__(self, inner: Tracker) -> None:
        self._inner: Tracker | None = inner

    def log(self, line: Mapping[str, Any]) -> None:
        self._try("log", line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._try("finish", summary)

    def _try(self, method: str, argument: Mapping[str, Any]) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, method)(argument)
        except Exception as error:  # a tracker may raise anything; the run must not notice
            log.warning("%s failed (%s); the run goes on without it", type(self._inner).__name__, error)
            self._inner = None


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's numbers by mirrored name: `train/loss`, `val/loss`, `hessian/norm`; nested ones joined by slashes."""
    prefix = PREFIXES.get(line["kind"], line["kind"])
    found: dict[str, float] = {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, member in value.items():
                collect(f"{path}/{key}", member)
        elif isinstance(value, (int, float)):
            found[path] = value

    for key, value in line.items():
        if key not in (*AXES, "kind"):
            collect(f"{prefix}/{key.removeprefix('val_')}", value)
    return found


class WandbTracker(Tracker):
    """Weights & Biases: online with a key, offline without one.

    Group `<model>-<data>`, job type the optimizer. Each row has step, tokens, flops and seconds, so any of them can be the
    x axis; `tokens` is the default. The run's id is derived from its directory: a resumed run goes on in its own curve.
    """

    def __init__(self, config: RunConfig, directory: Path, environment: Mapping[str, Any]) -> None:
        import hashlib

        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        identity = f"{config.run_name}/{config.identity_hash()}/{environment['initial_weights_sha256']}"
        self._run = wandb.init(
            project=config.tracker.project,
            entity=config.tracker.entity,
            group=config.tracker.group or f"{config.model.name}-{config.data.name}",
            job_type=config.optimizer.name,
            tags=[config.optimizer.name, config.model.name, *config.tracker.tags],
            name=config.run_name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(directory),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        for axis in AXES:
            self._run.define_metric(axis)
        for prefix in PREFIXES.values():
            self._run.define_metric(f"{prefix}/*", step_metric="tokens")
        self._run.define_metric("val/loss", step_metric="tokens", summary="min")

    def log(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "event":
            return
        self._run.log({axis: line[axis] for axis in AXES if axis in line} | scalars(line))

    def finish(self, summary: Mapping[str, Any]) -> None:
        for key, value in summary.items():
            if isinstance(value, (int, float, str)):
                self._run.summary[key] = value
        self._run.finish(exit_code=0 if summary["status"] == "completed" else 1)


def _has_wandb_key() -> bool:
    """Whether W&B will find a key: in the environment or in a netrc file. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")


class TensorBoardTracker(Tracker):
    """TensorBoard event files in <run>/tensorboard, over steps."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "event":
            return
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])  # type: ignore[no-untyped-call]

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def build_tracker(config: RunConfig, directory: Path, environment: Mapping[str, Any]) -> Tracker:
    """The configured tracker; one that cannot start is a warning and no tracker."""
    try:
        match config.tracker.name:
            case "wandb":
                return ForgivingTracker(WandbTracker(config, directory, environment))
            case "tensorboard":
                return ForgivingTracker(TensorBoardTracker(directory))
    except Exception as error:  # no network, no package, a refused key: the record is complete without it
        log.warning("tracker=%s could not start (%s); the run goes on without it", config.tracker.name, error)
    return NoTracker()
