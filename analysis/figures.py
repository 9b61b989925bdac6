"""The paper's figures, each a function of a study's results; `FIGURES` lists them.

A function raises NothingToShow, with the reason, if the records lack what its figure needs.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import pandas as pd

from analysis import escaping
from analysis.colours import colours, label
from analysis.comparison import Array, Contrast, Interval
from analysis.reference import load_reference
from analysis.results import ArmCost, Results
from analysis.runs import Currency, Curve, RecordedRun
from analysis.sensitivity import REFRESH, comparable_runs, settings
from analysis.trials import Study
from analysis.wallclock import TRAINING_KINDS
from data.files import write_atomically
from training.records import RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class NothingToShow(ValueError):
    """The records lack what a figure needs."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of the path's suffix (.png, .svg, .pdf).

    Raises:
        RecordError: the file cannot be written.
    """
    content = io.BytesIO()
    # Without a date, so that the same records give the same bytes.
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png", metadata=undated)
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
    figure, axes = panels(models, "training steps", "validation loss (nats)")
    palette = colours(study.arm_names())
    for axis, model in zip(axes, models, strict=True):
        horizon = study.endpoints(study.baseline, model)[-1].horizon
        found = curves_at(study, model, horizon)
        for arm, curves in found.items():
            steps, losses = seed_curves(curves, "steps")
            name = _label(arm) + diverged_note(study, arm, model, horizon)
            low, high = np.nanmin(losses, axis=0), np.nanmax(losses, axis=0)
            axis.fill_between(steps, low, high, color=palette[arm], alpha=0.15, lw=0)
            axis.plot(steps, np.nanmean(losses, axis=0), color=palette[arm], linewidth=1.8, label=name)
        axis.set_ylim(*loss_limits(found, study.baseline))
        axis.set_xlim(left=0)
        low, high = axis.get_ylim()
        for published in load_reference().of(model):
            if not low <= published.loss <= high:  # a note outside the axis would take the room of the curves
                continue
            axis.axhline(published.loss, color=colours([published.arm])[published.arm], linewidth=0.8, linestyle=":")
            _note(axis, f"paper, {label(published.arm)} {published.loss:.3f}", 0.99, published.loss)
    _legend(axes[0])
    return figure


def curves_at(study: Study, model: str, horizon: int) -> dict[str, list[Curve]]:
    """Return the evaluations of each arm's reported runs of one model and horizon: of those that completed, if any did."""
    found: dict[str, list[Curve]] = {}
    for arm in study.arm_names():
        runs = [run for run in study.runs(arm=arm, model=model) if run.horizon == horizon and len(run.evaluations)]
        by_status = {status: [run for run in runs if run.status == status] for status in ("completed", "diverged")}
        runs = by_status["completed"] or by_status["diverged"] or runs
        if runs and np.isfinite(seed_curves([run.evaluations for run in runs], "steps")[1]).any():
            found[arm] = [run.evaluations for run in runs]
    return found


def diverged_note(study: Study, arm: str, model: str, horizon: int) -> str:
    """Return " (1 of 3 diverged)" for the label of an arm's curve, or nothing."""
    end = next((one for one in study.endpoints(arm, model) if one.horizon == horizon), None)
    return f" ({len(end.diverged)} of {len(end.seeds)} diverged)" if end and end.diverged else ""


def loss_limits(found: Mapping[str, Sequence[Curve]], baseline: str) -> tuple[float, float]:
    """Return limits of the loss after the initial fall; an arm that rises far above the others may leave them."""
    late = {}
    for arm, curves in found.items():
        steps, losses = seed_curves(curves, "steps")
        after = losses[:, steps >= 0.1 * steps[-1]]
        if np.isfinite(after).any():
            late[arm] = float(np.nanmin(after)), float(np.nanmax(after))
    if not late:
        return 0.0, 1.0
    low = min(low for low, _ in late.values())
    high = median_low(high for _, high in late.values())
    if baseline in late:
        high = max(high, late[baseline][1])
    spread = (high - low) or 0.1  # runs of a few steps may have one point
    return low - 0.06 * spread, low + spread


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
    fits = {model: fitted for model, fitted in results.baselines.items() if len(fitted.endpoints) > 1}
    if not fits:
        raise NothingToShow("loss against tokens needs at least two horizons of the baseline")
    titles = []
    for model, fitted in fits.items():
        tested = "" if fitted.self_test.passed else ": the curve fails its self-test" if fitted.curve else ": no curve"
        titles.append(f"{model}{tested}")
    figure, axes = panels(titles, "training tokens", "final validation loss (nats)", share_y=True)
    palette = colours(study.arm_names())
    # The baseline's losses set the scale: a diverging arm would flatten all others.
    scale = 1.05 * max(float(end.losses.max()) for fitted in fits.values() for end in fitted.endpoints)
    lowest = math.inf
    for axis, (model, fitted) in zip(axes, fits.items(), strict=True):
        x = np.linspace(fitted.log_tokens[0], fitted.log_tokens[-1], 100)
        if fitted.curve is not None:
            axis.plot(np.exp(x), fitted.curve.value(x), color=palette[study.baseline], linewidth=1.2)
        for arm in study.arm_names():
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            if not ends:
                continue
            lows, means, highs = np.array([(end.losses.min(), end.mean, end.losses.max()) for end in ends]).T
            lowest = min(lowest, lows.min())
            name = _label(arm) if means.max() <= scale else f"{_label(arm)} (up to {means.max():.1f}, off the scale)"
            look: dict[str, Any] = {"fmt": "o", "color": palette[arm], "markersize": 4, "capsize": 2}
            tokens = [end.tokens.mean() for end in ends]
            axis.errorbar(tokens, means, yerr=[means - lows, highs - means], label=name, **look)
        at = np.exp(fitted.log_tokens)
        _log_ticks(axis, at, [f"{count / 1e6:,.3g}M" if count >= 1e5 else f"{count:,.0f}" for count in at], fontsize=8)
    axes[0].set_ylim(lowest - 0.05 * (scale - lowest), scale)
    _legend(axes[0])
    return figure


def final_differences(results: Results) -> Figure:
    """Final loss minus the baseline's, after the same and after half the steps: seeds, mean and interval of each arm."""
    study = results.study
    palette = colours(study.arm_names())
    models: dict[str, list[_Row]] = {}
    for one in results.compared:
        for found in (one.same, one.half) if study.arms[one.endpoints.arm].role == "arm" else ():
            if isinstance(found, Contrast):
                against = f" against {found.baseline_horizon:,}" if found is one.half else ""
                name = f"{label(found.arm)}, {found.horizon:,}{against} steps"
                models.setdefault(found.model, []).append((name, found, palette[found.arm]))
    if not models:
        raise NothingToShow("no arm and the baseline have finished runs at common steps and seeds")
    titles = [f"{model}, {study.level_text(model)} intervals" for model in models]
    figure, axes = panels(titles, height=1.3 + 0.27 * max(map(len, models.values())))
    for axis, rows in zip(axes, models.values(), strict=True):
        forest(axis, rows, f"final loss minus {_label(study.baseline)}'s (nats); to the right is worse")
    return figure


class _Paired(Protocol):
    @property
    def differences(self) -> Sequence[float] | Array: ...  # a seed each

    @property
    def interval(self) -> Interval | None: ...


_Row = tuple[str, _Paired, str]  # name, differences with their interval, colour


def forest(axis: Axes, rows: Sequence[_Row], xlabel: str) -> None:
    """Draw differences with their intervals, one below the other.

    A row that reaches more than six times as far as the middle one does not set the scale: it is cut at the axis' ends,
    with arrows and its numbers.
    """
    rows = rows[::-1]  # from the bottom
    points = [[*one.differences, *((i.low, i.high) if (i := one.interval) else ())] for _, one, _ in rows]
    ends = np.array([(min(own), max(own)) for own in points])
    reaches = np.abs(ends).max(axis=1)
    kept = reaches <= 6 * median_low(reaches)
    low, high = min(0.0, ends[kept, 0].min()), max(0.0, ends[kept, 1].max())
    room = 0.05 * (high - low) or 0.01
    low, high = low - room, high + room
    axis.axvline(0.0, color="#888888", linewidth=1)
    for y, (_, one, colour) in enumerate(rows):
        mean, interval = float(np.mean(one.differences)), one.interval
        axis.plot(one.differences, [y] * len(one.differences), ".", color="#999999", zorder=2)
        axis.plot(mean, y, "D", color=colour, markersize=5, zorder=3)
        if interval is not None:
            axis.plot(np.clip([interval.low, interval.high], low, high), [y, y], color=colour, linewidth=1.8, zorder=1)
        if not kept[y]:
            for end, beyond, marker in ((low, ends[y, 0] < low, "<"), (high, ends[y, 1] > high, ">")):
                if beyond:
                    axis.plot(end, y, marker, color=colour, markersize=7, clip_on=False, zorder=4)
            shown = interval.text if interval else f"{mean:+.3f}"
            _note(axis, f"off the scale: {shown}", 0.98, y + 0.12)
    axis.set_xlim(low, high)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [escaping.figure(name) for name, _, _ in rows], fontsize=8)
    axis.set_xlabel(xlabel, fontsize=8.5)


def sensitivity_grid(results: Results) -> Figure:
    """Final loss over (β2, γ), as in the paper's grid."""
    grid = results.grid
    if grid is None:
        raise NothingToShow("the sensitivity grid needs Sophia runs over at least two β2 and two γ, all else equal")
    title = f"final validation loss (nats), {_group_title(grid.runs)}"
    figure, (axis,) = panels([title], "β2", "γ", width=5.5)
    axis.grid(False)
    axis.spines[:].set_visible(True)
    image = axis.imshow(grid.losses, cmap="viridis_r", aspect="auto", origin="lower")
    middle = np.nanmean([np.nanmin(grid.losses), np.nanmax(grid.losses)])
    for (row, column), value in np.ndenumerate(grid.losses):
        text = f"{value:.3f}" if np.isfinite(value) else "–"
        axis.text(column, row, text, ha="center", va="center", color="black" if value < middle else "white", fontsize=9)
    axis.set_xticks(range(len(grid.betas)), [f"{beta:g}" for beta in grid.betas])
    axis.set_yticks(range(len(grid.gammas)), [f"{gamma:g}" for gamma in grid.gammas])
    figure.colorbar(image, ax=axis)
    return figure


def hessian_interval(results: Results) -> Figure:
    """Final loss and seconds per step against k, the steps between curvature passes."""
    group = comparable_runs(results.study, REFRESH)
    runs = pd.DataFrame(
        {
            "k": run.config["optimizer"]["hessian_interval"],
            "final validation loss (nats)": run.final_val_loss,
            "seconds per step": run.total("seconds") / max(run.total("steps"), 1),
        }
        for run in group
    )
    if runs.empty or runs["k"].nunique() < 2:
        raise NothingToShow("the figure of k needs Sophia runs with at least two hessian_interval, all else equal")
    figure, axes = panels([_group_title(group), ""], "k (steps between curvature passes)", height=3.8)
    means = runs.groupby("k").mean()
    for axis, measured in zip(axes, means.columns, strict=True):
        axis.plot(runs["k"], runs[measured], ".", color="#999999")
        axis.plot(means.index, means[measured], "o-", color="#c2342b")
        _log_ticks(axis, means.index, [str(k) for k in means.index])
        axis.set_ylabel(measured)
    return figure


def ablations(results: Results) -> Figure:
    """Each ablation's final loss minus its arm's, paired by seed: seeds, mean and 95% interval, exploratory."""
    shown = [one for one in results.ablations if one.interval is not None]
    if not shown:
        raise NothingToShow("no ablation arms with two finished seeds (role: ablation in the study file)")
    cells = [f"{label(one.of)}, {one.model}, {one.horizon:,} steps" for one in shown]
    single = len(set(cells)) == 1
    names = [one.setting if single else f"{one.setting}  ({cell})" for one, cell in zip(shown, cells, strict=True)]
    lost = [f"{one.arm} ({one.diverged} of {one.runs})" for one in results.ablations if one.diverged]
    title = [f"against {cells[0]}"] if single else []
    title += [f"diverged: {', '.join(lost)}"] if lost else []
    figure, (axis,) = panels(["; ".join(title)], width=9, height=1.4 + 0.27 * len(shown), fontsize=9)
    rows: list[_Row] = [(name, one, "#c2342b") for name, one in zip(names, shown, strict=True)]
    forest(axis, rows, "final loss minus the arm's (nats); right is worse")
    return figure


def unclipped_fraction(results: Results) -> Figure:
    """Share of coordinates that Sophia does not clip, over training; the advice is to keep it between 0.1 and 0.5."""
    arms = results.study.arm_names()
    reported = [(one.arm, one.run) for one in results.study.reporting if one.run is not None and one.arm in arms]
    found = [(arm, run) for arm, run in reported if np.isfinite(run.training["unclipped_fraction"]).any()]
    if not found:
        raise NothingToShow("no run recorded an unclipped_fraction: only Sophia's do")
    figure, (axis,) = panels([""], "share of the run", "unclipped fraction", width=7)
    low, high = load_reference().claims["unclipped_fraction"]
    axis.axhspan(low, high, color="#e8f2e8", zorder=0)
    axis.annotate("the authors' advice", (0.01, high), xycoords=("axes fraction", "data"), va="top", fontsize=8)
    palette = colours(arm for arm, _ in found)
    for arm, run in found:
        share = run.training.steps / run.horizon
        axis.plot(share, run.training["unclipped_fraction"], color=palette[arm], linewidth=0.9, alpha=0.7)
    for arm, colour in palette.items():
        axis.plot([], [], color=colour, label=_label(arm))
    axis.set_ylim(bottom=0)
    _legend(axis)
    return figure


def clipped_gradient_norms(results: Results) -> Figure:
    """Share of steps whose gradient norm was clipped, per arm: frequent clipping is a sign of instability."""
    costs = [cost for cost in results.costs if math.isfinite(cost.clipped_norm_share)]
    if not costs:
        raise NothingToShow("no train lines with clipped_norm in the records")
    palette = colours(cost.arm for cost in costs)
    figure, bars = _bar_panels(costs, "share of steps with a clipped gradient norm")
    for axis, names, own in bars:
        shares, shades = [cost.clipped_norm_share for cost in own], [palette[cost.arm] for cost in own]
        axis.barh(names, shares, color=shades)
        axis.set_xlim(0, 1)
    return figure


def hessian_histogram(results: Results) -> Figure:
    """Positive entries of the diagonal Hessian by decade, at the last refresh of a Sophia run: in total and by kind."""
    study = results.study
    found = [
        (run, run.last_refresh)
        for arm in study.arm_names()
        for run in study.runs(arm=arm)
        if "hessian_interval" in run.config["optimizer"] and "histogram" in (run.last_refresh or {})
    ]
    if not found:
        raise NothingToShow("no run recorded a Hessian histogram: only methods with a curvature pass do")
    run, last = max(found, key=lambda one: one[0].horizon)
    assert last is not None
    positive = f"{last.get('positive_fraction', math.nan):.1%} of entries are positive"
    figure, (axis,) = panels(
        [f"{run.name}, step {last['step']:,}; {positive}"],
        "log10 of the Hessian entry (outermost bins: everything beyond)",
        "share of positive entries",
        width=7,
        fontsize=9,
    )
    decades = last["decades"]
    edges = [decades[0] - 1, *decades, decades[-1] + 1]
    for kind, described in {"all parameters": last, **last.get("by_kind", {})}.items():
        counts = np.asarray(described["histogram"], dtype=float)
        look: dict[str, Any] = {"fill": True, "color": "#d9d9d9"} if described is last else {"linewidth": 1.5}
        axis.stairs(counts / max(counts.sum(), 1), edges, label=escaping.figure(kind), **look)
    _legend(axis)
    return figure


def step_times(results: Results) -> Figure:
    """Seconds per step by kind of work, per arm, including curvature passes."""
    costs = [cost for cost in results.costs if math.isfinite(cost.seconds_per_step)]
    if not costs:
        raise NothingToShow("no run with a ledger in the records")
    figure, bars = _bar_panels(costs, "seconds per step")
    for axis, names, own in bars:
        left = np.zeros(len(own))
        for kind, shade in zip(TRAINING_KINDS, ("#9db7d6", "#c2342b", "#e0b45c", "#bdbdbd"), strict=True):
            width = np.array([cost.seconds_by_kind.get(kind, 0.0) for cost in own])
            axis.barh(names, width, left=left, color=shade, label=kind.replace("_", "-"))
            left += width
    handles, kinds = bars[0][0].get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8)
    return figure


def learning_rate_stability(results: Results) -> Figure:
    """Final loss against the learning rate, all else equal, with and without the attention trick; × marks divergence."""
    series = {key: losses for key, losses in _losses_by_rate(results.study).items() if len(losses) >= 3}
    if not series:
        raise NothingToShow("stability against the learning rate needs an arm with at least three learning rates")
    arms_in = Counter(cell for _, cell, _ in series)
    cells = [cell for cell in arms_in if arms_in[cell] == max(arms_in.values())][-3:]
    xlabel, ylabel = "peak learning rate (×: every run diverged)", "final validation loss (nats)"
    figure, axes = panels(cells, xlabel, ylabel, height=3.8, fontsize=9)
    palette = colours(arm for arm, _, _ in series)
    for axis, cell in zip(axes, cells, strict=True):
        tried: set[float] = set()
        for (arm, where, trick), losses in series.items():
            if where != cell:
                continue
            tried |= {*losses.index}
            name = f"{_label(arm)}{', attention trick' if trick else ''}"
            axis.plot(
                losses.index, losses.to_numpy(), "o--" if trick else "o-", color=palette[arm], label=name, markersize=4
            )
            lost = losses.index[losses.isna()]
            axis.plot(lost, [0.97] * len(lost), "x", color=palette[arm], transform=axis.get_xaxis_transform())
        ticks = [min(tried)]
        for rate in sorted(tried):
            if rate > ticks[-1] * (max(tried) / min(tried)) ** (1 / 12):  # leave room for a label
                ticks.append(rate)
        _log_ticks(axis, ticks, [f"{tick:.2g}" for tick in ticks], fontsize=7)
    _legend(axes[0])
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


def panels(
    titles: Sequence[str],
    xlabel: str = "",
    ylabel: str = "",
    *,
    width: float | None = None,
    height: float = 4.2,
    share_y: bool = False,
    fontsize: float = 10,
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a panel for each title (as in the records, escaped here) in the look of all figures."""
    # The object interface instead of pyplot: no display, no global state, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or min(6.2 * len(titles), 16), height), dpi=150, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(titles), squeeze=False, sharey=share_y)[0])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(escaping.figure(title), fontsize=fontsize)
        axis.set_xlabel(xlabel)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def _bar_panels(costs: Sequence[ArmCost], xlabel: str) -> tuple[Figure, list[tuple[Axes, list[str], list[ArmCost]]]]:
    """Create a panel per model with room for a bar per arm, all of one height. Return each with its labels and costs."""
    models = [[cost for cost in costs if cost.model == model] for model in dict.fromkeys(one.model for one in costs)]
    bars = max(map(len, models))
    figure, axes = panels([own[0].model for own in models], xlabel, height=max(2.6, 1.2 + 0.2 * bars))
    for axis in axes:
        axis.set_ylim(bars - 0.4, -0.6)
        axis.tick_params(labelsize=8)
    return figure, [(axis, [_label(cost.arm) for cost in own], own) for axis, own in zip(axes, models, strict=True)]


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=8)


def _note(axis: Axes, text: str, x: float, y: float) -> None:
    """Write left of a share of the width, above a value of the y axis."""
    axis.annotate(
        escaping.figure(text), (x, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
    )


def _log_ticks(axis: Axes, at: Sequence[float] | Array | pd.Index[Any], names: Sequence[str], **look: Any) -> None:
    axis.set_xscale("log")
    axis.set_xticks(at, names, **look)
    axis.minorticks_off()


def _losses_by_rate(study: Study) -> dict[tuple[str, str, bool], pd.Series[float]]:
    """Return final loss by ascending learning rate, for each (arm, model and horizon, attention trick).

    Each loss is the mean over seeds of the setting that was tried at the most rates, NaN if all diverged. Tuning runs are
    preferred, because reported runs have a single rate. Ablations count only if they vary the rate or the trick.
    """
    rate, trick = "optimizer.lr", "model.attention_layer_scaling"
    rows = []
    for trial in study.trials:
        run, arm = trial.run, study.arms[trial.arm]
        if run is None or not trial.ended:
            continue
        if arm.role == "ablation" and not set(arm.varies) <= {rate, trick}:
            continue
        own = settings(run)
        if rate in own:
            owner = (arm.of or trial.arm) if study.planned else run.optimizer  # bare runs: each rate is an arm
            key = owner, f"{trial.model}, {trial.horizon:,} steps", bool(own.get(trick, False))
            rows.append((key, trial.phase, float(own.pop(rate)), repr(own), trial.loss))
    frame = pd.DataFrame(rows, columns=["series", "phase", "rate", "rest", "loss"])
    best = {}
    for series, group in frame.groupby("series", sort=False):
        phase = "tuning" if "tuning" in set(group["phase"]) else "reporting"
        of_phase = group[group["phase"] == phase]
        rates = of_phase.groupby("rest", sort=False)["rate"].nunique()
        seeds = of_phase[of_phase["rest"] == rates.idxmax()].groupby("rate")["loss"]
        best[series] = seeds.agg(lambda losses: losses.mean(skipna=False))
    return cast("dict[tuple[str, str, bool], pd.Series[float]]", best)


def _group_title(group: Sequence[RecordedRun]) -> str:
    first = group[0]
    seeds = len({run.seed for run in group})
    return f"{label(first.optimizer)}, {first.model}, {first.horizon:,} steps, {seeds} seed{'s' if seeds > 1 else ''}"
