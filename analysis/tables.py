"""The tables of a report: frames of display strings. `markdown` writes one for Markdown, the page's template for HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import escaping
from analysis.colours import label
from analysis.comparison import Compared, Contrast, Endpoints, Ratio
from analysis.reference import OtherFinding, PublishedLoss, load_reference
from analysis.results import CURRENCY_NAMES, VERDICT_CURRENCIES, Results
from analysis.runs import Currency, Origin
from analysis.trials import short
from analysis.tuning import Edge, Tuning
from analysis.tuning import edges as edges_of

NONE = "–"
HALF = "with half the steps"
_NUMBER = re.compile(r"[<>+-]? ?[\d.][\d,.]*(e[+-]?\d+)?%?( [\[(].*| of \d+.*)?|–|")
_TELLING = 10.0  # nats; where only larger differences would be found, a cell tells nothing


@dataclass(frozen=True, eq=False)
class Table:
    """A titled table with a note; each row may lead to the first of its runs, by a link in the column `linked`."""

    name: str
    title: str
    frame: pd.DataFrame  # of text
    runs: tuple[Origin | None, ...]  # by row
    note: str = ""
    linked: str = ""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def columns(self) -> list[str]:
        return [str(column) for column in self.frame.columns]

    @cached_property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, which are right-aligned."""
        return [all(_NUMBER.fullmatch(text) for text in self.frame[column]) for column in self.frame.columns]

    @property
    def rows(self) -> list[tuple[list[str], Origin | None]]:
        return list(zip(self.frame.to_numpy().tolist(), self.runs, strict=True))


_Rows = Iterable[tuple[Mapping[str, str], Origin | None]]


def _table(
    name: str, title: str, rows: _Rows, note: str = "", linked: str = "arm", blank: Sequence[str] = ("",)
) -> Table:
    """Return a table of rows with their runs, without columns in which every cell is blank."""
    rows = list(rows)
    frame = pd.DataFrame([row for row, _ in rows]).fillna("")
    frame = frame[[column for column in frame.columns if not frame[column].isin(blank).all()]]
    return Table(name, title, frame, tuple(run for _, run in rows), note, linked)


def markdown(table: Table, location: Path = Path()) -> str:
    """Return a GitHub table with title and note; links are relative to the directory `location`."""
    heading = f"### {escaping.markdown(table.title)}\n\n"
    frame = table.frame.map(_in_row)
    if table.linked in frame:
        cells = zip(frame[table.linked], table.runs, strict=True)
        frame[table.linked] = [f"[{text}]({run.href(location)})" if run and text else text for text, run in cells]
    aligned = ["right" if numeric else "left" for numeric in table.numeric]
    frame.columns = pd.Index([_in_row(column) for column in table.columns])
    text = frame.to_markdown(index=False, disable_numparse=True, colalign=aligned) if len(frame) else "None."
    text = re.sub(r" {2,}", " ", re.sub(r"-{3,}", "---", text))  # padding is for the eyes of an editor
    return f"{heading}{text}\n" + (f"\n{escaping.markdown(table.note)}\n" if table.note else "")


def verdict(results: Results) -> Table:
    """Return the answer: each arm at the longest horizon that it shares with the baseline."""
    study, baseline = results.study, label(results.study.baseline)
    minus, half = f"minus {baseline} [interval]", HALF
    ratios = {currency: f"ratio in {CURRENCY_NAMES[currency]}" for currency in VERDICT_CURRENCIES}
    empty = dict.fromkeys((minus, half, *ratios.values()), "")
    rows: list[tuple[dict[str, str], Origin | None]] = []
    for model in results.baselines:
        own = [one for one in results.verdicts if one.model == model]
        compared = {one.at.endpoints.horizon for one in own if one.at}
        ends = study.endpoints(study.baseline, model)
        for end in [end for end in ends if end.horizon in compared] or ends[-1:]:
            rows.append((_cell(end) | empty, end.runs[0]))
        for one in own:
            at = one.at
            row = _cell(at.endpoints) if at else {"model": model, "arm": label(one.arm)}
            row |= empty | ({minus: _difference(at.same)} if at else {})
            if one.paper is not None:
                row[half] = _difference(one.paper.half, f" ({one.paper.endpoints.horizon:,})")
            rated = one.rated
            of = f" ({rated.endpoints.horizon:,})" if rated and rated is not at else ""
            row |= {
                column: _ratio(rated.ratio_in(currency), of) if rated else NONE for currency, column in ratios.items()
            }
            row |= {"verdict": one.word, "the paper's 2×": one.claim}
            rows.append((row, at.endpoints.runs[0] if at else None))
    table = _table("verdict", "At the longest horizon", rows, blank=("", NONE))
    levels = dict.fromkeys(f"{study.level_text(model)} on {model}" for model in results.baselines)
    note = (
        "Final validation losses of fully decayed runs. Differences are of the seeds that both arms have, losses of all; "
        f"intervals at {study.level:.0%} are corrected for the number of comparisons ({', '.join(levels) or 'none'}) and hold "
        "for these settings: they do not cover the luck of the searches."
    )
    if half in table.columns:
        note += (
            f" {HALF[0].upper()}{HALF[1:]}: the arm after the steps in brackets, minus {baseline} after twice as many."
        )
    if ratios["steps"] in table.columns:
        note += (
            f" A ratio of 1.25: {baseline} needs 1.25 times as much for the arm's loss; > and < mark what is outside "
            f"{baseline}'s horizons; – means no ratio."
        )
    untested: dict[str, dict[str, None]] = {}  # models by reason
    for one in results.verdicts:
        if one.not_tested:
            untested.setdefault(one.not_tested, {})[one.model] = None
    if untested:
        reasons = ". ".join(f"{', '.join(models)}: {reason}" for reason, models in untested.items())
        arms = dict.fromkeys(label(one.arm) for one in results.verdicts if one.not_tested)
        some = not all(one.not_tested for one in results.verdicts)
        whose = f" for {', '.join(arms)}" if some else ""
        note += f" The paper's claim is not tested{whose}. {reasons}."
    return replace(table, note=note)


def final_losses(results: Results) -> Table:
    compared = {(c.endpoints.arm, c.endpoints.model, c.endpoints.horizon): c for c in results.compared}
    baseline, rows = label(results.study.baseline), []
    for end in results.endpoints():
        if results.study.arms[end.arm].role != "arm":
            continue
        row = _cell(end)
        if one := compared.get((end.arm, end.model, end.horizon)):
            row |= {
                f"minus {baseline} [interval]": _difference(one.same),
                "would be found": _detectable(one.same),
                f"minus {baseline} at twice the steps": _difference(one.half),
                "ratio in steps": _ratio(one.ratio),
                "compute per token": _price(one, "flops"),
                "wall-clock per token": _price(one, "seconds"),
            }
        rows.append((row, end.runs[0]))
    return _table(
        "final-losses",
        "Final losses",
        rows,
        "Means over seeds. 'Would be found' is the true difference that so many seeds find four times in five. Costs per "
        f"token are relative to {baseline}'s; wall-clock uses reference times.",
    )


def self_test(results: Results) -> Table:
    baseline = label(results.study.baseline)
    rows = []
    for model, fitted in results.baselines.items():
        test = fitted.self_test
        shown = ", ".join(f"{value:.2f} at {horizon:,}" for horizon, value in test.ratios.items())
        row = {
            "model": model,
            "ratio at each horizon left out (steps)": shown or NONE,
            "p": _p(test.p),
            "ratios given": "yes" if test.passed else "no",
            "why not": test.reason,
        }
        rows.append((row, fitted.endpoints[0].runs[0]))
    return _table(
        "self-test",
        f"Does the curve recognise {baseline}?",
        rows,
        f"Each horizon of {baseline} is left out of the curve in turn and must come out at 1.00 times as fast as itself; p is "
        "of one joint test. Where it fails, there are only differences of loss, no ratios.",
        linked="model",
    )


def costs(results: Results) -> Table:
    rows = []
    for one in results.costs:
        seconds = {"ms a step": one.seconds_per_step, **one.seconds_by_kind}
        row = {"model": one.model, "arm": label(one.arm)}
        row |= {kind.replace("_", "-"): _finite(1e3 * value, ",.1f") for kind, value in seconds.items()}
        row |= {
            "curvature's share of time": _finite(one.curvature_seconds_share, ".1%"),
            "of FLOPs": _finite(one.curvature_flops_share, ".1%"),
            "FLOPs a token": f"{one.flops_per_token:.3g}",
            "norm clipped in": _finite(one.clipped_norm_share, ".1%"),
            "peak MiB": f"{one.peak_memory_bytes / 2**20:,.0f}",
        }
        rows.append((row, None))
    return _table(
        "times",
        "Cost of a step",
        rows,
        "Means over the reported runs, by their own clocks: a diagnostic, not part of the verdict. Compilation, evaluation and "
        "checkpoints do not count.",
    )


def ablations(results: Results) -> Table:
    rows = []
    for one in results.ablations:
        shown = one.interval.text if one.interval else ", ".join(f"{d:+.3f} (one seed)" for d in one.differences)
        row = {
            "model": one.model,
            "arm": label(one.of),
            "with": one.setting,
            "steps": f"{one.horizon:,}",
            "loss (nats)": f"{one.diverged} of {one.runs} diverged" if one.diverged else _loss(one.mean),
            "minus the arm [95% interval]": shown or NONE,
            "time a step": _finite(one.time_ratio, ".2f"),
            "seeds": str(one.runs),
        }
        rows.append((row, one.origins[0] if one.origins else None))
    return _table(
        "ablations",
        "Ablations (exploratory)",
        rows,
        "An arm's reported runs once more with one thing changed and the rest as its search found it, not tuned again. "
        "Differences are paired by seed; above zero is worse. The intervals are plain 95% intervals of each row, NOT corrected "
        "for the number of rows: expect one in twenty to exclude zero by chance. 'Time a step' is relative to the arm's.",
        linked="with",
    )  # fmt: skip


def grid(results: Results) -> Table:
    found = results.grid
    if found is None:
        return _table("grid", "Sensitivity to γ and β2", [])
    best, rows = float(np.nanmin(found.losses)), []
    for gamma, losses in zip(found.gammas, found.losses, strict=True):
        row = {"γ": f"{gamma:g}"}
        for beta, loss in zip(found.betas, map(float, losses), strict=True):
            row[f"β2 = {beta:g}"] = f"{_loss(loss)}{' (best)' if loss == best else ''}"
        rows.append((row, None))
    first, seeds, paper = found.runs[0], sorted({run.seed for run in found.runs}), load_reference().sensitivity_grid
    return _table(
        "grid",
        "Sensitivity to γ and β2",
        rows,
        f"Final validation loss (nats) of {label(first.optimizer)} on {first.model} after {first.horizon:,} steps, all else "
        f"equal; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. The paper's grid ({paper['size']}, "
        f"{label(paper['arm'])}) spans {np.ptp(np.array(paper['loss'])):.3f} nats.",
    )


def searches(results: Results) -> Table:
    rows = []
    for one in results.tunings:
        trials = [trial for candidate in one.candidates for trial in candidate.trials]
        granted = results.study.arms[one.arm].granted(one.model, one.horizon)
        rivals = [other for other in one.candidates if other is not one.best and other.finalist == one.best.finalist]
        second = min((other.loss for other in rivals), default=math.nan)
        noise = one.noise if results.study.arms[one.arm].method in ("random", "halton") else math.nan
        row = _place(one) | {
            "trials": f"{len(trials)}" + (f" of {granted}" if granted else ""),
            "diverged": str(one.diverged),
            "device-seconds": f"{sum(trial.device_seconds for trial in trials):,.0f}",
            "chosen values": _values(one.best.values),
            "loss": _loss(one.best.loss),
            "the next, more by": _finite(second - one.best.loss, "+.4f"),
            "noise of the search": _finite(noise, ".4f"),
        }
        rows.append((row, one.best.trials[0].origin if one.best.trials else None))
    return _table(
        "tuning",
        "Tuning",
        rows,
        "On seeds apart from those reported, with the same number of trials for every arm. If the best settings ran on further "
        "seeds, the losses are those of these seeds, which decided. The noise of a search is the standard deviation of its "
        "lowest loss, had it drawn other points (nats, a bootstrap over the settings). It is in no interval.",
        linked="chosen values",
        blank=("", NONE),
    )


def edges(results: Results) -> Table:
    first = {(one.arm, one.model, one.horizon): one.best.trials[0].origin for one in results.tunings if one.best.trials}
    rows = []
    found = edges_of(results.study, results.tunings)
    for edge in found:
        row = _place(edge) | {
            "key": edge.key,
            "value": short(edge.value),
            "of those tried": f"the {edge.side}",
            "found at": edge.inherited_from or f"{edge.horizon:,} steps",
            "beyond it, minus at it [95% interval]": "; ".join(
                f"{short(one.value)}, {one.horizon:,} steps: {one.interval.text}" for one in edge.beyond
            ),
        }
        rows.append((row, first.get((edge.arm, edge.model, edge.horizon))))
    note = (
        "The optimum may lie outside. A key that was not searched again at some steps keeps the value found at others."
    )
    if any(edge.beyond for edge in found):
        note += " Runs beyond the edge change this value alone (nats, paired by seed; above zero is worse)."
    return _table("edges", "Reported values at an edge of their search", rows, note, linked="value")


def search_spaces(results: Results) -> Table:
    rows = [
        ({"arm": label(arm.name), "method": arm.method, "key": key, "space": _space(space)}, None)
        for arm in results.study.arms.values()
        for key, space in arm.search.items()
    ]
    return _table("search-spaces", "Search spaces", rows)


def published(results: Results) -> Table:
    """Return published results with their flaws; losses of one source, size and length in one row, with ours if comparable."""
    return _published(results, load_reference().others)


def published_losses(results: Results) -> Table:
    """Return the final losses among them."""
    return _published(results, ())


def _published(results: Results, others: Sequence[OtherFinding]) -> Table:
    reference = load_reference()
    ours = {(end.model, end.arm): end for end in results.endpoints() if math.isfinite(end.mean)}  # the longest stays
    groups: dict[tuple[str, str, float | None], list[PublishedLoss]] = {}
    for one in reference.losses:
        groups.setdefault((one.source, one.size, one.chinchilla), []).append(one)
    rows: list[tuple[dict[str, str], Origin | None]] = []
    for (source, size, chinchilla), losses in groups.items():
        mine = [ours[key] for one in losses if (key := (one.model or "", one.arm)) in ours]
        steps = dict.fromkeys(f"{one.steps:,}" for one in losses if one.steps)
        length = f"{' and '.join(steps)} steps" if steps else NONE
        row = {
            "source": source,
            "size": size,
            "length": f"{chinchilla:g}× Chinchilla" if chinchilla else length,
            "result": ", ".join(f"{label(one.arm)} {one.loss:.3f}" for one in losses),
            "here": ", ".join(f"{label(end.arm)} {end.mean:.3f} ({end.horizon:,} steps)" for end in mine),
        }
        rows.append((row, mine[0].runs[0] if mine else None))
    for other in others:
        rows.append(({"source": other.source, "size": other.size, "result": other.finding}, None))
    told: set[str] = set()
    for row, _ in rows:  # a source's flaws stand in its first row
        row["flaws"] = "" if row["source"] in told else reference.flaws.get(row["source"], "")
        told.add(row["source"])
    sources = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in reference.sources.items() if name in told)
    return _table(
        "published",
        "What others found",
        rows,
        f"Final validation losses in nats unless said otherwise; losses of different data, vocabularies or validation sets do "
        f"not compare with each other. {sources}.",
        linked="here",
    )


def runs(results: Results) -> Table:
    rows = []
    order = sorted(results.study.trials, key=lambda t: (t.phase != "reporting", t.model, t.arm, t.horizon, t.seed))
    for trial in order:
        row = {
            "run": trial.origin.name,
            "phase": trial.phase,
            "model": trial.model,
            "arm": label(trial.arm),
            "steps": f"{trial.horizon:,}",
            "seed": str(trial.seed),
            "status": trial.status,
            "final loss": _loss(trial.loss),
            "seconds": f"{trial.seconds:,.0f}",
            "searched values": _values(trial.values),
        }
        rows.append((row, trial.origin))
    note = "Each record holds the run's configuration, environment, summary and metric lines."
    return _table("runs", "Run records", rows, note, linked="run")


TABLES: Mapping[str, Callable[[Results], Table]] = {
    "verdict": verdict,
    "final-losses": final_losses,
    "self-test": self_test,
    "times": costs,
    "ablations": ablations,
    "grid": grid,
    "tuning": searches,
    "edges": edges,
    "search-spaces": search_spaces,
    "published": published,
    "runs": runs,
}


def _place(one: Endpoints | Tuning | Edge) -> dict[str, str]:
    return {"model": one.model, "arm": label(one.arm), "steps": f"{one.horizon:,}"}


def _cell(end: Endpoints) -> dict[str, str]:
    lost, seeds = len(end.diverged), len(end.seeds)
    return _place(end) | {
        "loss (nats)": f"{lost} of {seeds} diverged" if lost else f"{end.mean:.4f}",
        "bits per byte": f"{end.bits_per_byte:.4f}" if math.isfinite(end.bits_per_byte) else "",
        "sd": _loss(end.standard_deviation),
        "seeds": str(seeds),
    }


def _difference(one: Contrast | str, suffix: str = "") -> str:
    if isinstance(one, str):
        return NONE
    return (one.interval.text if one.interval else f"{one.differences[0]:+.3f} (one seed)") + suffix


def _detectable(one: Contrast | str) -> str:
    if isinstance(one, str) or one.interval is None:
        return NONE
    return f"{one.smallest_detectable:.3f}" if one.smallest_detectable < _TELLING else f"> {_TELLING:g}"


def _price(one: Compared, currency: Currency) -> str:
    return f"{one.prices[currency]:.3f}" if currency in one.prices else NONE


def _ratio(one: Ratio | str, suffix: str = "") -> str:
    return NONE if isinstance(one, str) else one.text + suffix


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else NONE


def _loss(value: float) -> str:
    return _finite(value, ".4f")


def _p(value: float) -> str:
    return NONE if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('optimizer.')}={short(value)}" for key, value in values.items())


def _space(space: Any) -> str:
    if not isinstance(space, Mapping):
        return short(space)
    if "values" in space:
        return ", ".join(map(short, space["values"]))
    scale = f", {space['scale']}" if "scale" in space else ""
    return f"{short(space.get('low'))} to {short(space.get('high'))}{scale}"


def _in_row(text: str) -> str:
    return escaping.markdown(text).replace("|", "\\|")
