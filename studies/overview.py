"""The planned cost of a study (trials, steps, tokens, hours) and the progress of each of its cells, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from studies.expansion import Cell, arm_overrides, expand, expected_trials
from studies.spec import StudySpec
from studies.store import Places, outcomes
from training.compose import compose
from training.config import ConfigurationError, RunConfig

# FLOPs of an estimate, in forward-backward passes over its tokens (models/flops.py).
_PASSES = {"gnb": 1, "empirical_fisher": 1, "hutchinson_differences": 2, "hutchinson": 3}


@dataclass
class Cost:
    """The maximum cost of an arm on a model."""

    tuning: int = 0  # runs
    reporting: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float | None = 0.0  # None if the model's speed is not given
    unknown_evaluations: bool = False  # eval.tokens=null: the size of the validation split is not known here


def costs(spec: StudySpec, speeds: Mapping[str, float], start_seconds: float) -> dict[tuple[str, str], Cost]:
    """Return the cost by model and arm.

    Args:
        speeds: training tokens per second of AdamW, by model. Curvature passes and evaluations are added in proportion
            to their FLOPs; a slow optimizer step is not taken into account.
        start_seconds: overhead of a run in seconds: start, compilation, checkpoint.
    """
    found: dict[tuple[str, str], Cost] = {}
    configs: dict[tuple[str, str], RunConfig] = {}
    for (arm, model, horizon, phase), count in expected_trials(spec).items():
        key = model, arm
        if key not in configs:
            configs[key] = compose(arm_overrides(spec, arm, model))
        config, cost = configs[key], found.setdefault(key, Cost())
        if phase == "tuning":
            cost.tuning += count
        else:
            cost.reporting += count
        tokens = horizon * config.train.global_batch_size * config.train.sequence_length
        cost.unknown_evaluations = config.eval.tokens is None
        cost.steps += count * horizon
        cost.tokens += count * tokens
        speed = speeds.get(model)
        if speed is None or cost.seconds is None:
            cost.seconds = None
            continue
        evaluations = 1 + -(-horizon // config.eval.interval)
        evaluated = evaluations * (config.eval.tokens or 0) / 3  # a forward is a third of a training step
        cost.seconds += count * (start_seconds + (tokens * (1 + curvature_share(config)) + evaluated) / speed)
    return found


def curvature_share(config: RunConfig) -> float:
    """Return the FLOPs of the curvature passes divided by those of training."""
    curvature = config.optimizer.curvature
    if curvature is None:
        return 0.0
    return _PASSES[curvature.estimator] * curvature.batch_fraction / curvature.hessian_interval


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
    planned = costs(spec, speeds, start_seconds)
    unit, scale = ("B", 1e9) if any(cost.tokens >= 1e11 for cost in planned.values()) else ("M", 1e6)
    columns = ["tuning trials", "reported runs", "steps", f"{unit} tokens", *(["hours"] if speeds else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for (model, arm), cost in planned.items():
        hours = [] if not speeds else ["" if cost.seconds is None else f"{cost.seconds / 3600:,.2f}"]
        numbers = str(cost.tuning), str(cost.reporting), f"{cost.steps:,}", f"{cost.tokens / scale:,.1f}"
        table.add_row(Text(model), Text(arm), *numbers, *hours)
    trials = sum(cost.tuning + cost.reporting for cost in planned.values())
    table.caption = f"{trials:,} trials, {sum(cost.tokens for cost in planned.values()):.3g} tokens"
    known = [cost.seconds for cost in planned.values() if cost.seconds is not None]
    if known:
        table.caption += f", {sum(known) / 3600:.1f} hours" + (
            "" if len(known) == len(planned) else " where speeds are given"
        )
        if any(cost.unknown_evaluations for cost in planned.values()):
            table.caption += ", evaluations not counted (eval.tokens=null)"
    return table


def status_table(spec: StudySpec, places: Places) -> Table:
    """Return the progress of each cell."""
    known = outcomes(places)
    table = _table(f"{spec.name} in {places.records}", "model", "arm")
    table.add_column("steps", justify="right")
    table.add_column("phase", no_wrap=True)
    for column in ("done", "of at most", "diverged"):
        table.add_column(column, justify="right")
    done: dict[Cell, list[str]] = {}
    for trial in expand(spec, known).trials:
        if trial.name in known:
            done.setdefault(trial.cell, []).append(known[trial.name].status)
    for cell, count in expected_trials(spec).items():
        (arm, model, horizon, phase), ended = cell, done.get(cell, [])
        numbers = f"{len(ended)}", f"{count}", f"{ended.count('diverged') or ''}"
        style = "green" if len(ended) == count else None
        table.add_row(Text(model), Text(arm), f"{horizon:,}", phase, *numbers, style=style)
    return table


def _table(title: str, *names: str) -> Table:
    """Start a table with columns of names, which are not truncated on a narrow terminal."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
