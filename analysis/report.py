"""The report of a study: a self-contained HTML page, Markdown, JSON, and a summary for the terminal."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from analysis import escaping, tables
from analysis.colours import colours, label
from analysis.figures import FIGURES, NothingToShow, save, seed_curves
from analysis.guards import Finding
from analysis.results import CLAIM_NAMES, CURRENCY_NAMES, Headline, Results, in_short, significant, write_json
from analysis.runs import CURRENCIES, Currency
from analysis.speedup import CLAIM_CURRENCIES, THRESHOLDS, SpeedUp
from analysis.tables import Cell, CellKey, Table
from data.files import write_atomically
from training.records import RecordError

_AXES: dict[Currency, str] = {
    "steps": "training steps",
    "tokens": "training tokens",
    "flops": "model FLOPs, curvature passes included",
    "seconds": "training seconds",
}
# Points per curve in the page; a screen cannot show more.
_CURVE_POINTS = 150
# Shown as interactive charts at the top of the page, so not repeated as pictures.
_INTERACTIVE = ("curves", "tokens")
_TONES = {"supported": "green", "not supported": "red", "undecided": "yellow", "serious": "red"}


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    markdown: Path
    json: Path
    figures: tuple[Path, ...]


def write_report(results: Results, directory: Path) -> Written:
    """Write report.html, report.md, report.json and figures/*.png into a directory.

    Links to run records are relative to it, so a study's directory can be moved as a whole.

    Raises:
        RecordError: the directory cannot be written.
    """
    try:
        return _write(results, directory)
    except OSError as error:
        raise RecordError(
            f"{directory}: the report cannot be written: {error.strerror or error}; free space, or name another directory"
        ) from error


def _write(results: Results, directory: Path) -> Written:
    directory.mkdir(parents=True, exist_ok=True)
    pictures, failed = draw_figures(results, directory / "figures")
    results = dataclasses.replace(results, findings=[*results.findings, *failed])
    written = Written(
        html=directory / "report.html",
        markdown=directory / "report.md",
        json=directory / "report.json",
        figures=tuple(pictures),
    )
    shown = {path.stem: path.read_bytes() for path in pictures if path.stem not in _INTERACTIVE}
    write_atomically(written.html, render_html(results, directory, shown))
    write_atomically(written.markdown, render_markdown(results, directory, pictures))
    write_json(results, written.json)
    return written


def draw_figures(results: Results, directory: Path) -> tuple[list[Path], list[Finding]]:
    """Write every figure for which there is data. A figure that fails gives a warning and does not stop the report."""
    pictures, failed = [], []
    for name, draw in FIGURES.items():
        try:
            pictures.append(save(draw(results), directory / f"{name}.png"))
        except NothingToShow:
            continue
        except (OSError, RecordError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            failed.append(Finding("figure", "note", f"The figure {name} could not be drawn", reason))
    return pictures, failed


def render_html(results: Results, location: Path, pictures: dict[str, bytes] | None = None) -> str:
    """Return the page, including plotly, data, styles and pictures.

    Args:
        location: the directory of the page; links to run records are relative to it.
        pictures: PNG files by figure name.
    """
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    built = {name: make(results) for name, make in tables.TABLES.items()}
    first_rows = _first_rows(built["runs"])
    anchors = {key: _slug(key) for key in first_rows}
    study = results.study
    return environment.get_template("report.html.jinja").render(
        title=_title(results),
        description=study.description,
        facts=_facts(results),
        under_way=study.under_way,
        verdict=built["verdict"],
        verdict_rows=_verdict_rows(results),
        verdict_columns=[CLAIM_NAMES[currency] for currency in CLAIM_CURRENCIES],
        sentences=_sentences(results),
        findings=results.findings,
        currencies=CURRENCY_NAMES,
        tables=built,
        figures=[
            {"name": name, "caption": _caption(name), "png": base64.b64encode(png).decode(), "wide": _is_wide(png)}
            for name, png in (pictures or {}).items()
        ],
        method=method(results),
        # A closing tag would end the script element: plotly contains none, and the data must not.
        plotly=Markup(get_plotlyjs()),
        data=Markup(json.dumps(chart_data(results), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
        link=lambda origin: origin.href(location),
        anchor=_slug,
        anchored=lambda key: key in anchors,
        row_anchor=lambda row: next((anchors[key] for key, first in first_rows.items() if first is row), ""),
    )


def render_markdown(results: Results, location: Path, pictures: Sequence[Path] = ()) -> str:
    """Return the report as Markdown, with links to the pictures."""
    plain = escaping.markdown
    top = (results.study.description, _facts(results), results.study.under_way)
    parts = [f"# {plain(_title(results))}", *map(plain, top)]
    parts += [tables.markdown(tables.verdict(results)).replace("###", "##", 1)]
    parts += ["## Warnings"]
    parts += [
        "\n".join(
            f"- **{'Serious' if finding.severity == 'serious' else 'Note'}: {plain(finding.title)}.** {plain(finding.detail)}"
            for finding in results.findings
        )
        or "No warnings."
    ]
    parts += ["## The verdict in sentences", "\n".join(f"- {plain(sentence)}" for sentence in _sentences(results))]
    parts += ["## Figures"] if pictures else []
    parts += [f"![{_caption(path.stem)}]({escaping.href(path, location)})" for path in pictures]
    parts += ["## Tables"]
    for name, make in tables.TABLES.items():
        table = make(results)
        if table and name not in ("verdict", "runs"):
            parts.append(tables.markdown(table, location))
    parts += ["## How it was measured", *map(plain, method(results))]
    parts += [tables.markdown(tables.runs(results), location).replace("###", "##", 1)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def print_summary(results: Results, console: Console) -> None:
    """Print the verdict, the warnings and the final losses."""
    console.print(Text(_title(results), style="bold"))
    console.print(Text(_facts(results), style="dim"))
    if results.study.under_way:
        console.print(Text(results.study.under_way, style="yellow"))
    shown = tables.verdict(results)
    console.print(_rich(shown, (0, 1, 2, 3, 4, 5, 7)))
    for finding in results.findings:
        serious = finding.severity == "serious"
        console.print(
            Panel(
                Text.assemble((finding.title, "bold"), "\n", finding.detail),
                border_style="red" if serious else "yellow",
                box=box.HEAVY if serious else box.ROUNDED,
            )
        )
    if not results.findings:
        console.print("[green]No warnings.[/]")
    console.print(_rich(tables.final_losses(results), (0, 1, 2, 3, 4, 5, 7)))


def method(results: Results) -> list[str]:
    """Describe the method in prose."""
    study = results.study
    baseline = label(study.baseline)
    cells = [end for model in study.models for end in study.endpoints(study.baseline, model)]
    seeds = sorted({len(end.seeds) for end in cells})
    fitted = sorted({base.curve.method for base in results.baselines.values()})
    paragraphs = [
        "All arms use the same training loop, model, data, batches, gradient clip and schedule shape. They differ in the "
        "optimizer and its hyper-parameters; a warning above lists any other difference. Runs of one seed start from the "
        "same weights and see the same data in the same order under every optimizer, so differences are paired. The "
        "validation set is fixed and the same for all.",
        f"The comparison is between final losses of fully decayed runs, at {_counts(seeds)} seeds"
        + (f" ({', '.join(map(str, study.seeds))}), fixed before the first run" if study.planned else "")
        + ". Crossings of curves of the same length are not evidence, because the schedule decays the loss.",
        f"The speed-up of an arm is the cost at which {baseline} would reach the arm's final loss, divided by the arm's "
        f"cost. {baseline}'s loss as a function of the cost comes from its final losses over the horizons "
        f"({' and '.join(fitted) or 'none'}: a power law with a floor from four horizons on, else a straight line on "
        "the logarithmic axis). The interval holds the ratios that a paired t test does not reject, with the variance "
        "over seeds pooled over horizons unless Bartlett's test rejects it. Losses outside the baseline's range are "
        "censored, not extrapolated. There are no bootstrap intervals: with few seeds they cover too little.",
        "Compute counts model FLOPs with curvature passes and without recomputation. Wall-clock counts the measured "
        "seconds of forward and backward passes, curvature passes, optimizer steps and waiting for data, without "
        "compilation, evaluation and checkpoints.",
        "A claim is supported if the test puts the ratio above the threshold at the "
        f"{1 - study.level:.0%} level after Holm's correction over all claims on a model, not supported if below, and "
        "otherwise undecided, with the number of seeds that would decide (80 % power for the observed effect).",
    ]
    if study.reference_times is not None:
        paragraphs.append(
            "Reference times: counts of each kind of work times its cost on an idle machine "
            f"({study.reference_times.source})."
        )
    return paragraphs


def chart_data(results: Results) -> dict[str, Any]:
    """Return the data of the page's charts: plain lists, numbers rounded to screen precision."""
    study = results.study
    palette = colours(study.arm_names())
    curves, ranges = [], {}
    for model in study.models:
        for horizon in sorted({run.horizon for run in study.runs(model=model)}):
            lows, highs = [], []
            for arm in study.arm_names():
                runs = [r for r in study.runs(arm=arm, model=model) if r.horizon == horizon and len(r.evaluations)]
                if not runs:
                    continue
                evaluations = [run.evaluations for run in runs]
                steps, losses = seed_curves(evaluations, "steps")
                keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _CURVE_POINTS)).astype(int))
                if not len(keep) or not np.isfinite(losses).any():
                    continue
                lost = ~np.isfinite(losses).all(axis=0)
                mean = np.where(lost, np.nan, losses.mean(axis=0))[keep]
                curves.append(
                    {
                        "arm": arm,
                        "label": label(arm),
                        "colour": palette[arm],
                        "model": model,
                        "horizon": horizon,
                        "seeds": len(runs),
                        "x": {c: _rounded(seed_curves(evaluations, c)[0][keep], 6) for c in CURRENCIES},
                        "mean": _rounded(mean, 6),
                        "low": _rounded(losses.min(axis=0)[keep], 6) if len(runs) > 1 else None,
                        "high": _rounded(losses.max(axis=0)[keep], 6) if len(runs) > 1 else None,
                    }
                )
                late = losses[:, steps >= 0.2 * steps[-1]]
                lows.append(float(np.nanmin(late)))
                highs.append(float(np.nanmax(late)))
            if lows:
                low, high = min(lows), sorted(highs)[len(highs) // 2]
                ranges[f"{model}|{horizon}"] = [low - 0.06 * (high - low), high]
    finals = []
    for model in study.models:
        for arm in study.arm_names():
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            if ends:
                means = np.array([end.losses.mean() for end in ends])
                finals.append(
                    {
                        "arm": arm,
                        "label": label(arm),
                        "colour": palette[arm],
                        "model": model,
                        "horizons": [end.horizon for end in ends],
                        "seeds": [len(end.seeds) for end in ends],
                        "x": {c: _rounded([end.cost(c).mean() for end in ends], 6) for c in CURRENCIES},
                        "mean": _rounded(means, 6),
                        "below": _rounded(means - [end.losses.min() for end in ends], 4),
                        "above": _rounded([end.losses.max() for end in ends] - means, 4),
                    }
                )
    return {
        "models": study.models,
        "baseline": study.baseline,
        "axes": _AXES,
        "curves": curves,
        "ranges": ranges,
        "longest": {model: base.endpoints[-1].horizon for model, base in results.baselines.items()},
        "finals": finals,
        "baselines": {model: _baseline_line(results, model) for model in results.baselines},
    }


def _baseline_line(results: Results, model: str) -> dict[str, Any]:
    baseline = results.baselines[model]
    x = np.linspace(*baseline.range, 60)
    return {
        "arm": results.study.baseline,
        "label": label(results.study.baseline),
        "colour": colours(results.study.arm_names())[results.study.baseline],
        "method": baseline.curve.method,
        "x": {c: _rounded(np.exp(x) * baseline.cost_per_token(c).mean(), 6) for c in CURRENCIES},
        "y": _rounded(baseline.curve.value(x), 6),
    }


def _verdict_rows(results: Results) -> list[dict[str, Any]]:
    """Return the verdict as a matrix per model: a row per arm, a column per currency."""
    palette = colours(results.study.arm_names())
    found: dict[tuple[str, str], dict[Currency, list[Headline]]] = {}
    for one in results.headlines:
        found.setdefault((one.model, one.arm), {}).setdefault(one.currency, []).append(one)
    groups: dict[str, list[dict[str, Any]]] = {}
    for (model, arm), by_currency in found.items():
        cells = [_verdict_cell(by_currency[c]) if c in by_currency else None for c in CLAIM_CURRENCIES]
        # If the horizon is the same in every currency, it is shown once, with the arm.
        said = {cell["at"] for cell in cells if cell}
        at = said.pop() if len(said) == 1 else ""
        groups.setdefault(model, []).append({"label": label(arm), "colour": palette[arm], "cells": cells, "at": at})
    return [{"model": model, "rows": rows} for model, rows in groups.items()]


def _verdict_cell(claims: Sequence[Headline]) -> dict[str, Any]:
    at: SpeedUp = claims[0].speed_up
    ratio, _, interval = at.text.partition(" [")
    known = math.isfinite(at.estimate)
    names = {threshold: f"> {threshold:g}" if threshold == 1 else f"≥ {threshold:g}" for threshold in THRESHOLDS}
    return {
        "source": (at.arm, at.model, at.horizon),
        "ratio": f"{ratio}×" if known else "–",
        "interval": f"[{interval}" if known else at.text,
        "at": f"{at.horizon:,} steps, {at.seeds} seeds",
        "claims": [
            {
                "tone": one.claim.verdict.replace(" ", "-"),
                "text": f"{names[one.claim.threshold]}: {in_short(one.claim)}",
                "why": f"p = {one.claim.p:.3g}, corrected over {one.family} claims {one.claim.adjusted_p:.3g}",
            }
            for one in claims
        ],
    }


def _sentences(results: Results) -> list[str]:
    pairs = dict.fromkeys((one.arm, one.model) for one in results.headlines)
    return [sentence for arm, model in pairs for sentence in results.sentences(arm, model)]


def _title(results: Results) -> str:
    arms = [label(arm) for arm in results.study.arm_names() if arm != results.study.baseline]
    others = f"{', '.join(arms[:-1])} and {arms[-1]}" if len(arms) > 1 else "".join(arms) or "nothing"
    return f"{results.study.name}: {others} against {label(results.study.baseline)}"


def _facts(results: Results) -> str:
    study = results.study
    ended = [trial for trial in study.reporting if trial.run is not None]
    horizons = sorted({trial.horizon for trial in study.reporting})
    steps = f"{horizons[0]:,} to {horizons[-1]:,} steps" if len(horizons) > 1 else f"{horizons[0]:,} steps"
    tuning = len([trial for trial in study.tuning if trial.run is not None])
    return (
        f"{len(ended)} reported runs"
        + (f", {tuning} tuning runs" if tuning else "")
        + f"; {_counts([len(study.models)])} model{'s' if len(study.models) > 1 else ''} "
        f"({', '.join(study.models)}); {steps}; {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}."
    )


def _counts(numbers: Sequence[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if numbers else "no"


def _caption(name: str) -> str:
    return (FIGURES[name].__doc__ or name).strip().splitlines()[0]


def _is_wide(png: bytes) -> bool:
    """Return whether a picture has several panels, which are illegible at half a page's width."""
    width, height = struct.unpack(">II", png[16:24])
    return bool(width > 1.9 * height and width > 1200)


def _first_rows(runs: Table) -> dict[CellKey, tuple[Cell, ...]]:
    """Return the first reported run of each cell, the target of links to the cell."""
    first: dict[CellKey, tuple[Cell, ...]] = {}
    for row in runs.rows:
        source = row[3].source
        if source is not None and row[1].text == "reporting":
            first.setdefault(source, row)
    return first


def _slug(key: CellKey) -> str:
    return "runs-" + re.sub(r"[^A-Za-z0-9]+", "-", "-".join(map(str, key))).strip("-").lower()


def _rounded(values: Any, digits: int) -> list[float | None]:
    """Return lists for JSON with `digits` significant digits, null for non-finite values."""
    return [significant(value, digits) if math.isfinite(value) else None for value in np.asarray(values, float)]


def _rich(table: Table, columns: Sequence[int]) -> RichTable:
    """Return a table for the terminal with the given columns."""
    shown = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        shown.add_column(Text(table.columns[column]), justify="right" if column in table.numeric else "left")
    for row in table.rows:
        shown.add_row(*(Text(row[column].text, style=_TONES.get(row[column].tone, "")) for column in columns))
    return shown
