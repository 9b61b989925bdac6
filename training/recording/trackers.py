"""Mirrors of the run record: Weights & Biases and TensorBoard. The record (metrics.jsonl) is written first and never waits.

A tracker never stops or slows a run: it works in its own thread. One that fails, hangs or falls too far behind is dropped
with a warning.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from training.config import RunConfig, TrackerConfig
from training.records import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, SUMMARY_FILE, checkpoint_name
from training.secrets import redacted

AXES = ("step", "tokens", "flops", "seconds")
PREFIXES = {"train": "train", "eval": "val", "hessian": "hessian"}
REFERENCE_FILE = Path(__file__).resolve().parents[2] / "results" / "reference.json"

# Lines that may wait for a slow tracker before it is dropped: a quarter of an hour at ten steps a second.
MOST_WAITING = 10_000
INIT_SECONDS = 30.0
# How long a run waits at its end for what is still to be sent; a preempted run must exit soon.
FINISH_SECONDS, PREEMPTED_SECONDS = 60.0, 5.0
ARTIFACT_SECONDS = 3600.0  # instead of FINISH_SECONDS, for a checkpoint of gigabytes


class Tracker(ABC):
    """Receives the record's lines as they are written, on rank 0."""

    @abstractmethod
    def log(self, line: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def abandon(self) -> None:  # noqa: B027 (most trackers need no cleanup)
        """Called from another thread when `log` or `finish` hangs: release whatever would delay the process's exit."""


class BackgroundTracker(Tracker):
    """Builds a tracker and feeds it in a separate thread until it fails.

    Args:
        build: creates the tracker, in the thread.
        name: for the warning.
        warn: called once, with one line that says why the tracker was dropped.
        patience: seconds that `finish` waits; by default FINISH_SECONDS.
    """

    def __init__(
        self, build: Callable[[], Tracker], name: str, warn: Callable[[str], None], patience: float | None = None
    ) -> None:
        self._build = build
        self._patience = patience
        self._name = name
        self._warn = warn
        self._waiting: queue.Queue[tuple[str, Mapping[str, Any]]] = queue.Queue(MOST_WAITING)
        self._given_up = False
        self._tracker: Tracker | None = None
        self._thread = threading.Thread(target=self._feed, name="tracker", daemon=True)
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        if self._given_up:
            return
        try:
            self._waiting.put_nowait(("log", line))
        except queue.Full:
            self._give_up(f"is {MOST_WAITING} lines behind")

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._given_up:
            return
        try:
            self._waiting.put_nowait(("finish", summary))
        except queue.Full:
            self._give_up(f"is {MOST_WAITING} lines behind")
            return
        seconds = PREEMPTED_SECONDS if summary["status"] == "preempted" else self._patience or FINISH_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"has not finished after {seconds:.0f} s")

    def _feed(self) -> None:
        try:
            self._tracker = tracker = self._build()
            method = ""
            while method != "finish" and not self._given_up:
                method, values = self._waiting.get()
                getattr(tracker, method)(values)
        except BaseException as error:  # no network, no package, a refused key, even SystemExit
            self._give_up(f"failed ({type(error).__name__}: {' '.join(str(error).split())})")

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._warn(f"tracker={self._name} {redacted(reason)}; the run continues without it, the record is complete")
            if self._tracker is not None and threading.current_thread() is not self._thread:
                self._tracker.abandon()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return a line's numbers by mirrored name: `train/loss`, `val/loss`, `hessian/norm`; nested names joined by slashes."""
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


def published_losses(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the final losses published for a configuration's model and corpus, by mirrored name (`reference/paper/adamw`).

    results/reference.json has losses of our models on OpenWebText with GPT-2's tokenizer only. Empty for any other corpus
    or model, and in an installation without that file.
    """
    if (values["data"]["name"], values["tokenizer"]["name"]) != ("openwebtext", "gpt2") or not REFERENCE_FILE.is_file():
        return {}
    published = json.loads(REFERENCE_FILE.read_text(encoding="utf-8"))["final_losses"]
    return {
        f"reference/{one['source'].replace(' ', '_')}/{one['arm']}": one["loss"]
        for one in published
        if one["model"] == values["model"]["name"]
    }


@dataclass(frozen=True)
class WandbRun:
    """How W&B shows a run. Runs of the same identity are one W&B run, which a second start continues."""

    name: str
    identity: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]  # of a record; anything else besides

    @classmethod
    def of(cls, config: RunConfig, environment: Mapping[str, Any]) -> Self:
        began = [environment.get(key, "") for key in ("initial_weights_sha256", "started")]
        return cls(
            name=config.run_name,
            identity="/".join([config.run_name, config.identity_hash(), *filter(None, began)]),
            group=config.tracker.group or f"{config.model.name}-{config.data.name}",
            job_type=config.optimizer.label,
            tags=(config.optimizer.label, config.model.name, *config.tracker.tags),
            config=config.model_dump(mode="json"),
        )

    @property
    def id(self) -> str:
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    @property
    def shown_config(self) -> dict[str, Any]:
        """The configuration with each beta of the optimizer also as a number: parallel coordinates take no lists."""
        values = dict(self.config)
        if optimizer := values.get("optimizer"):
            betas = enumerate(optimizer.get("betas") or (), start=1)
            values["optimizer"] = {**optimizer, **{f"beta{place}": beta for place, beta in betas}}
        return values


class WandbTracker(Tracker):
    """Weights & Biases: online with a key, offline without one.

    Each row has step, tokens, flops and seconds, so any of them can be the x axis; `tokens` is the default. The W&B id is
    derived from the run's identity; in a sweep the agent assigns it. Rows of evaluations also have published losses, as flat
    lines.

    Args:
        directory: holds W&B's files, in wandb/.
        warn: called with a line if W&B cannot be reached.
        record: the run directory to upload as an artifact when a run has completed; None for none.
    """

    def __init__(
        self,
        run: WandbRun,
        settings: TrackerConfig,
        directory: Path,
        warn: Callable[[str], None],
        record: Path | None = None,
    ) -> None:
        import wandb

        self._record = record
        chosen = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        # A sweep's agent passes project and id in the environment.
        own: dict[str, Any] = {}
        if not os.environ.get("WANDB_SWEEP_ID"):
            own = {"project": settings.project, "entity": settings.entity, "id": run.id, "resume": "allow"}
        self._published = published_losses(run.config) if "data" in run.config else {}

        def start(mode: str) -> Any:
            return wandb.init(
                **own,
                group=run.group,
                job_type=run.job_type,
                tags=list(run.tags),
                name=run.name,
                mode=mode,  # type: ignore[arg-type]
                dir=str(directory),
                config=run.shown_config,
                settings=wandb.Settings(console="off", init_timeout=INIT_SECONDS),
            )

        try:
            self._run = start(chosen)
        except Exception as error:
            if chosen != "online":
                raise
            _end_service()  # it would hold the run's id until its own time-out
            self._run = start("offline")
            warn(
                f"tracker=wandb cannot be reached ({type(error).__name__}); logging offline, "
                f"`wandb sync {directory}/wandb/offline-run-*` uploads it later"
            )
        for axis in AXES:
            self._run.define_metric(axis)
        for prefix in (*PREFIXES.values(), "reference"):
            self._run.define_metric(f"{prefix}/*", step_metric="tokens")
        self._run.define_metric("val/loss", step_metric="tokens", summary="min")

    @property
    def destination(self) -> tuple[str, str] | None:
        """Entity and project of an online run; None offline."""
        return None if self._run.offline else (self._run.entity, self._run.project)

    def log(self, line: Mapping[str, Any], row: int | None = None) -> None:
        """Log a line. With `row`, its number in the run, a row that W&B already has is not logged again."""
        if line["kind"] == "event" or (row is not None and row < self._run.starting_step):
            return
        published = self._published if line["kind"] == "eval" else {}
        self._run.log({axis: line[axis] for axis in AXES if axis in line} | scalars(line) | published, step=row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        for key, value in summary.items():
            if isinstance(value, (int, float, str)):
                self._run.summary[key] = value
        if self._record is not None and summary["status"] == "completed":
            self._log_artifact(self._record, summary)
        self._run.finish(exit_code=0 if summary["status"] == "completed" else 1)

    def _log_artifact(self, record: Path, summary: Mapping[str, Any]) -> None:
        """Upload the record and its last checkpoint, laid out as a run directory, which every command of ours takes."""
        import wandb

        numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        artifact = wandb.Artifact(f"run-{self._run.id}", type="model", metadata=numbers)
        for name in (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, SUMMARY_FILE):
            artifact.add_file(str(record / name), name=name, policy="immutable")
        checkpoint = f"checkpoints/{checkpoint_name(summary['steps'])}"
        artifact.add_dir(str(record / checkpoint), name=checkpoint, policy="immutable")
        self._run.log_artifact(artifact, aliases=["latest", f"step-{summary['steps']}"])

    def abandon(self) -> None:
        _end_service()


def report_url(entity: str, project: str, title: str) -> str | None:
    """Return the address of a project's W&B report by its title; None if there is none."""
    import wandb

    found = (report.url for report in wandb.Api().reports(f"{entity}/{project}") if report.display_name == title)
    return next(found, None)


def _end_service() -> None:
    """Kill W&B's service process: its exit hook would wait for the service, which waits for the network.

    Whatever was logged is in the service's file already.
    """
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
    with contextlib.suppress(Exception, SystemExit):  # raises with the service's exit code
        wandb.teardown()


def _has_wandb_key() -> bool:
    """Return whether W&B will find a key in the environment or a netrc file. The key itself is not used."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")


class TensorBoardTracker(Tracker):
    """TensorBoard event files in <run>/tensorboard, by step."""

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


def build_tracker(
    config: RunConfig, directory: Path, environment: Mapping[str, Any], warn: Callable[[str], None]
) -> Tracker | None:
    """Build the configured tracker; None for tracker=none. A tracker that cannot start is a warning."""
    match config.tracker.name:
        case "wandb":
            settings = config.tracker
            record, patience = (directory, ARTIFACT_SECONDS) if settings.artifacts else (None, None)
            run = WandbRun.of(config, environment)
            return BackgroundTracker(
                lambda: WandbTracker(run, settings, directory, warn, record), "wandb", warn, patience
            )
        case "tensorboard":
            return BackgroundTracker(lambda: TensorBoardTracker(directory), "tensorboard", warn)
    return None
