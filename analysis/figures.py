"""The paper's figures, each a function of a study's results; `FIGURES` lists them.

A function raises NothingToShow, with the reason, if the records lack what its figure needs.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis import escaping
from analysis.colours import colours, label
from analysis.guards import INCIDENTAL, TIMING, is_under
from analysis.reference import load_reference
from analysis.results import CLAIM_NAMES, CURRENCY_NAMES, ArmCost, Results, model_sizes
from analysis.runs import Currency, Curve, RecordedRun, flatten
from analysis.scaling import ScalingLaw
from analysis.sensitivity import REFRESH, comparable_runs
from analysis.speedup import Endpoints
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
    figure, panels = _panels(len(models), height=4.2)
    for axis, model in zip(panels, models, strict=True):
        draw_curves(axis, study, model, "steps")
        axis.set_title(escaping.figure(model), fontsize=10)
        for published in load_reference().of(model):
            axis.axhline(published.loss, color=colours([published.arm])[published.arm], linewidth=0.8, linestyle=":")
            axis.annotate(
                f"paper, {_label(published.arm)} {published.loss:.3f}",
                (0.99, published.loss),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color="#555555",
            )
    panels[0].set_ylabel("validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def draw_curves(axis: Axes, study: Study, model: str, currency: Currency) -> None:
    """Draw each arm's curves at the baseline's longest horizon on one model."""
    horizon = study.endpoints(study.baseline, model)[-1].horizon
    arms = [arm for arm in study.arm_names() if any(r.horizon == horizon for r in study.runs(arm=arm, model=model))]
    palette = colours(study.arm_names())
    finals = []
    for arm in arms:
        runs = [run for run in study.runs(arm=arm, model=model) if run.horizon == horizon and len(run.evaluations)]
        x, losses = seed_curves([run.evaluations for run in runs], currency)
        axis.fill_between(x, np.nanmin(losses, axis=0), np.nanmax(losses, axis=0), color=palette[arm], alpha=0.15, lw=0)
        axis.plot(x, np.nanmean(losses, axis=0), color=palette[arm], linewidth=1.8, label=_label(arm))
        late = losses[:, x >= 0.1 * x[-1]]
        finals.append((np.nanmin(late), np.nanmax(late)))
    low, high = min(one for one, _ in finals), sorted(one for _, one in finals)[len(finals) // 2]
    axis.set_ylim(low - 0.05 * (high - low), high)
    axis.set_xlim(left=0)
    axis.set_xlabel(_axis_title(currency))
    _dress(axis)


def seed_curves(curves: Sequence[Curve], currency: Currency) -> tuple[Array, Array]:
    """Return (m,) the cost, averaged over seeds, and (n, m) the losses at common steps."""
    steps = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    index = [np.searchsorted(curve.steps, steps) for curve in curves]
    spent = np.mean([curve.axis(currency)[i] for curve, i in zip(curves, index, strict=True)], axis=0)
    losses = np.stack([curve["val_loss"][i] for curve, i in zip(curves, index, strict=True)])
    return spent, losses


def loss_against_size(results: Results) -> Figure:
    """Final loss against parameters, per arm, at the longest horizon of each model, with the paper's points."""
    study, sizes = results.study, model_sizes(results.study)
    if len([model for model in study.models if model in sizes]) < 2:
        raise NothingToShow("loss against size needs reported runs of at least two models")
    figure, (axis,) = _panels(1, width=6.5)
    palette = colours(study.arm_names())
    laws = {law.arm: law for law in results.size_laws}
    for arm in study.arm_names():
        points = [
            (sizes[model], ends[-1])
            for model in study.models
            if model in sizes and (ends := [e for e in study.endpoints(arm, model) if not e.diverged])
        ]
        _draw_points(axis, [size for size, _ in points], [end for _, end in points], palette[arm], _label(arm))
        if arm in laws:
            _draw_law(axis, laws[arm], palette[arm])
    axis.set_xscale("log")
    axis.set_xlabel("parameters")
    axis.set_ylabel("final validation loss (nats)")
    axis.legend(frameon=False, fontsize=8)
    _dress(axis)
    return figure


def loss_against_tokens(results: Results) -> Figure:
    """Final loss of fully decayed runs against training tokens, per arm and model, with the baseline's curve and band."""
    study = results.study
    models = list(results.baselines)
    if not models or all(len(results.baselines[model].endpoints) < 2 for model in models):
        raise NothingToShow("loss against tokens needs at least two horizons of the baseline")
    figure, panels = _panels(len(models), height=4.2, share_y=True)
    palette = colours(study.arm_names())
    # The baseline's losses set the scale: a diverging arm would flatten all others.
    ends_of_baseline = [end for model in models for end in study.endpoints(study.baseline, model) if not end.diverged]
    scale = 1.05 * max(float(end.losses.max()) for end in ends_of_baseline)
    for axis, model in zip(panels, models, strict=True):
        curve = results.baselines[model].curve
        x = np.linspace(*results.baselines[model].range, 100)
        axis.plot(np.exp(x), curve.value(x), color=palette[study.baseline], linewidth=1.2)
        name = f"{study.baseline} on {model}" if len(study.models) > 1 else study.baseline
        for law in results.token_laws:
            if law.arm == name:
                _, low, high = law.band(np.exp(x))
                axis.fill_between(np.exp(x), low, high, color=palette[study.baseline], alpha=0.15, lw=0)
        for arm in study.arm_names():
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            worst = max((float(end.losses.mean()) for end in ends), default=0.0)
            name = _label(arm) if worst <= scale else f"{_label(arm)} (up to {worst:.1f}, off the scale)"
            _draw_points(axis, [float(end.tokens.mean()) for end in ends], ends, palette[arm], name, line=False)
        if axis.get_ylim()[1] > scale:
            axis.set_ylim(top=scale)
        axis.set_xscale("log")
        _ticks_at(axis, [float(end.tokens.mean()) for end in study.endpoints(study.baseline, model)], _millions)
        axis.set_title(escaping.figure(f"{model} ({curve.method})"), fontsize=10)
        axis.set_xlabel("training tokens")
        _dress(axis)
    panels[0].set_ylabel("final validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def speed_up_intervals(results: Results) -> Figure:
    """Each arm's speed-up with its interval, per currency, against 1 and 2."""
    chosen: dict[tuple[str, str, Currency], Any] = {}
    for one in results.headlines:
        chosen[one.model, one.arm, one.currency] = one.speed_up
    shown = {key: one for key, one in chosen.items() if math.isfinite(one.estimate)}
    if not shown:
        raise NothingToShow("no arm has a speed-up: an arm and the baseline need finished runs at common seeds")
    models = list(dict.fromkeys(model for model, _, _ in shown))
    rows = max(sum(1 for key in shown if key[0] == model) for model in models)
    figure, panels = _panels(len(models), height=1.3 + 0.27 * rows)
    palette = colours(results.study.arm_names())
    for axis, model in zip(panels, models, strict=True):
        members = [(key, one) for key, one in shown.items() if key[0] == model]
        axis.axvline(1.0, color="#888888", linewidth=1)
        axis.axvline(2.0, color="#888888", linewidth=1, linestyle="--")
        names = []
        for row, ((_, arm, currency), one) in enumerate(members):
            y = rows - row
            axis.plot([one.low, one.high], [y, y], color=palette[arm], linewidth=2, solid_capstyle="butt")
            for end, censored, marker in ((one.low, one.low_censored, "<"), (one.high, one.high_censored, ">")):
                axis.plot(end, y, marker if censored else "|", color=palette[arm], markersize=6 if censored else 8)
            axis.plot(one.estimate, y, "o", color=palette[arm], markersize=5)
            names.append((y, f"{_label(arm)}, {CLAIM_NAMES[currency]}"))
        axis.set_yticks([y for y, _ in names], [name for _, name in names], fontsize=8)
        axis.set_xscale("log")
        axis.set_ylim(0.4, rows + 0.6)
        _plain_ratios(axis, [(one.low, one.high) for _, one in members])
        axis.set_xlabel(
            f"speed-up against {_label(results.study.baseline)} (1: none, 2: the paper's claim)", fontsize=8.5
        )
        axis.set_title(escaping.figure(model), fontsize=10)
        _dress(axis)
    return figure


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
        _dress(axis)
    left.set_title(_group_title(group), fontsize=10)
    return figure


def ablations(results: Results) -> Figure:
    """Each ablation's final loss minus its arm's, paired by seed: seeds, mean and interval."""
    rows = [one for one in results.ablations if one.differences]
    lost = [one for one in results.ablations if one.diverged]
    if not rows and not lost:
        raise NothingToShow("no ablation arms with finished runs (role: ablation in the study file)")
    shown = [*rows, *lost]
    figure, (axis,) = _panels(1, width=8, height=1.4 + 0.3 * len(shown))
    axis.axvline(0.0, color="#888888", linewidth=1)
    for row, one in enumerate(reversed(shown)):
        if one.diverged:
            axis.annotate(
                f"{one.diverged} of {one.runs} diverged", (0.98, row), xycoords=("axes fraction", "data"), ha="right",
                va="center", fontsize=8,
            )  # fmt: skip
            continue
        axis.plot(one.differences, [row] * len(one.differences), ".", color="#999999", zorder=2)
        interval = one.interval
        if interval is not None:
            axis.plot([interval.low, interval.high], [row, row], color="#c2342b", linewidth=1.6, zorder=1)
        axis.plot(float(np.mean(one.differences)), row, "D", color="#c2342b", markersize=5, zorder=3)
    cells = dict.fromkeys(f"{label(one.of)}, {one.model}, {one.horizon:,} steps" for one in shown)
    names = [one.setting for one in shown]
    if len(cells) == 1:
        axis.set_title(escaping.figure(f"against {next(iter(cells))}"), fontsize=9)
    else:
        names = [f"{one.setting}  ({label(one.of)}, {one.model}, {one.horizon:,})" for one in shown]
    names.reverse()
    axis.set_yticks(range(len(shown)), list(map(escaping.figure, names)), fontsize=8)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel("final loss minus the arm's (nats); to the right is worse", fontsize=8.5)
    _dress(axis)
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
    _dress(axis)
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
    _dress(axis)
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
        _dress(axis)
    panels[0].set_ylabel("best final validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def momentum_against_horizon(results: Results) -> Figure:
    """The best β1 found by the search, against the horizon."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for search in results.tunings:
        run = search.best.trials[0].run
        if run is None:
            continue
        optimizer = run.config["optimizer"]
        # For Muon, the momentum of the hidden matrices; its betas are AdamW's.
        if "momentum" in optimizer:
            key, best = "momentum", optimizer["momentum"]
        elif "betas" in optimizer:
            key, best = "betas[0]", optimizer["betas"][0]
        else:
            continue
        if len({repr(c.values.get(f"optimizer.{key}")) for c in search.candidates}) > 1:
            found.setdefault((search.arm, search.model), []).append((search.horizon, float(best)))
    if not found:
        raise NothingToShow("no search over optimizer.betas[0]")
    figure, (axis,) = _panels(1, width=6.5)
    palette = colours(arm for arm, _ in found)
    styles = dict(zip(dict.fromkeys(model for _, model in found), ("-", "--", ":", "-."), strict=False))
    for place, ((arm, model), points) in enumerate(found.items()):
        horizons, best = zip(*sorted(points), strict=True)
        beside = 1.01 ** (place - (len(found) - 1) / 2)  # offset arms with the same optimum
        axis.plot(
            [horizon * beside for horizon in horizons],
            best,
            "o",
            linestyle=styles[model],
            color=palette[arm],
            label=f"{_label(arm)}, {escaping.figure(model)}",
        )
    axis.set_xscale("log")
    _ticks_at(axis, sorted({horizon for points in found.values() for horizon, _ in points}), "{:,.0f}".format)
    axis.set_xlabel("horizon (steps)")
    axis.set_ylabel("best β1")
    axis.legend(frameon=False, fontsize=8)
    _dress(axis)
    return figure


FIGURES: Mapping[str, Callable[[Results], Figure]] = {
    "curves": validation_curves,
    "speedups": speed_up_intervals,
    "tokens": loss_against_tokens,
    "size": loss_against_size,
    "grid": sensitivity_grid,
    "interval": hessian_interval,
    "ablations": ablations,
    "unclipped": unclipped_fraction,
    "norms": clipped_gradient_norms,
    "hessian": hessian_histogram,
    "times": step_times,
    "stability": learning_rate_stability,
    "momentum": momentum_against_horizon,
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
        _dress(axis)
    return figure, list(zip(panels, models.values(), strict=True))


def _dress(axis: Axes) -> None:
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_points(
    axis: Axes, x: Sequence[float], ends: Sequence[Endpoints], colour: str, name: str, *, line: bool = True
) -> None:
    """Draw means over seeds with their range."""
    if not ends:
        return
    means = [float(end.losses.mean()) for end in ends]
    below = [mean - float(end.losses.min()) for mean, end in zip(means, ends, strict=True)]
    above = [float(end.losses.max()) - mean for mean, end in zip(means, ends, strict=True)]
    style = "o-" if line else "o"
    axis.errorbar(
        x, means, yerr=[below, above], fmt=style, color=colour, label=name, markersize=4, linewidth=1, capsize=2
    )


def _draw_law(axis: Axes, law: ScalingLaw, colour: str) -> None:
    x = np.geomspace(law.values[0], law.values[-1], 100)
    value, low, high = law.band(x)
    axis.plot(x, value, color=colour, linewidth=1)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _axis_title(currency: Currency) -> str:
    titles = {
        "steps": "training steps",
        "tokens": "training tokens",
        "flops": "model FLOPs",
        "seconds": "training seconds",
    }
    return titles.get(currency, CURRENCY_NAMES[currency])


def _ticks_at(axis: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Put the ticks of a logarithmic axis at the measured values."""
    axis.set_xticks(values, [text(value) for value in values], fontsize=8)
    axis.minorticks_off()


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3g}M" if count >= 1e5 else f"{count:,.0f}"


def _plain_ratios(axis: Axes, spans: Sequence[tuple[float, float]]) -> None:
    """Give a logarithmic axis of ratios round ticks that include 1 and 2."""
    low, high = min(0.8, *(low for low, _ in spans)), max(2.2, *(high for _, high in spans))
    ticks = [
        t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 16) if low * 0.98 <= t <= high * 1.02
    ]
    axis.set_xlim(low * 0.97, high * 1.03)
    _ticks_at(axis, ticks, "{:g}".format)


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
