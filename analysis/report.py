"""The report of a study: one list of blocks, written as a self-contained page and as Markdown; JSON; a terminal summary."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from analysis import escaping, tables
from analysis.colours import colours, label
from analysis.comparison import Contrast, Endpoints
from analysis.figures import FIGURES, NothingToShow, curves_at, diverged_note, loss_limits, save, seed_curves
from analysis.guards import Finding
from analysis.results import CURRENCY_NAMES, VERDICT_CURRENCIES, Results, model_sizes, significant, write_json
from analysis.tables import Table
from data.files import write_atomically
from training.records import RecordError

_CURVE_POINTS = 150  # per curve of the page; a screen cannot show more
_TERMINAL = ("model", "arm", "steps", "loss (nats)", tables.HALF, "ratio in steps", "verdict", "the paper's 2×")
_STYLES = {"faster": "green", "slower": "red", "seen": "green"}


@dataclass(frozen=True)
class Heading:
    text: str
    name: str = ""  # its anchor


@dataclass(frozen=True)
class Paragraph:
    text: str
    head: str = ""  # shown first, in bold


@dataclass(frozen=True)
class Warnings:
    findings: Sequence[Finding]
    brief: bool = False  # titles only


@dataclass(frozen=True)
class Picture:
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def caption(self) -> str:
        return (FIGURES[self.name].__doc__ or self.name).strip().splitlines()[0]

    @property
    def png(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> int:
        """Pixels on a page, at 100 to the inch."""
        return int.from_bytes(self.path.read_bytes()[16:20]) * 2 // 3


@dataclass(frozen=True)
class Curves:
    """Validation curves: a chart in the page, a picture in Markdown."""

    views: list[dict[str, Any]]
    picture: Block | None


Block = Heading | Paragraph | Warnings | Table | Picture | Curves


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    markdown: Path
    json: Path
    figures: tuple[Path, ...] = ()


def write_report(results: Results, directory: Path) -> Written:
    """Write report.html, report.md, report.json and figures/*.png into a directory.

    Links to run records are relative to it, so a study's directory can be moved as a whole.

    Raises:
        RecordError: the directory cannot be written.
    """
    written = Written(directory / "report.html", directory / "report.md", directory / "report.json")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        pictures, failed = draw_figures(results, directory / "figures")
        results = dataclasses.replace(results, findings=[*results.findings, *failed])
        blocks = content(results, pictures)
        write_atomically(written.html, page(blocks, directory))
        write_atomically(written.markdown, markdown(blocks, directory))
        write_json(results, written.json)
    except OSError as error:
        reason = f"{error.strerror or error}; free space, or name another directory"
        raise RecordError(f"{directory}: the report cannot be written: {reason}") from error
    return dataclasses.replace(written, figures=tuple(pictures))


def draw_figures(results: Results, directory: Path) -> tuple[list[Path], list[Finding]]:
    """Write every figure for which there is data, and remove an earlier picture of the others.

    A figure that fails gives a warning and does not stop the report.
    """
    pictures, failed = [], []
    for name, draw in FIGURES.items():
        try:
            pictures.append(save(draw(results), directory / f"{name}.png"))
        except NothingToShow:
            (directory / f"{name}.png").unlink(missing_ok=True)
        except (OSError, RecordError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            failed.append(Finding("figure", "note", f"The figure {name} could not be drawn", reason))
    return pictures, failed


def content(results: Results, pictures: Sequence[Path] = ()) -> list[Block]:
    """Return the report as blocks, with those of the PNG files that are named as in `FIGURES`."""
    study = results.study
    parts: dict[str, Block] = {f"figure {path.stem}": Picture(path) for path in pictures}
    parts |= {name: table for name, make in tables.TABLES.items() if len(table := make(results))}

    def section(title: str, name: str, *named: str | Block) -> list[Block]:
        """Return the blocks that have content; a text names a table or a figure."""
        shown = [parts.get(part) if isinstance(part, str) else part for part in named]
        found = [block for block in shown if block is not None]
        return [Heading(title, name), *found] if found else []

    views = _views(results)
    leads = [_lead(results, model) for model in results.baselines if any(v.model == model for v in results.verdicts)]
    nothing = Paragraph("No arm other than the baseline has finished runs: nothing to compare yet.")
    clean = Paragraph(
        "None: the arms differ only in the optimizer, were tuned with equal budgets, and every planned run finished."
    )
    doubts: list[Block] = [
        Paragraph("The strongest reasons to doubt what follows:"),
        Warnings(results.doubts, brief=True),
    ]
    return [
        Heading(_title(results)),
        *(Paragraph(text) for text in (study.description, _facts(results), study.under_way) if text),
        *section(
            f"How much faster than {label(study.baseline)}?",
            "the-verdict",
            *(doubts if results.findings else []),
            *(leads or [nothing]),
            "verdict",
        ),
        *section("Warnings", "warnings", Warnings(results.findings) if results.findings else clean),
        *section("Curves", "curves", *([Curves(views, parts.get("figure curves"))] if views else []), "figure tokens"),
        *section("Every horizon", "horizons", "figure differences", "final-losses", "self-test"),
        *section("Cost", "cost", "times", "figure times", "figure norms"),
        *section(
            "Ablations", "ablation-studies", "ablations", "figure ablations", "figure interval", "grid", "figure grid"
        ),
        *section("Curvature", "curvature", "figure unclipped", "figure hessian"),
        *section("Tuning", "searches", "tuning", "edges", "search-spaces", "figure stability"),
        *section("Published results", "others", "published"),
        *section("How it was measured", "method", *map(Paragraph, method(results))),
        *section("Run records", "records", "runs"),
    ]


def page(blocks: Sequence[Block], location: Path) -> str:
    """Return the blocks as one page, including plotly, data, styles and pictures."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    records = next((block for block in blocks if isinstance(block, Table) and block.name == "runs"), None)
    anchors = {run: f"run-{row}" for row, run in enumerate(records.runs)} if records else {}
    views = next((block.views for block in blocks if isinstance(block, Curves)), [])
    return environment.get_template("report.html.jinja").render(
        blocks=[(type(block).__name__, block) for block in blocks],
        anchors=anchors,
        currencies={currency: CURRENCY_NAMES[currency] for currency in VERDICT_CURRENCIES},
        unbroken=lambda text: re.sub(r", (?=[^][]*\])", ",\u00a0", text),  # intervals
        link=lambda origin: origin.href(location),
        # A closing tag would end the script element: plotly contains none, and the data must not.
        plotly=Markup(get_plotlyjs()),
        views=Markup(json.dumps(views, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
    )


def markdown(blocks: Sequence[Block], location: Path) -> str:
    """Return the blocks as Markdown, with links to pictures and run records relative to the directory `location`."""
    plain, parts = escaping.markdown, []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'##' if block.name else '#'} {plain(block.text)}")
            case Paragraph():
                parts.append((f"**{plain(block.head)}**: " if block.head else "") + plain(block.text))
            case Warnings():
                for one in block.findings:
                    kind = "Serious" if one.severity == "serious" else "Note"
                    detail = "" if block.brief else f" {plain(f'{one.detail} {one.figures}')}"
                    parts.append(f"- **{kind}: {plain(one.title)}.**{detail}")
            case Table():
                parts.append(tables.markdown(block, location).strip())
            case (Picture() as picture) | Curves(picture=Picture() as picture):
                parts.append(f"![{plain(picture.caption)}]({escaping.href(picture.path, location)})")
    return "\n\n".join(parts).replace("\n\n- **", "\n- **") + "\n"


def print_summary(results: Results, console: Console) -> None:
    """Print the serious warnings, the verdicts, their table, and the titles of the other warnings."""
    console.print(Text(_title(results), style="bold"))
    console.print(Text(_facts(results), style="dim"))
    if results.study.under_way:
        console.print(Text(results.study.under_way, style="yellow"))
    for finding in results.findings:
        if finding.severity == "serious":
            console.print(Text.assemble((f"Serious: {finding.title}.", "bold red"), f" {finding.detail}"))
    for sentence in results.sentences:
        console.print(Text(sentence))
    table = tables.verdict(results)
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in table.columns if column in _TERMINAL or column.startswith("minus ")]
    for column in columns:
        shown.add_column(Text(column), justify="right" if table.numeric[table.columns.index(column)] else "left")
    for row in table.frame[columns].to_numpy().tolist():
        shown.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in row))
    console.print(shown)
    for finding in results.findings:
        if finding.severity != "serious":
            console.print(Text(f"Note: {finding.title}", style="yellow"))
    if not results.findings:
        console.print("[green]No warnings.[/]")


def method(results: Results) -> list[str]:
    """Describe the method in prose."""
    study, baseline = results.study, label(results.study.baseline)
    ends = [end for end in results.endpoints() if study.arms[end.arm].role == "arm"]
    fixed = f" ({', '.join(map(str, study.seeds))}), fixed before the first run" if study.planned else ""
    times = study.reference_times
    others = sorted({key for arm in study.arms.values() for key in arm.search if not key.startswith("optimizer.")})
    searched = f", and in {', '.join(others)}, which every arm searched for itself" if others else ""
    return [
        "All arms use the same training loop, model, data, batches, gradient clip and schedule shape. They differ in the "
        f"optimizer and its hyper-parameters{searched}; a warning above lists any other difference. Runs of one seed start "
        "from the same weights and see the same data in the same order under every optimizer. The validation set is fixed "
        "and the same for all.",
        f"Final losses of fully decayed runs are compared, paired by seed, at {_seeds(ends)}{fixed}. Crossings of "
        "curves are not evidence, because the schedule decays the loss. Each difference has Student's t interval from its "
        "own seeds; nothing is pooled, since variances differ between arms and horizons. Intervals hold for the settings "
        "that the searches found; the noise of the searches is in none of them. The level of all intervals on a "
        "model is corrected (Bonferroni) for its number of arms. An arm is 'faster' or 'slower' if the interval at the same "
        "number of steps excludes zero, otherwise 'not told apart'. In compute and wall-clock, the ratio decides.",
        f"The paper's claim: an arm with half the steps ends below {baseline}. It is 'seen' if the interval of that difference "
        "is below zero, else 'not seen at this scale', also if the arm diverged, and 'not tested' by short or small runs. An "
        "arm that is exactly twice as fast would not be told apart, and counts as not seen.",
        f"A ratio is what {baseline} needs for the arm's final loss, divided by what the arm needed. It comes from a curve "
        f"through {baseline}'s final losses and is given only if the curve recognises {baseline} itself. Losses outside "
        f"{baseline}'s horizons are censored, not extrapolated. So the verdict's ratios are those of the arm's longest "
        f"horizon of which {baseline} has the double.",
        "Compute counts model FLOPs with curvature passes and without recomputation. Wall-clock uses reference times, "
        "counts of each kind of work times its cost on an idle machine "
        f"({times.source if times else 'none here: measure them with study.py times'}); the runs' own clocks are a diagnostic.",
    ]  # fmt: skip


def _lead(results: Results, model: str) -> Paragraph:
    """Say who is faster, by how much, how sure, and at what scale."""
    study, baseline = results.study, label(results.study.baseline)
    compared = [one.at.endpoints.horizon for one in results.verdicts if one.model == model and one.at]
    ends = study.endpoints(study.baseline, model)
    end = next((one for one in ends if one.horizon == max(compared, default=0)), ends[-1])
    words = {"faster": f"faster than {baseline}", "slower": f"slower than {baseline}"}
    said: dict[str, list[str]] = {word: [] for word in ("faster", "slower", "not told apart", "no verdict")}
    claims: dict[str, list[str]] = {}
    seeds: list[Endpoints] = []
    for one in sorted(results.verdicts, key=lambda one: [*said].index(one.word)):
        if one.model != model:
            continue
        same, shown = one.at.same if one.at else "", label(one.arm)
        half = one.paper.half if one.paper and not one.not_tested else ""
        tested = shown
        if isinstance(half, Contrast) and half.interval:
            tested += f" ({half.interval.text}, {half.horizon:,} steps against {half.baseline_horizon:,})"
        claims.setdefault(one.claim, []).append(tested)
        seeds += [one.at.endpoints] if one.at else []
        if isinstance(same, Contrast) and same.interval:
            where = "" if same.horizon == end.horizon else f", after {same.horizon:,}"
            shown += f" ({same.interval.text}{where})"
        said[one.word].append(shown)
    arms = "; ".join(f"{words.get(word, word)}: {', '.join(arms)}" for word, arms in said.items() if arms)
    untold = [*claims] == ["not tested"]
    claimed = "not tested" if untold else "; ".join(f"{claim}: {', '.join(arms)}" for claim, arms in claims.items())
    tokens, size = float(end.tokens.mean()), model_sizes(study).get(model, math.nan)
    scale = [f"{tokens / 1e6:,.3g}M tokens"]
    if math.isfinite(size):
        scale = [f"{size / 1e6:,.1f}M parameters", *scale, f"{tokens / size:.2g} tokens per parameter"]
    return Paragraph(
        f"{arms}. The paper's 2×: {claimed}. Differences of final loss in nats, {_seeds(seeds)}, "
        f"{results.study.level_text(model)} intervals.",
        f"{model}, after {end.horizon:,} steps ({', '.join(scale)})",
    )


def _views(results: Results) -> list[dict[str, Any]]:
    """Return the views of the chart of curves, a model and horizon each: plain lists at screen precision."""
    study, palette, views = results.study, colours(results.study.arm_names()), []
    for model in study.models:
        for horizon in sorted({run.horizon for run in study.runs(model=model)}, reverse=True):
            curves, found = [], curves_at(study, model, horizon)
            for arm, runs in found.items():
                steps, losses = seed_curves(runs, "steps")
                keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _CURVE_POINTS)).astype(int))
                costs = {currency: _rounded(seed_curves(runs, currency)[0][keep]) for currency in VERDICT_CURRENCIES}
                name = label(arm) + diverged_note(study, arm, model, horizon)
                curve: dict[str, Any] = {"label": name, "colour": palette[arm], "seeds": len(runs), "x": costs}
                for part, over_seeds in (("mean", np.mean), ("low", np.min), ("high", np.max)):
                    curve[part] = _rounded(over_seeds(losses[:, keep], axis=0))
                curves.append(curve)
            if curves:
                name = f"{model}, {horizon:,} steps"
                views.append({"name": name, "curves": curves, "range": _rounded(loss_limits(found, study.baseline))})
    return views


def _rounded(values: Any) -> list[float | None]:
    """Return a list for JSON, null for non-finite values."""
    return [significant(value) if math.isfinite(value) else None for value in np.asarray(values, float)]


def _title(results: Results) -> str:
    arms = [label(arm) for arm in results.study.arm_names() if arm != results.study.baseline]
    others = f"{', '.join(arms[:-1])} and {arms[-1]}" if len(arms) > 1 else "".join(arms) or "nothing"
    return f"{results.study.name}: {others} against {label(results.study.baseline)}"


def _facts(results: Results) -> str:
    study = results.study
    reported, tuning = (sum(trial.run is not None for trial in trials) for trials in (study.reporting, study.tuning))
    horizons = sorted({trial.horizon for trial in study.reporting})
    return (
        f"{reported:,} reported runs{f', {tuning:,} tuning runs' if tuning else ''}; {', '.join(study.models)}; "
        f"{_range(horizons)} steps; {_seeds(results.endpoints())}."
    )


def _seeds(ends: Sequence[Endpoints]) -> str:
    counts = sorted({len(end.seeds) for end in ends})
    return f"{_range(counts)} seed{'' if counts == [1] else 's'}"


def _range(numbers: Sequence[int]) -> str:
    ends = dict.fromkeys((numbers[0], numbers[-1])) if numbers else ()
    return " to ".join(f"{number:,}" for number in ends) or "no"
