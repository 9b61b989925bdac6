"""The paper's figures, each a function of a study's results; `FIGURES` lists them.

A function raises NothingToShow, with the reason, if the records lack what its figure needs.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis import escaping
from analysis.colours import colours, label
from analysis.comparison import Interval
from analysis.guards import INCIDENTAL, TIMING, is_under
from analysis.reference import load_reference
from analysis.results import ArmCost, Results
from analysis.runs import Currency, Curve, RecordedRun, flatten
from analysis.sensitivity import REFRESH, comparable_runs
from analysis.trials import Study
from analysis.wallclock import TRAINING_KINDS
from data.files import write_atomically
from training.records import RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


class NothingToShow(ValueError):
    """The records lack what a figure needs."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of the path's suffix (.png, .svg, .pdf).

    Raises:
        RecordError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png", metadata=_reproducible(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written: {error.strerror or error}; free space, or name another file"
        ) from error
    return path


def validation_curves(results: Results) -> Figure:
    """Validation loss over steps at the longest horizon, one panel per model: mean and range over seeds."""
    study = results.study
    models = [model for model in study.models if study.endpoints(study.baseline, model)]
    if not models:
        raise NothingToShow("no reported runs of the baseline")
    figure, panels = _panels(len(models))
    palette = colours(study.arm_names())
    for axis, model in zip(panels, models, strict=True):
        found = curves_at(study, model, study.endpoints(study.baseline, model)[-1].horizon)
        for arm, curves in found.items():
            steps, losses = seed_curves(curves, "steps")
            low, high = np.nanmin(losses, axis=0), np.nanmax(losses, axis=0)
            axis.fill_between(steps, low, high, color=palette[arm], alpha=0.15, lw=0)
            axis.plot(steps, np.nanmean(losses, axis=0), color=palette[arm], linewidth=1.8, label=_label(arm))
        axis.set_ylim(*loss_limits(found, study.baseline))
        axis.set_xlim(left=0)
        axis.set_xlabel("training steps")
        axis.set_title(escaping.figure(model), fontsize=10)
        for published in load_reference().of(model):
            axis.axhline(published.loss, color=colours([published.arm])[published.arm], linewidth=0.8, linestyle=":")
            text, at = f"paper, {_label(published.arm)} {published.loss:.3f}", (0.99, published.loss)
            axis.annotate(text, at, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        dress(axis)
    panels[0].set_ylabel("validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def curves_at(study: Study, model: str, horizon: int) -> dict[str, list[Curve]]:
    """Return the evaluations of each arm's reported runs of one model and horizon."""
    found: dict[str, list[Curve]] = {}
    for arm in study.arm_names():
        runs = [run for run in study.runs(arm=arm, model=model) if run.horizon == horizon and len(run.evaluations)]
        if runs and np.isfinite(seed_curves([run.evaluations for run in runs], "steps")[1]).any():
            found[arm] = [run.evaluations for run in runs]
    return found


def loss_limits(found: Mapping[str, Sequence[Curve]], baseline: str) -> tuple[float, float]:
    """Return limits of the loss after the initial fall; an arm that rises far above the others may leave them."""
    lows, highs = [], {}
    for arm, curves in found.items():
        steps, losses = seed_curves(curves, "steps")
        late = losses[:, steps >= 0.1 * steps[-1]]
        if np.isfinite(late).any():
            lows.append(float(np.nanmin(late)))
            highs[arm] = float(np.nanmax(late))
    if not lows:
        return 0.0, 1.0
    low, high = min(lows), max(median_low(highs.values()), highs.get(baseline, -math.inf))
    return low - 0.06 * (high - low), high


def seed_curves(curves: Sequence[Curve], currency: Currency) -> tuple[Array, Array]:
    """Return (m,) the cost, averaged over seeds, and (n, m) the losses at common steps."""
    steps = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    index = [np.searchsorted(curve.steps, steps) for curve in curves]
    spent = np.mean([curve[currency][i] for curve, i in zip(curves, index, strict=True)], axis=0)
    losses = np.stack([curve["val_loss"][i] for curve, i in zip(curves, index, strict=True)])
    return spent, losses


def loss_against_tokens(results: Results) -> Figure:
    """Final loss of fully decayed runs against training tokens, per arm and model, with the baseline's curve."""
    study = results.study
    models = [model for model, fitted in results.baselines.items() if len(fitted.endpoints) > 1]
    if not models:
        raise NothingToShow("loss against tokens needs at least two horizons of the baseline")
    figure, panels = _panels(len(models), share_y=True)
    palette = colours(study.arm_names())
    # The baseline's losses set the scale: a diverging arm would flatten all others.
    scale = 1.05 * max(float(results.baselines[model].losses.max()) for model in models)
    ends = [end for end in results.endpoints() if end.model in models and study.arms[end.arm].role == "arm"]
    lowest = min(float(np.nanmin(end.losses)) for end in ends if not end.diverged)
    for axis, model in zip(panels, models, strict=True):
        fitted = results.baselines[model]
        x = np.linspace(fitted.log_tokens[0], fitted.log_tokens[-1], 100)
        if fitted.curve is not None:
            axis.plot(np.exp(x), fitted.curve.value(x), color=palette[study.baseline], linewidth=1.2)
        for arm in study.arm_names():
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            if not ends:
                continue
            means = np.array([end.mean for end in ends])
            reach = [means - [end.losses.min() for end in ends], [end.losses.max() for end in ends] - means]
            name = _label(arm) if means.max() <= scale else f"{_label(arm)} (up to {means.max():.1f}, off the scale)"
            tokens = [float(end.tokens.mean()) for end in ends]
            axis.errorbar(tokens, means, yerr=reach, fmt="o", color=palette[arm], label=name, markersize=4, capsize=2)
        axis.set_xscale("log")
        at = np.exp(fitted.log_tokens)
        axis.set_xticks(at, [f"{count / 1e6:,.3g}M" if count >= 1e5 else f"{count:,.0f}" for count in at], fontsize=8)
        axis.minorticks_off()
        tested = "" if fitted.self_test.passed else ": the curve fails its self-test" if fitted.curve else ": no curve"
        axis.set_title(escaping.figure(f"{model}{tested}"), fontsize=10)
        axis.set_xlabel("training tokens")
        dress(axis)
    panels[0].set_ylim(lowest - 0.05 * (scale - lowest), scale)
    panels[0].set_ylabel("final validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def final_differences(results: Results) -> Figure:
    """Final loss minus the baseline's at the same steps, paired by seed: seeds, mean and interval, per arm and horizon."""
    study = results.study
    models: dict[str, list[_Row]] = {}
    palette = colours(study.arm_names())
    for one in results.compared:
        if study.arms[one.endpoints.arm].role == "arm" and not isinstance(one.same, str):
            name = f"{label(one.same.arm)}, {one.same.horizon:,} steps"
            row = _Row(name, one.same.differences, one.same.interval, palette[one.same.arm])
            models.setdefault(one.same.model, []).append(row)
    if not models:
        raise NothingToShow("no arm and the baseline have finished runs at common steps and seeds")
    figure, panels = _panels(len(models), height=1.3 + 0.27 * max(map(len, models.values())))
    for axis, (model, rows) in zip(panels, models.items(), strict=True):
        _forest(axis, rows)
        axis.set_xlabel(f"final loss minus {_label(study.baseline)}'s (nats); to the right is worse", fontsize=8.5)
        axis.set_title(escaping.figure(f"{model}, {100 * results.level(model):.3g}% intervals"), fontsize=10)
    return figure


@dataclass(frozen=True)
class _Row:
    """Differences by seed with their interval."""

    name: str
    differences: Sequence[float] | Array
    interval: Interval | None
    colour: str

    @property
    def ends(self) -> tuple[float, float]:
        points = [*self.differences, *((self.interval.low, self.interval.high) if self.interval else ())]
        return min(points), max(points)


def _forest(axis: Axes, rows: Sequence[_Row]) -> None:
    """Draw differences with their intervals, one below the other.

    A row that reaches more than six times as far as the middle one does not set the scale: it is cut at the axis' ends,
    with arrows and its numbers.
    """
    reaches = [max(map(abs, row.ends)) for row in rows]
    kept = [row for row, reach in zip(rows, reaches, strict=True) if reach <= 6 * median_low(reaches)]
    low, high = min(0.0, *(row.ends[0] for row in kept)), max(0.0, *(row.ends[1] for row in kept))
    room = 0.05 * (high - low) or 0.01
    low, high = low - room, high + room
    axis.axvline(0.0, color="#888888", linewidth=1)
    for y, row in enumerate(reversed(rows)):
        mean, interval = float(np.mean(row.differences)), row.interval
        axis.plot(row.differences, [y] * len(row.differences), ".", color="#999999", zorder=2)
        axis.plot(mean, y, "D", color=row.colour, markersize=5, zorder=3)
        if interval is not None:
            axis.plot(
                np.clip([interval.low, interval.high], low, high), [y, y], color=row.colour, linewidth=1.8, zorder=1
            )
        if row not in kept:
            for end, beyond, marker in ((low, row.ends[0] < low, "<"), (high, row.ends[1] > high, ">")):
                if beyond:
                    axis.plot(end, y, marker, color=row.colour, markersize=7, clip_on=False, zorder=4)
            text = f"off the scale: {interval.text if interval else f'{mean:+.3f}'}"
            axis.annotate(
                text, (0.98, y + 0.12), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
            )
    axis.set_xlim(low, high)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [escaping.figure(row.name) for row in reversed(rows)], fontsize=8)
    dress(axis)


def sensitivity_grid(results: Results) -> Figure:
    """Final loss over (β2, γ), as in the paper's grid."""
    grid = results.grid
    if grid is None:
        raise NothingToShow("the sensitivity grid needs Sophia runs over at least two β2 and two γ, all else equal")
    gammas, betas, losses = grid.gammas, grid.betas, grid.losses
    figure, (axis,) = _panels(1, width=5.5, height=4.2)
    image = axis.imshow(losses, cmap="viridis_r", aspect="auto", origin="lower")
    middle = np.nanmean([np.nanmin(losses), np.nanmax(losses)])
    for row, column in np.ndindex(losses.shape):
        value = losses[row, column]
        text = f"{value:.3f}" if np.isfinite(value) else "–"
        axis.text(column, row, text, ha="center", va="center", color="black" if value < middle else "white", fontsize=9)
    axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axis.set_xlabel("β2")
    axis.set_ylabel("γ")
    axis.set_title(f"final validation loss (nats), {_group_title(grid.runs)}", fontsize=10)
    figure.colorbar(image, ax=axis)
    return figure


def hessian_interval(results: Results) -> Figure:
    """Final loss and seconds per step against k, the steps between curvature passes."""
    group = comparable_runs(results.study, REFRESH)
    by_k: dict[int, list[RecordedRun]] = {}
    for run in group:
        by_k.setdefault(int(run.config["optimizer"]["hessian_interval"]), []).append(run)
    if len(by_k) < 2:
        raise NothingToShow("the figure of k needs Sophia runs with at least two hessian_interval, all else equal")
    figure, (left, right) = _panels(2, height=3.8)
    ks = sorted(by_k)
    for axis, value, title in (
        (left, lambda run: run.final_val_loss, "final validation loss (nats)"),
        (right, lambda run: run.total("seconds") / max(run.total("steps"), 1), "seconds per step"),
    ):
        for k in ks:
            axis.plot([k] * len(by_k[k]), [value(run) for run in by_k[k]], ".", color="#999999")
        axis.plot(ks, [np.mean([value(run) for run in by_k[k]]) for k in ks], "o-", color="#c2342b")
        axis.set_xscale("log")
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_xlabel("k (steps between curvature passes)")
        axis.set_ylabel(title)
        dress(axis)
    left.set_title(_group_title(group), fontsize=10)
    return figure


def ablations(results: Results) -> Figure:
    """Each ablation's final loss minus its arm's, paired by seed: seeds, mean and 95% interval, exploratory."""
    shown = [one for one in results.ablations if one.interval is not None]
    if not shown:
        raise NothingToShow("no ablation arms with two finished seeds (role: ablation in the study file)")
    cells = {one: f"{label(one.of)}, {one.model}, {one.horizon:,} steps" for one in shown}
    single = len(set(cells.values())) == 1
    figure, (axis,) = _panels(1, width=9, height=1.4 + 0.27 * len(shown))
    names = [one.setting if single else f"{one.setting}  ({cells[one]})" for one in shown]
    _forest(
        axis, [_Row(name, one.differences, one.interval, "#c2342b") for name, one in zip(names, shown, strict=True)]
    )
    lost = [f"{one.arm} ({one.diverged} of {one.runs})" for one in results.ablations if one.diverged]
    title = [f"against {cells[shown[0]]}"] if single else []
    title += [f"diverged: {', '.join(lost)}"] if lost else []
    axis.set_title(escaping.figure("; ".join(title)), fontsize=9)
    axis.set_xlabel("final loss minus the arm's (nats); right is worse", fontsize=8.5)
    return figure


def unclipped_fraction(results: Results) -> Figure:
    """Share of coordinates that Sophia does not clip, over training; the advice is to keep it between 0.1 and 0.5."""
    study = results.study
    runs = [
        (trial.arm, trial.run)
        for trial in study.reporting
        if trial.run is not None
        and study.arms[trial.arm].role == "arm"
        and len(trial.run.training)
        and np.isfinite(trial.run.training["unclipped_fraction"]).any()
    ]
    if not runs:
        raise NothingToShow("no run recorded an unclipped_fraction: only Sophia's do")
    figure, (axis,) = _panels(1, width=7)
    palette = colours(dict.fromkeys(arm for arm, _ in runs))
    low, high = load_reference().claims["unclipped_fraction"]
    axis.axhspan(low, high, color="#e8f2e8", zorder=0)
    axis.annotate("the authors' advice", (0.01, high), xycoords=("axes fraction", "data"), va="top", fontsize=8)
    for arm, run in runs:
        share = run.training.steps / run.horizon
        axis.plot(share, run.training["unclipped_fraction"], color=palette[arm], linewidth=0.9, alpha=0.7)
    for arm in palette:
        axis.plot([], [], color=palette[arm], label=_label(arm))
    axis.set_xlabel("share of the run")
    axis.set_ylabel("unclipped fraction")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    dress(axis)
    return figure


def clipped_gradient_norms(results: Results) -> Figure:
    """Share of steps whose gradient norm was clipped, per arm: frequent clipping is a sign of instability."""
    costs = [cost for cost in results.costs if math.isfinite(cost.clipped_norm_share)]
    if not costs:
        raise NothingToShow("no train lines with clipped_norm in the records")
    figure, panels = _bar_panels(costs)
    palette = colours(cost.arm for cost in costs)
    for axis, own in panels:
        axis.barh(
            [_label(c.arm) for c in own], [c.clipped_norm_share for c in own], color=[palette[c.arm] for c in own]
        )
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of steps with a clipped gradient norm")
    return figure


def hessian_histogram(results: Results) -> Figure:
    """Positive entries of the diagonal Hessian by decade, at the last refresh of a Sophia run: in total and by kind."""
    study = results.study
    runs = [
        run for arm in study.arm_names() for run in study.runs(arm=arm) if "hessian_interval" in run.config["optimizer"]
    ]
    for run in sorted(runs, key=lambda run: -run.horizon):
        last = run.last_refresh
        if last is not None and "histogram" in last:
            break
    else:
        raise NothingToShow("no run recorded a Hessian histogram: only methods with a curvature pass do")
    figure, (axis,) = _panels(1, width=7)
    decades = last["decades"]
    edges = [decades[0] - 1, *decades, decades[-1] + 1]
    kinds = {"all parameters": last, **last.get("by_kind", {})}
    for index, (kind, described) in enumerate(kinds.items()):
        counts = np.asarray(described["histogram"], dtype=float)
        share = counts / max(counts.sum(), 1)
        if index == 0:
            axis.stairs(share, edges, fill=True, color="#d9d9d9", label=kind)
        else:
            axis.stairs(share, edges, linewidth=1.5, label=escaping.figure(kind))
    axis.set_xlabel("log10 of the Hessian entry (outermost bins: everything beyond)")
    axis.set_ylabel("share of positive entries")
    positive = f"{last.get('positive_fraction', math.nan):.1%} of entries are positive"
    axis.set_title(escaping.figure(f"{run.name}, step {last['step']:,}; {positive}"), fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    dress(axis)
    return figure


def step_times(results: Results) -> Figure:
    """Seconds per step by kind of work, per arm, including curvature passes."""
    costs = [cost for cost in results.costs if math.isfinite(cost.seconds_per_step)]
    if not costs:
        raise NothingToShow("no run with a ledger in the records")
    figure, panels = _bar_panels(costs)
    shades = dict(zip(TRAINING_KINDS, ("#9db7d6", "#c2342b", "#e0b45c", "#bdbdbd"), strict=True))
    for axis, own in panels:
        left = np.zeros(len(own))
        for kind in TRAINING_KINDS:
            width = np.array([cost.seconds_by_kind.get(kind, 0.0) for cost in own])
            axis.barh(
                [_label(cost.arm) for cost in own], width, left=left, color=shades[kind], label=kind.replace("_", "-")
            )
            left += width
        axis.set_xlabel("seconds per step")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure


def learning_rate_stability(results: Results) -> Figure:
    """Final loss against the learning rate, with and without the attention trick; diverged runs are at the top."""
    series = {
        key: points for key, points in _losses_by_rate(results.study).items() if len(points) >= 3
    }  # (optimizer, cell, trick) -> rate -> best loss
    if not series:
        raise NothingToShow("stability against the learning rate needs an arm with at least three learning rates")
    arms_in = Counter(cell for _, cell, _ in series)
    cells = [cell for cell in arms_in if arms_in[cell] == max(arms_in.values())][-3:]
    figure, panels = _panels(len(cells), height=3.8)
    palette = colours(arm for arm, _, _ in series)
    for axis, cell in zip(panels, cells, strict=True):
        for (arm, where, trick), points in series.items():
            if where != cell:
                continue
            rates, best = list(points), list(points.values())
            name = f"{_label(arm)}{', attention trick' if trick else ''}"
            axis.plot(rates, best, "o--" if trick else "o-", color=palette[arm], label=name, markersize=4)
            lost = [rate for rate, loss in points.items() if not np.isfinite(loss)]
            axis.plot(lost, [0.97] * len(lost), "x", color=palette[arm], transform=axis.get_xaxis_transform())
        axis.set_xscale("log")
        ticks: list[float] = []
        tried = sorted({rate for (_, where, _), points in series.items() if where == cell for rate in points})
        for rate in tried:
            if not ticks or rate > ticks[-1] * (tried[-1] / tried[0]) ** (1 / 12):  # leave room for a label
                ticks.append(rate)
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel("peak learning rate (×: every run diverged)")
        axis.set_title(escaping.figure(cell), fontsize=9)
        dress(axis)
    panels[0].set_ylabel("best final validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


FIGURES: Mapping[str, Callable[[Results], Figure]] = {
    "curves": validation_curves,
    "differences": final_differences,
    "tokens": loss_against_tokens,
    "grid": sensitivity_grid,
    "interval": hessian_interval,
    "ablations": ablations,
    "unclipped": unclipped_fraction,
    "norms": clipped_gradient_norms,
    "hessian": hessian_histogram,
    "times": step_times,
    "stability": learning_rate_stability,
}


def _label(arm: str) -> str:
    return escaping.figure(label(arm))


def _panels(
    count: int, *, width: float | None = None, height: float = 4.2, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or min(6.2 * count, 16), height), dpi=150, layout="constrained")
    grid = figure.subplots(1, count, squeeze=False, sharey=share_y)
    return figure, list(grid[0])


def _bar_panels(costs: Sequence[ArmCost]) -> tuple[Figure, list[tuple[Axes, list[ArmCost]]]]:
    """Create a panel per model with room for a bar per arm; all bars have the same height."""
    models: dict[str, list[ArmCost]] = {}
    for cost in costs:
        models.setdefault(cost.model, []).append(cost)
    bars = max(map(len, models.values()))
    figure, panels = _panels(len(models), height=max(2.6, 1.2 + 0.2 * bars))
    for axis, model in zip(panels, models, strict=True):
        axis.set_ylim(bars - 0.4, -0.6)
        axis.set_title(escaping.figure(model), fontsize=10)
        axis.tick_params(labelsize=8)
        dress(axis)
    return figure, list(zip(panels, models.values(), strict=True))


def dress(axis: Axes) -> None:
    """Give an axis the look of all figures."""
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _losses_by_rate(study: Study) -> dict[tuple[str, str, bool], dict[float, float]]:
    """Return final loss by ascending learning rate, for each (optimizer, model and horizon, attention trick).

    Each loss is the best setting's mean over seeds, NaN if all diverged. Tuning runs are preferred, because reported runs
    have a single rate. Ablations count only if they vary the rate or the trick.
    """
    trick = "model.attention_layer_scaling"
    losses: dict[tuple[str, str, bool, str], dict[float, dict[str, list[float]]]] = {}
    for trial in study.trials:
        run, arm = trial.run, study.arms[trial.arm]
        if run is None or trial.status not in ("completed", "diverged"):
            continue
        if arm.role == "ablation" and not set(arm.varies) <= {"optimizer.lr", trick}:
            continue
        values = flatten(run.config)
        own = {
            key: value for key, value in values.items() if not is_under(key, (*INCIDENTAL, *TIMING, "seed", "seeds"))
        }
        if "optimizer.lr" not in own:
            continue
        rate = float(own.pop("optimizer.lr"))
        key = (run.optimizer, f"{trial.model}, {trial.horizon:,} steps", bool(values.get(trick, False)), trial.phase)
        losses.setdefault(key, {}).setdefault(rate, {}).setdefault(repr(own), []).append(trial.loss)
    best: dict[tuple[str, str, bool], dict[float, float]] = {}
    for (optimizer, cell, with_trick, phase), by_rate in losses.items():
        if phase == "reporting" and (optimizer, cell, with_trick, "tuning") in losses:
            continue
        means = {rate: [float(np.mean(one)) for one in by_rate[rate].values()] for rate in sorted(by_rate)}
        best[optimizer, cell, with_trick] = {
            rate: min((loss for loss in found if math.isfinite(loss)), default=math.nan)
            for rate, found in means.items()
        }
    return best


def _group_title(group: Sequence[RecordedRun]) -> str:
    first = group[0]
    seeds = len({run.seed for run in group})
    return escaping.figure(
        f"{label(first.optimizer)}, {first.model}, {first.horizon:,} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    )


def _reproducible(path: Path) -> dict[str, Any]:
    """Return metadata without the date, so that the same records give the same bytes."""
    return {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
