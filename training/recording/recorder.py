"""Write a run's lines to the record first, then to the display and the tracker. Ranks other than 0 do nothing."""

import contextlib
import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import records
from training.recording.terminal import Display
from training.recording.trackers import Tracker
from training.records import MetricsWriter
from training.reliability.run_directory import RunDirectory


@dataclass
class Recorder:
    """One run's outputs. `failure` says why the record can no longer be written; the loop then ends the run."""

    place: RunDirectory
    display: Display
    metrics: MetricsWriter | None = None  # rank 0
    tracker: Tracker | None = None  # rank 0
    failure: str | None = None

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
        """Hash of the record so far; None on other ranks than 0."""
        return None if self.metrics is None else self.metrics.sha256

    def sync(self) -> int:
        """Flush the record to disk, check that it is still this process's, and return its size in bytes.

        Raises:
            OSError: a line is missing, it cannot be flushed, or another process has taken it.
        """
        if self.failure is not None:  # a checkpoint saved now would end a record that lacks the line
            raise OSError(errno.EIO, self.failure)
        try:
            return self._flush()
        except OSError as error:
            self.failure = error.strerror or str(error)
            raise

    def _flush(self) -> int:
        if self.metrics is None:
            return 0
        self.place.confirm()
        return self.metrics.sync()

    def summarize(self, summary: Mapping[str, Any]) -> str | None:
        """Write the summary if the record is still this process's. Returns why it could not be written, if so."""
        if self.metrics is None:
            return None
        try:
            self._flush()
            records.write_summary(self.place.path, summary)
        except OSError as error:
            return f"{self.place.path / records.SUMMARY_FILE} could not be written: {error.strerror}"
        return None

    def finish(self, summary: Mapping[str, Any]) -> str | None:
        """Write the summary and close everything. Returns why the summary could not be written, if so."""
        self.display.close()
        problem = self.summarize(summary)
        if self.metrics is not None:
            with contextlib.suppress(OSError):  # the disk may be gone, which has been reported
                self.metrics.close()
        if self.tracker is not None:
            unfinished = problem is not None and summary["status"] == "completed"
            self.tracker.finish({**summary, "status": "failed", "reason": problem} if unfinished else summary)
        return problem
