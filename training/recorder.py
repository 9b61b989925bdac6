"""Where a run's lines go: the record first, then the display and the tracker. Rank 0 writes, the others do nothing."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import records
from training.config import RunConfig, RunHeldError
from training.records import MetricsWriter
from training.resumption import LOCK_FILE, Plan, RunLock
from training.terminal import Display
from training.trackers import Tracker, build_tracker


@dataclass
class Recorder:
    """One run's outputs. `failure` is why the record cannot be written any more: the loop ends the run over it."""

    directory: Path
    display: Display
    metrics: MetricsWriter | None = None  # rank 0
    tracker: Tracker | None = None  # rank 0
    failure: str | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        directory: Path,
        plan: Plan,
        environment: Mapping[str, Any],
        display: Display,
    ) -> "Recorder":
        """Create or reopen the run directory, on rank 0: the first writes of a run happen here.

        Raises:
            RunHeldError: another process has begun this run since the plan was made.
            OSError: the directory cannot be written.
        """
        if plan.metrics_bytes is None:
            _make_room(config, directory)
            records.write_config(directory, config.model_dump(mode="json") | {"name": config.run_name})
        if plan.metrics_bytes is None or not (directory / records.ENVIRONMENT_FILE).exists():
            records.write_environment(directory, environment)
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / records.SUMMARY_FILE).unlink(missing_ok=True)
        metrics = MetricsWriter(directory, plan.metrics_bytes)
        display.message(f"run directory {directory}")
        return cls(directory, display, metrics, build_tracker(config, directory, environment, display.message))

    def write(self, line: Mapping[str, Any]) -> None:
        if self.metrics is None or self.failure is not None:
            return
        try:
            self.metrics.write(line)
        except OSError as error:
            self.failure = error.strerror or str(error)
            return
        match line["kind"]:
            case "train":
                self.display.step(line)
            case "eval":
                self.display.evaluation(line)
        if self.tracker is not None:
            self.tracker.log(json.loads(records.json_line(line)))

    def message(self, text: str) -> None:
        self.display.message(text)

    def sync(self) -> int:
        """The record is on the disk up to here: its size in bytes.

        Raises:
            OSError: it is not.
        """
        return self.metrics.sync() if self.metrics is not None else 0

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close everything. A disk that takes no summary is told on the terminal."""
        self.display.close()
        if self.metrics is None:
            return
        try:
            self.metrics.sync()
            self.metrics.close()
            records.write_summary(self.directory, summary)
        except OSError as error:
            self.message(f"{self.directory / records.SUMMARY_FILE} could not be written: {error.strerror}")
        if self.tracker is not None:
            self.tracker.finish(summary)


def take_directory(directory: Path) -> RunLock:
    """The run directory, made if need be, and its lock."""
    directory.mkdir(parents=True, exist_ok=True)
    return RunLock(directory)


def _make_room(config: RunConfig, directory: Path) -> None:
    """Remove the run that this one replaces; its lock stays, for it is held."""
    if (directory / records.CONFIG_FILE).exists() and not config.overwrite:
        raise RunHeldError(f"{directory} has been begun by another process just now; start the command again")
    for path in sorted(directory.iterdir(), key=lambda path: path.name == records.CONFIG_FILE):  # what says "run" last
        if path.name == LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
