"""Tables of a study: its planned cost, and the progress of each of its cells."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from studies.costs import costs
from studies.expansion import expand, expected_trials
from studies.spec import StudySpec
from studies.store import Places, outcomes
from training.config import ConfigurationError


def speeds_of(spec: StudySpec, given: Sequence[str]) -> dict[str, float]:
    """Parse `--speed` into tokens per second by model.

    Raises:
        ConfigurationError: not a model of the study, or not a number.
    """
    speeds: dict[str, float] = {}
    for one in given:
        model, _, number = one.partition("=")
        if model not in spec.models or not number.replace(".", "", 1).isdigit() or not float(number):
            raise ConfigurationError(
                f"--speed {one}: expected <model>=<tokens per second> with one of {', '.join(spec.models)}"
            )
        speeds[model] = float(number)
    return speeds


def plan_table(spec: StudySpec, speeds: Mapping[str, float], start_seconds: float) -> Table:
    """Return the maximum trials, steps and tokens of each arm and model, with hours if a speed is given."""
    table = _table(f"{spec.name}: at most", "model", "arm")
    columns = ["tuning trials", "reported runs", "steps", "M tokens", *(["hours"] if speeds else [])]
    for column in columns:
        table.add_column(column, justify="right")
    planned = costs(spec, speeds, start_seconds)
    for (model, arm), cost in planned.items():
        hours = [] if not speeds else ["" if cost.seconds is None else f"{cost.seconds / 3600:,.2f}"]
        numbers = str(cost.tuning), str(cost.reporting), f"{cost.steps:,}", f"{cost.tokens / 1e6:,.1f}"
        table.add_row(Text(model), Text(arm), *numbers, *hours)
    trials = sum(cost.tuning + cost.reporting for cost in planned.values())
    table.caption = f"{trials:,} trials, {sum(cost.tokens for cost in planned.values()):.3g} tokens"
    known = [cost.seconds for cost in planned.values() if cost.seconds is not None]
    if known:
        table.caption += f", {sum(known) / 3600:.1f} hours" + (
            "" if len(known) == len(planned) else " where speeds are given"
        )
    return table


def status_table(spec: StudySpec, places: Places) -> Table:
    """Return the progress of each cell."""
    known = outcomes(places)
    table = _table(f"{spec.name} in {places.records}", "model", "arm")
    table.add_column("steps", justify="right")
    table.add_column("phase", no_wrap=True)
    for column in ("done", "of at most", "diverged"):
        table.add_column(column, justify="right")
    done: dict[tuple[str, str, int, str], list[str]] = {}
    for trial in expand(spec, known).trials:
        if trial.name in known:
            key = (trial.arm, trial.model, trial.horizon, trial.phase)
            done.setdefault(key, []).append(known[trial.name].status)
    for (arm, model, horizon, phase), count in expected_trials(spec).items():
        ended = done.get((arm, model, horizon, phase), [])
        lost = ended.count("diverged")
        table.add_row(
            Text(model),
            Text(arm),
            f"{horizon:,}",
            phase,
            str(len(ended)),
            str(count),
            str(lost) if lost else "",
            style="green" if len(ended) == count else None,
        )
    return table


def _table(title: str, *names: str) -> Table:
    """Start a table with columns of names, which are not truncated on a narrow terminal."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
