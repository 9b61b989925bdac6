"""The tables of a report, as data for HTML, Markdown and the terminal. Every number links to its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import escaping
from analysis.colours import label
from analysis.reference import load_reference
from analysis.results import CLAIM_NAMES, CURRENCY_NAMES, Headline, Results, in_short
from analysis.runs import CURRENCIES, Currency, Origin
from analysis.speedup import CLAIM_CURRENCIES, THRESHOLDS, SpeedUp
from analysis.statistics import Interval

# (arm, model, horizon): identifies the runs behind a number.
CellKey = tuple[str, str, int]


@dataclass(frozen=True)
class Cell:
    """One entry: its text, its sort key, and its source runs."""

    text: str
    sort: float | str = ""
    source: CellKey | None = None
    tone: str = ""  # "supported", "not supported", "undecided", "serious": for colouring
    origin: Origin | None = None  # of one run


@dataclass(frozen=True)
class Table:
    """A titled table with a note. Numeric columns are right-aligned."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    numeric: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)


def verdict(results: Results) -> Table:
    """Return the speed-up and the verdict on both claims, per arm, model and currency."""
    chosen: dict[tuple[str, str, Currency], list[Headline]] = {}
    for one in results.headlines:
        chosen.setdefault((one.model, one.arm, one.currency), []).append(one)
    rows = []
    for (model, arm, currency), claims in chosen.items():
        at = claims[0].speed_up
        source = (arm, model, at.horizon)
        verdicts = [
            Cell(in_short(one.claim), one.claim.adjusted_p, source, tone=one.claim.verdict)
            for threshold in THRESHOLDS
            for one in claims
            if one.claim.threshold == threshold
        ]
        p = ", ".join(_p(one.claim.adjusted_p) for one in claims)
        rows.append(
            (
                Cell(model),
                Cell(label(arm)),
                Cell(CLAIM_NAMES[currency]),
                _ratio(at),
                *verdicts,
                Cell(p, claims[0].claim.adjusted_p, source),
                Cell(f"{at.horizon:,}", at.horizon, source),
                Cell(str(at.seeds), at.seeds, source),
            )
        )
    baseline = label(results.study.baseline)
    return Table(
        name="verdict",
        title=f"How much faster than {baseline}?",
        columns=(
            "model",
            "arm",
            "counted in",
            f"speed-up [{results.study.level:.0%} interval]",
            "faster at all (> 1)",
            "the paper's claim (≥ 2)",
            "p, corrected",
            "steps",
            "seeds",
        ),
        rows=tuple(rows),
        note=(
            f"A ratio of 1.25: the arm ends at {baseline}'s loss with 1/1.25 of what {baseline} spends, each decayed "
            "to the end of a schedule of its own. p-values are corrected (Holm) over all claims on a model. > and < "
            "mark what lies beyond the baseline's range of horizons. Undecided claims name the seeds with which the effect "
            "seen would be found four times in five."
        ),
        numeric=(3, 6, 7, 8),
    )


def final_losses(results: Results) -> Table:
    rows = []
    for one in results.finals:
        end = one.endpoints
        source = (end.arm, end.model, end.horizon)
        shown = f"{one.mean:.4f}" if math.isfinite(one.mean) else f"{len(end.diverged)} of {len(end.seeds)} diverged"
        rows.append(
            (
                Cell(end.model),
                Cell(label(end.arm)),
                Cell(f"{end.horizon:,}", end.horizon),
                Cell(shown, _sortable(one.mean), source),
                Cell(_loss(one.standard_deviation), _sortable(one.standard_deviation), source),
                _difference(one.difference, source),
                Cell(_p(one.p) if math.isfinite(one.p) else "", _sortable(one.p)),
                Cell(str(len(end.seeds)), len(end.seeds), source),
            )
        )
    baseline = label(results.study.baseline)
    return Table(
        name="final-losses",
        title="Final validation losses",
        columns=("model", "arm", "steps", "loss (nats)", "sd", f"minus {baseline} [interval]", "p", "seeds"),
        rows=tuple(rows),
        note=(
            f"Means over seeds at the ends of fully decayed runs. Differences are paired by seed with {baseline} at "
            "the same number of steps; below zero is better. These p-values are not corrected, the verdict's are."
        ),
        numeric=(2, 3, 4, 5, 6, 7),
    )


def end_of_runs(results: Results) -> Table:
    baseline = label(results.study.baseline)
    rows = []
    for one in results.ends:
        source = (one.arm, one.model, one.arm_horizon)
        rows.append(
            (
                Cell(one.model),
                Cell(label(one.arm)),
                Cell(f"{one.arm_horizon:,}", one.arm_horizon, source),
                Cell(
                    f"{one.baseline_horizon:,}",
                    one.baseline_horizon,
                    (results.study.baseline, one.model, one.baseline_horizon),
                ),
                _difference(one.difference, source),
                Cell(_p(one.adjusted_p), one.adjusted_p),
                Cell(f"{one.smallest_detectable:.4f}", one.smallest_detectable),
                Cell(
                    {"supported": "lower", "not supported": "higher"}.get(one.verdict, "undecided"),
                    tone=one.verdict,
                ),
            )
        )
    return Table(
        name="end-of-runs",
        title="The paper's rule: half the steps, ends of runs",
        columns=(
            "model",
            "arm",
            "its steps",
            f"{baseline}'s steps",
            "loss difference [interval]",
            "p, corrected",
            "smallest detectable (nats)",
            "the arm ends",
        ),
        rows=tuple(rows),
        note=(
            f"The arm decayed to the end of T/2 steps against {baseline} decayed to the end of T, paired by seed. The "
            "claim of 2× in steps and tokens holds where the difference is below zero. A true difference of the "
            "smallest detectable size is found four times in five with this many seeds, by a single test."
        ),
        numeric=(2, 3, 4, 5, 6),
    )


def speed_ups(results: Results) -> Table:
    return Table(
        name="speed-ups",
        title="D-equivalent speed-up at every horizon",
        columns=(
            "model",
            "arm",
            "steps",
            *(CURRENCY_NAMES[currency] for currency in CLAIM_CURRENCIES),
            "detectable from",
            "method",
        ),
        rows=tuple(_speed_up_rows(results.speed_ups)),
        note=(
            f"What {label(results.study.baseline)} would spend for the same loss, divided by what the arm spent; the "
            "ratios in tokens are those in steps. Outside the range of the baseline's horizons the ratio is censored "
            "(> or <), never extrapolated. 'Detectable from': the smallest speed-up in steps found four times in five."
        ),
        numeric=(2, 3, 4, 5, 6),
    )


def reference_speed_ups(results: Results) -> Table:
    rows = [
        (
            Cell(one.model),
            Cell(label(one.arm)),
            Cell(f"{one.horizon:,}", one.horizon, (one.arm, one.model, one.horizon)),
            _ratio(one),
        )
        for one in results.reference_speed_ups
    ]
    times = results.study.reference_times
    return Table(
        name="reference-times",
        title="Wall-clock by reference times",
        columns=("model", "arm", "steps", "speed-up in seconds [interval]"),
        rows=tuple(rows),
        note=(
            "Counts of each kind of work times its cost measured where nothing else ran, so that the noise of a shared "
            f"machine plays no part. Source: {times.source if times else 'none'}."
        ),
        numeric=(2, 3),
    )


def target_times(results: Results) -> Table:
    rows = []
    for one in results.target_times:
        source = (one.arm, one.model, one.horizon)
        mark = "> " if one.bound else ""
        rows.append(
            (
                Cell(one.model),
                Cell(f"{one.target:.4f}", one.target),
                Cell(label(one.arm)),
                Cell(f"{one.horizon:,}", one.horizon),
                Cell(
                    f"{one.reached} of {one.runs}" if one.reached else f"not reached (0 of {one.runs})",
                    one.reached / one.runs,
                    source,
                ),
                *(
                    Cell(
                        f"{mark}{_amount(one.spent[currency])}",
                        one.spent[currency] * (1e6 if one.bound else 1),
                        source,
                    )
                    for currency in CURRENCIES
                ),
            )
        )
    return Table(
        name="time-to-target",
        title="Time to target along the curves",
        columns=("model", "target (nats)", "arm", "of a run of", "reached by", *CURRENCY_NAMES.values()),
        rows=tuple(rows),
        note=(
            f"First crossing of the final losses of {label(results.study.baseline)} on the fixed validation set, "
            "interpolated on the logarithmic axis; medians over all runs, where one that does not reach it counts as "
            "beyond all that it spent (>: so does the median). Readings in the middle of a schedule depend on the "
            "schedule and are no speed-up."
        ),
        numeric=(1, 3, 4, 5, 6, 7, 8),
    )


def crossings(results: Results) -> Table:
    cells: dict[CellKey, list[float | None]] = {}
    for one in results.crossings:
        cells.setdefault((one.arm, one.model, one.horizon), []).append(one.share)
    rows = []
    for source, shares in cells.items():
        arm, model, horizon = source
        reached = [share for share in shares if share is not None]
        shown = f"{min(reached):.0%} to {max(reached):.0%}" if reached else "not reached"
        rows.append(
            (
                Cell(model),
                Cell(label(arm)),
                Cell(f"{horizon:,}", horizon),
                Cell(shown, min(reached, default=math.inf), source),
                Cell(f"{len(reached)} of {len(shares)}", len(reached), source),
            )
        )
    return Table(
        name="crossings",
        title="Mid-run crossings: not a speed-up",
        columns=("model", "arm", "steps of both", "passes the baseline's final loss at", "seeds that do"),
        rows=tuple(rows),
        note=(
            "Where an arm's curve passes the final loss of the baseline's run of the same length. The schedule decays "
            "the loss and curves of one horizon cross; such readings have been mistaken for speed-ups; they "
            "are shown for comparison with texts that do so."
        ),
        numeric=(2, 3, 4),
    )


def costs(results: Results) -> Table:
    rows = []
    for one in results.costs:
        kinds = one.seconds_by_kind
        rows.append(
            (
                Cell(one.model),
                Cell(label(one.arm)),
                Cell(f"{1000 * one.seconds_per_step:.1f}", one.seconds_per_step),
                *(
                    Cell(f"{1000 * kinds.get(kind, 0.0):.1f}", kinds.get(kind, 0.0))
                    for kind in ("forward_backward", "curvature", "optimizer", "data")
                ),
                Cell(f"{one.curvature_seconds_share:.1%}", one.curvature_seconds_share),
                Cell(f"{one.curvature_flops_share:.1%}", one.curvature_flops_share),
                Cell(f"{one.flops_per_token:.3g}", one.flops_per_token),
                Cell(
                    f"{one.clipped_norm_share:.1%}" if math.isfinite(one.clipped_norm_share) else "–",
                    _sortable(one.clipped_norm_share),
                ),
                Cell(f"{one.peak_memory_bytes / 2**20:,.0f}", one.peak_memory_bytes),
            )
        )
    return Table(
        name="times",
        title="Cost of a step",
        columns=(
            "model",
            "arm",
            "ms a step",
            "forward-backward",
            "curvature",
            "optimizer",
            "data",
            "curvature's share of time",
            "of FLOPs",
            "FLOPs a token",
            "norm clipped in",
            "peak MiB",
        ),
        rows=tuple(rows),
        note="Means over the reported runs' own clocks; compilation, evaluation and checkpoints are booked apart.",
        numeric=tuple(range(2, 12)),
    )


def ablations(results: Results) -> Table:
    rows = []
    for one in results.ablations:
        source = (one.arm, one.model, one.horizon)
        if one.differences and one.interval is None:
            difference = Cell(f"{one.differences[0]:+.4f} (one seed: no interval)", one.differences[0], source)
        else:
            difference = _difference(one.interval, source)
        rows.append(
            (
                Cell(one.model),
                Cell(label(one.of)),
                Cell(one.setting, source=source),
                Cell(f"{one.horizon:,}", one.horizon),
                Cell(
                    f"{one.mean:.4f}" if math.isfinite(one.mean) else f"{one.diverged} of {one.runs} diverged",
                    _sortable(one.mean),
                    source,
                ),
                difference,
                Cell(_p(one.adjusted_p) if math.isfinite(one.adjusted_p) else "", _sortable(one.adjusted_p)),
                Cell(f"{one.time_ratio:.2f}" if math.isfinite(one.time_ratio) else "–", _sortable(one.time_ratio)),
                Cell(str(one.runs), one.runs, source),
            )
        )
    return Table(
        name="ablations",
        title="Ablations",
        columns=(
            "model",
            "arm",
            "with",
            "steps",
            "loss (nats)",
            "minus the arm [interval]",
            "p, corrected",
            "time a step",
            "seeds",
        ),
        rows=tuple(rows),
        note=(
            "An arm's reported runs once more with one thing changed and the rest as its search found it, not tuned "
            "again. Differences are paired by seed with the arm at the same number of steps; above zero is worse. "
            "'Time a step' is relative to the arm's. p-values are corrected (Holm) over all ablations."
        ),
        numeric=(3, 4, 5, 6, 7, 8),
    )


def grid(results: Results) -> Table:
    found = results.grid
    if found is None:
        return Table("grid", "Sensitivity to γ and β2", ("γ",), ())
    best = float(np.nanmin(found.losses))
    rows = [
        (
            Cell(f"{gamma:g}", gamma),
            *(
                Cell(f"{loss:.4f}{' (best)' if loss == best else ''}" if math.isfinite(loss) else "–", _sortable(loss))
                for loss in map(float, losses)
            ),
        )
        for gamma, losses in zip(found.gammas, found.losses, strict=True)
    ]
    first, seeds = found.runs[0], sorted({run.seed for run in found.runs})
    paper = load_reference().sensitivity_grid
    spread = np.ptp(np.array(paper["loss"]))
    return Table(
        name="grid",
        title="Sensitivity to γ and β2",
        columns=("γ", *(f"β2 = {beta:g}" for beta in found.betas)),
        rows=tuple(rows),
        note=(
            f"Final validation loss (nats) of {label(first.optimizer)} on {first.model} after {first.horizon:,} steps, "
            f"all else equal; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. The paper's grid "
            f"({paper['size']}, {label(paper['arm'])}) spans {spread:.3f} nats."
        ),
        numeric=tuple(range(len(found.betas) + 1)),
    )


def tuning(results: Results) -> Table:
    rows = []
    for one in results.tunings:
        trials = [trial for candidate in one.candidates for trial in candidate.trials]
        best = one.best
        granted = results.study.arms[one.arm].granted(one.model, one.horizon)
        spent = sum(trial.device_seconds for trial in trials)
        second = min((candidate.loss for candidate in one.candidates if candidate is not best), default=math.nan)
        lead = second - best.loss
        rows.append(
            (
                Cell(one.model),
                Cell(label(one.arm)),
                Cell(f"{one.horizon:,}", one.horizon),
                Cell(f"{len(trials)}" + (f" of {granted}" if granted else ""), len(trials)),
                Cell(str(one.diverged), one.diverged),
                Cell(f"{spent:,.0f}", spent),
                Cell(
                    _values(best.values),
                    origin=best.trials[0].origin if best.trials else None,
                ),
                Cell(f"{best.loss:.4f}" if math.isfinite(best.loss) else "–", _sortable(best.loss)),
                Cell(f"{lead:+.4f}" if math.isfinite(lead) else "–", _sortable(lead)),
                Cell(", ".join(f"{edge.key} {edge.side}" for edge in one.edges), tone="serious" if one.edges else ""),
            )
        )
    return Table(
        name="tuning",
        title="Tuning",
        columns=(
            "model",
            "arm",
            "steps",
            "trials",
            "diverged",
            "device-seconds",
            "best values",
            "loss",
            "the next, more by",
            "at an edge",
        ),
        rows=tuple(rows),
        note="On seeds apart from those reported, with the same number of trials for every arm.",
        numeric=(2, 3, 4, 5, 7, 8),
    )


def search_spaces(results: Results) -> Table:
    rows = [
        (Cell(label(arm.name)), Cell(arm.method), Cell(key), Cell(_space(space)))
        for arm in results.study.arms.values()
        for key, space in arm.search.items()
    ]
    return Table(
        name="search-spaces",
        title="Search spaces",
        columns=("arm", "method", "key", "space"),
        rows=tuple(rows),
    )


def trends(results: Results) -> Table:
    rows, worth = [], []
    for one in results.trends:
        tokens, parameters = one.reach["tokens"][1], one.reach["parameters"][1]
        farther = one.at(tokens=10 * tokens, parameters=10 * parameters)
        worth.append(one.worth(tokens=10 * tokens, parameters=10 * parameters))
        cells = []
        for name in ("tokens", "parameters"):
            slope = one.slope(name)
            cells.append(
                Cell(
                    f"{slope.estimate:+.3f} [{slope.low:+.3f}, {slope.high:+.3f}]" if slope else "did not vary",
                    slope.estimate if slope else "",
                )
            )
        rows.append(
            (
                Cell(label(one.arm)),
                Cell(CLAIM_NAMES.get(one.currency, one.currency)),
                Cell(str(one.points), one.points),
                *cells,
                Cell(
                    f"{_bounded(farther.estimate)} [{_bounded(farther.low)}, {_bounded(farther.high)}]",
                    farther.estimate,
                ),
            )
        )
    return Table(
        name="trends",
        title="The speed-up against size and horizon",
        columns=(
            "arm",
            "counted in",
            "points",
            "change per e-fold of tokens",
            "of parameters",
            "ten times farther in both",
        ),
        rows=tuple(rows),
        note="Straight lines in logarithms through the uncensored speed-ups, weighted by their precision. "
        + " ".join(dict.fromkeys(worth)),
        numeric=(2, 3, 4, 5),
    )


def published(results: Results) -> Table:
    """Return published losses, with ours if the model is the same."""
    reference = load_reference()
    ours = {
        (one.endpoints.model, one.endpoints.arm): one
        for one in results.finals  # horizons ascend, so the longest stays
        if math.isfinite(one.mean)
    }
    rows = []
    for one in reference.losses:
        length = f"{one.steps:,} steps" if one.steps else f"{one.chinchilla:g}× Chinchilla" if one.chinchilla else "–"
        mine = ours.get((one.model or "", one.arm))
        rows.append(
            (
                Cell(one.source),
                Cell(one.size),
                Cell(label(one.arm)),
                Cell(length),
                Cell(f"{one.loss:.3f}", one.loss),
                Cell(
                    f"{mine.mean:.3f} ({mine.endpoints.horizon:,} steps)" if mine else "",
                    mine.mean if mine else "",
                    (mine.endpoints.arm, mine.endpoints.model, mine.endpoints.horizon) if mine else None,
                ),
            )
        )
    sources = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in reference.sources.items() if name != "noise")
    return Table(
        name="published",
        title="What others found",
        columns=("source", "size", "arm", "length", "loss", "here"),
        rows=tuple(rows),
        note=f"Losses of different data, vocabularies or validation sets do not compare with each other. {sources}.",
        numeric=(4, 5),
    )


def runs(results: Results) -> Table:
    rows = []
    for trial in sorted(
        results.study.trials, key=lambda t: (t.phase != "reporting", t.model, t.arm, t.horizon, t.seed)
    ):
        rows.append(
            (
                Cell(trial.origin.name, origin=trial.origin),
                Cell(trial.phase),
                Cell(trial.model),
                Cell(label(trial.arm), source=(trial.arm, trial.model, trial.horizon)),
                Cell(f"{trial.horizon:,}", trial.horizon),
                Cell(str(trial.seed), trial.seed),
                Cell(trial.status, tone="serious" if trial.status in ("diverged", "failed", "missing") else ""),
                Cell(f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "–", _sortable(trial.loss)),
                Cell(f"{trial.seconds:,.0f}", trial.seconds),
                Cell(_values(trial.values)),
            )
        )
    return Table(
        name="runs",
        title="Run records",
        columns=("run", "phase", "model", "arm", "steps", "seed", "status", "final loss", "seconds", "searched values"),
        rows=tuple(rows),
        note="Each record holds the run's configuration, environment, summary and metric lines.",
        numeric=(4, 5, 7, 8),
    )


TABLES: Mapping[str, Callable[[Results], Table]] = {
    "verdict": verdict,
    "final-losses": final_losses,
    "end-of-runs": end_of_runs,
    "speed-ups": speed_ups,
    "reference-times": reference_speed_ups,
    "time-to-target": target_times,
    "crossings": crossings,
    "times": costs,
    "ablations": ablations,
    "grid": grid,
    "tuning": tuning,
    "search-spaces": search_spaces,
    "trends": trends,
    "published": published,
    "runs": runs,
}


def markdown(table: Table, location: Path = Path()) -> str:
    """Return a GitHub table with title and note; links are relative to the directory `location`."""
    lines = [f"### {escaping.markdown(table.title)}", ""]
    lines.append("| " + " | ".join(map(_in_row, table.columns)) + " |")
    lines.append("| " + " | ".join("---:" if i in table.numeric else "---" for i in range(len(table.columns))) + " |")
    for row in table.rows:
        lines.append("| " + " | ".join(_markdown_cell(cell, location) for cell in row) + " |")
    if table.note:
        lines += ["", escaping.markdown(table.note)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell, location: Path) -> str:
    text = _in_row(cell.text)
    if cell.tone in ("supported", "not supported"):
        text = f"**{text}**"
    return f"[{text}]({cell.origin.href(location)})" if cell.origin else text


def _in_row(text: str) -> str:
    return escaping.markdown(text).replace("|", "\\|")


def _speed_up_rows(results: Sequence[SpeedUp]) -> list[tuple[Cell, ...]]:
    cells: dict[CellKey, dict[str, SpeedUp]] = {}
    for one in results:
        cells.setdefault((one.arm, one.model, one.horizon), {})[one.currency] = one
    rows = []
    for (arm, model, horizon), by_currency in cells.items():
        steps = by_currency["steps"]
        detectable = steps.smallest_detectable_ratio
        rows.append(
            (
                Cell(model),
                Cell(label(arm)),
                Cell(f"{horizon:,}", horizon, (arm, model, horizon)),
                *(_ratio(by_currency[currency]) for currency in CLAIM_CURRENCIES),
                Cell(f"{detectable:.3f}" if math.isfinite(detectable) else "–", _sortable(detectable)),
                Cell(steps.method),
            )
        )
    return rows


def _ratio(one: SpeedUp) -> Cell:
    return Cell(one.text, _sortable(one.estimate), (one.arm, one.model, one.horizon))


def _difference(interval: Interval | None, source: CellKey) -> Cell:
    if interval is None:
        return Cell("", "")
    if not math.isfinite(interval.low):
        return Cell(f"{interval.estimate:+.4f} (one seed: no interval)", interval.estimate, source)
    text = f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    return Cell(text, interval.estimate, source)


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _amount(value: float) -> str:
    if value < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def _bounded(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.2f}" if abs(log_ratio) < 5 else ("> 100" if log_ratio > 0 else "< 0.01")


def _sortable(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('optimizer.')}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, (list, tuple)) else str(value)


def _space(space: Any) -> str:
    if not isinstance(space, Mapping):
        return _short(space)
    if "values" in space:
        return ", ".join(map(_short, space["values"]))
    scale = f", {space['scale']}" if "scale" in space else ""
    return f"{_short(space.get('low'))} to {_short(space.get('high'))}{scale}"
