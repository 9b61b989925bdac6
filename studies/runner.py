"""Run a study: expand it, run the trials that are ready, and repeat; then add finished trials to the tables."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.progress import duration
from studies.expansion import Expansion, Outcomes, Trial, expand, expected_trials
from studies.spec import StudySpec
from studies.store import Places, compact, free, outcomes, read_outcome
from training.config import ConfigurationError
from training.exits import EXIT_CONFIGURATION, EXIT_HELD, EXIT_PREEMPTED

# Runs jobs (lists of overrides) and returns their exit codes: training.launching.jobs.launch with a launcher.
Launch = Callable[[Sequence[Sequence[str]]], list[int]]


@dataclass(frozen=True)
class StudyProgress:
    """The progress of a study."""

    done: int
    expected: int  # at most
    seconds_left: float | None  # None until a trial has been timed

    @property
    def text(self) -> str:
        left = "" if self.seconds_left is None else f", about {duration(self.seconds_left)} left"
        return f"{self.done} of at most {self.expected} trials{left}"


@dataclass(frozen=True)
class Sitting:
    """The result of one call of `run_study`."""

    finished: bool  # nothing is left to run
    ran: int
    failed: tuple[str, ...]  # trials that failed; the next call retries them
    interrupted: bool  # by a signal or the time limit


def run_study(
    spec: StudySpec,
    places: Places,
    launch: Launch,
    *,
    at_once: int | None = 1,
    hours: float | None = None,
    log: Callable[[str], None] = print,
) -> Sitting:
    """Run a study until it is finished, interrupted or blocked. Call it again to resume.

    Recorded trials are skipped, and an unfinished run resumes from its checkpoint. No arm can exceed its budget. Finished
    trials are added to the study's tables at the start and at the end, also after an error; if this process is killed,
    the next call adds them.

    Args:
        launch: runs jobs and waits for them.
        at_once: number of jobs to pass to `launch` together; None for all that are ready.
        hours: time limit after which no trial is started.
        log: called with a line for each event.

    Raises:
        ConfigurationError: a trial's configuration is invalid, or seeds changed after results were seen.
    """
    compact(spec, places)
    try:
        return _sit(spec, places, launch, at_once, math.inf if hours is None else 3600 * hours, log)
    finally:
        compact(spec, places)


def _sit(
    spec: StudySpec, places: Places, launch: Launch, at_once: int | None, seconds: float, log: Callable[[str], None]
) -> Sitting:
    deadline = time.monotonic() + seconds
    pace = Pace()
    failed: list[str] = []
    held: list[str] = []  # by other processes
    ran = 0
    while True:
        known = outcomes(places)
        current = expand(spec, known)
        ready = [trial for trial in current.missing(known) if trial.name not in {*failed, *held}]
        if current.finished or not ready:
            why = (
                f"{len(failed)} trials failed ({', '.join(failed[:3])})"
                if failed
                else "a search is waiting for results"
            )
            waiting = len({*held} - {*known})
            why = (
                f"{waiting} trials run in other processes; rerun the same command when they have finished"
                if waiting
                else why
            )
            log("the study is finished" if current.finished else f"no trial can run: {why}")
            return Sitting(current.finished, ran, tuple(failed), interrupted=waiting > 0)
        if time.monotonic() > deadline:
            log(f"time limit reached: {progress(spec, current, known, pace).text}; rerun the same command to resume")
            return Sitting(False, ran, tuple(failed), interrupted=True)
        batch = ready[: at_once or len(ready)]
        for trial in batch:
            log(f"{_describe(trial)}: started ({progress(spec, current, known, pace).text})")
        resumed = any(places.run(trial).exists() for trial in batch)
        started = time.monotonic()
        codes = launch([job(spec, trial, places) for trial in batch])
        if not resumed:  # an earlier sitting has made a part of its steps
            pace.note(batch, time.monotonic() - started)
        interrupted = False
        for trial, code in zip(batch, codes, strict=True):
            outcome = read_outcome(places.run(trial))
            if code == EXIT_CONFIGURATION:
                raise ConfigurationError(
                    f"{spec.name}: the configuration of {trial.name} is invalid, see {places.run(trial)}.log; "
                    "correct the study file"
                )
            if outcome is not None:
                free(trial, places)
                ran += 1
                result = f"loss {outcome.loss:.4f}" if outcome.status == "completed" else outcome.status
                log(f"{_describe(trial)}: {result}")
            elif code == EXIT_HELD:
                held.append(trial.name)
                log(f"{_describe(trial)}: running in another process")
            elif code == EXIT_PREEMPTED:
                interrupted = True
                log(f"{_describe(trial)}: interrupted; rerun the same command to resume from its checkpoint")
            else:
                failed.append(trial.name)
                log(f"{_describe(trial)}: failed with exit code {code}, see {places.run(trial)}.log")
        if interrupted:
            return Sitting(False, ran, tuple(failed), interrupted=True)


def job(spec: StudySpec, trial: Trial, places: Places) -> list[str]:
    """Return the overrides of one trial's run, including name, directories and tracker tags."""
    given = {override.split("=")[0] for override in trial.overrides}
    tags = [spec.name, trial.phase, trial.arm, f"{trial.horizon} steps"]
    own = {
        "name": trial.name,
        "output_dir": str(places.work),
        "tracker.group": f"{spec.name}-{trial.model}",
        "tracker.tags": "[" + ",".join(f'"{tag}"' for tag in tags) + "]",
    }
    return [*trial.overrides, *(f"{key}={value}" for key, value in own.items() if key not in given)]


class Pace:
    """Seconds per step by arm and model, measured on finished trials."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def note(self, trials: Sequence[Trial], seconds: float) -> None:
        steps = sum(trial.horizon for trial in trials)
        for trial in trials:
            self._seconds.setdefault((trial.arm, trial.model), []).append(seconds / steps)

    def per_step(self, arm: str, model: str) -> float | None:
        """Return the time of the arm on the model, else of the model, else of any trial; None if nothing was timed."""
        exact = self._seconds.get((arm, model))
        on_model = [value for (_, where), values in self._seconds.items() for value in values if where == model]
        anything = [value for values in self._seconds.values() for value in values]
        chosen = exact or on_model or anything
        return sum(chosen) / len(chosen) if chosen else None


def progress(spec: StudySpec, current: Expansion, known: Outcomes, pace: Pace) -> StudyProgress:
    """Return the trials done and the time left at the current pace, if every search uses its whole budget."""
    expected = expected_trials(spec)
    done = Counter(trial.cell for trial in current.trials if trial.name in known)
    paces = {cell: pace.per_step(*cell[:2]) for cell in expected}
    left = [(count - done[cell]) * cell[2] * (paces[cell] or 0.0) for cell, count in expected.items()]
    return StudyProgress(done.total(), sum(expected.values()), None if None in paces.values() else sum(left))


def _describe(trial: Trial) -> str:
    values = ", ".join(f"{key.removeprefix('optimizer.')}={value}" for key, value in trial.values.items())
    what = f"{trial.phase} {trial.arm}, {trial.model}, {trial.horizon} steps, seed {trial.seed}"
    return f"{what}, {values}" if values and trial.phase == "tuning" else what
