"""Where a run's lines go: the record first, then the display and the tracker. Rank 0 writes, the others do nothing."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import records
from training.config import RunConfig, RunHeldError
from training.recording.terminal import Display
from training.recording.trackers import Tracker, build_tracker
from training.records import MetricsWriter
from training.reliability.resumption import Decision
from training.reliability.run_directory import RunDirectory


@dataclass
class Recorder:
    """One run's outputs. `failure` is why the record cannot be written any more: the loop ends the run over it."""

    place: RunDirectory
    display: Display
    metrics: MetricsWriter | None = None  # rank 0
    tracker: Tracker | None = None  # rank 0
    failure: str | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        place: RunDirectory,
        decision: Decision,
        environment: Mapping[str, Any],
        display: Display,
    ) -> "Recorder":
        """Create or reopen the record, on rank 0, in a directory that this process has: a run's first writes.

        Raises:
            RunHeldError: another process has begun this run since the decision.
            ConfigurationError: the run to be replaced holds what no run writes.
            OSError: the directory cannot be written.
        """
        directory = place.path
        if decision.metrics_bytes is None:
            if (directory / records.CONFIG_FILE).exists():
                if not config.overwrite:
                    raise RunHeldError(
                        f"{directory} has been begun by another process just now; start the command again"
                    )
                place.set_aside()
            records.write_config(directory, config.model_dump(mode="json") | {"name": config.run_name})
        if decision.metrics_bytes is None or not (directory / records.ENVIRONMENT_FILE).exists():
            records.write_environment(directory, environment)
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / records.SUMMARY_FILE).unlink(missing_ok=True)
        metrics = MetricsWriter(directory, decision.metrics_bytes)
        place.delete_replaced()
        display.message(f"run directory {directory}")
        return cls(place, display, metrics, build_tracker(config, directory, environment, display.message))

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

    @property
    def sha256(self) -> str | None:
        """Of the record so far, on rank 0."""
        return None if self.metrics is None else self.metrics.sha256

    def sync(self) -> int:
        """The record is on the disk up to here, and is this process's: its size in bytes.

        Raises:
            OSError: it is not.
        """
        if self.metrics is None:
            return 0
        try:
            self.place.confirm()
            return self.metrics.sync()
        except OSError as error:
            self.failure = error.strerror or str(error)
            raise

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, if the record is still this process's. A disk that takes none is told on the terminal."""
        if self.metrics is None:
            return
        try:
            self.sync()
            records.write_summary(self.place.path, summary)
        except OSError as error:
            path = self.place.path / records.SUMMARY_FILE
            self.message(f"{path} could not be written: {error.strerror}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close everything."""
        self.display.close()
        self.summarize(summary)
        if self.metrics is not None:
            with contextlib.suppress(OSError):  # of a disk that is gone, which has been told
                self.metrics.close()
        if self.tracker is not None:
            self.tracker.finish(summary)
