"""A study's committed tables in W&B: a run for each trial, one with the comparison, and a report page.

Publishing again changes nothing, or updates what has changed: ids derive from the trial and its curve, rows that W&B has
are not sent again, the page shows the runs of its own publication (`revision`), and offline run directories replace the
earlier ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis import escaping, tables
from analysis.colours import label
from analysis.comparison import Contrast, Interval, Ratio
from analysis.results import CURRENCY_NAMES, VERDICT_CURRENCIES, Results, analyse
from analysis.trial_tables import TrialRow, by_trial, lines_of, read_curves, read_trials
from analysis.trials import is_study, load_study
from data.files import write_atomically
from training.config import TrackerConfig
from training.recording.trackers import WandbRun, WandbTracker, published_losses, report_url
from training.records import RecordError

REPORT_FILE = "report.json"  # the page's specification, beside W&B's run directories
COMPARISON = "comparison"  # the job type of the run that holds it


@dataclass(frozen=True)
class Published:
    runs: int
    destination: tuple[str, str] | None  # entity and project; None offline
    report: str  # the page's address, or the file with its specification


def publish(directory: Path, settings: TrackerConfig, warn: Callable[[str], None]) -> Published:
    """Publish the study of a directory. Offline, W&B's files lie in its wandb/, for `wandb sync`.

    Raises:
        RecordError: the directory holds no study, or its tables are damaged.
        ValueError: the baseline has no finished reported run.
    """
    if not is_study(directory):
        raise RecordError(f"{directory} holds no study; give a directory with trials.csv, such as results/cpu_scale")
    results = analyse(load_study([directory]))
    study, curves = results.study.name, by_trial(read_curves(directory))
    rows = [row for row in read_trials(directory) if row.summary and row.trial in curves]  # also those set aside since
    contents = {row.trial: content_hash(curves[row.trial]) for row in rows}
    revision = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]
    for earlier in (directory / "wandb").glob("offline-run-*"):
        shutil.rmtree(earlier)
    destination = None
    for row in rows:
        assert row.summary is not None
        run = of_trial(study, row, contents[row.trial], settings, revision)
        tracker = WandbTracker(run, settings, directory, warn)
        for number, line in enumerate(line for line in lines_of(curves[row.trial]) if line["kind"] != "event"):
            tracker.log(line, number)
        destination = tracker.destination
        tracker.finish(row.summary)
    WandbTracker(of_comparison(study, settings, revision), settings, directory, warn).finish(comparison(results))
    page = report_page(results, [row for row in rows if row.phase != "set aside"], settings, destination, revision)
    specification = page._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    written = directory / "wandb" / REPORT_FILE
    write_atomically(written, json.dumps(specification, indent=1) + "\n")
    if destination is None:
        return Published(len(rows) + 1, None, str(written))
    return Published(len(rows) + 1, destination, _save(page, destination))


def content_hash(curve: pa.Table) -> str:
    """Return a hash of the curve that a column without values does not change."""
    lines = [{key: value for key, value in line.items() if value is not None} for line in curve.to_pylist()]
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def of_trial(study: str, row: TrialRow, content: str, settings: TrackerConfig, revision: str) -> WandbRun:
    """Describe a trial with this `content_hash` of its curve: job type the arm; its place in the study also as configuration."""
    of_study = {"study": study, "arm": row.arm, "size": row.model, "phase": row.phase, "horizon": row.horizon}
    of_study["revision"] = revision
    of_study["cell"] = f"{label(row.arm)}, {row.horizon:,} steps"
    return WandbRun(
        name=row.trial,
        identity=f"{study}/{row.trial}/{content}",
        group=settings.group or f"{study}-{row.model}",
        job_type=row.arm,
        tags=(study, row.arm, row.model, row.phase, *settings.tags),
        config={**row.config, **of_study, "environment": row.environment},
    )


def of_comparison(study: str, settings: TrackerConfig, revision: str) -> WandbRun:
    return WandbRun(
        name=f"{study}: {COMPARISON}",
        identity=f"{study}/{COMPARISON}",
        group=settings.group or study,
        job_type=COMPARISON,
        tags=(study, COMPARISON, *settings.tags),
        config={"study": study, "phase": COMPARISON, "revision": revision},
    )


def comparison(results: Results) -> dict[str, Any]:
    """Return each arm's difference of final loss (nats) and speed-ups over the baseline with their intervals."""
    values: dict[str, Any] = {"status": "completed", "baseline": results.study.baseline}
    for one in results.verdicts:
        name = f"{one.model}/{one.arm}"
        values[f"verdict/{name}"] = one.sentence(results.study.baseline)
        if one.at is None:
            continue
        if isinstance(one.at.same, Contrast) and one.at.same.interval is not None:
            values |= _interval(f"difference/{name}", one.at.same.interval)
        if one.paper and isinstance(one.paper.half, Contrast) and one.paper.half.interval is not None:
            values |= _interval(f"difference_at_half_the_steps/{name}", one.paper.half.interval)
        for currency in VERDICT_CURRENCIES:
            ratio = one.rated.ratio_in(currency) if one.rated else ""
            if isinstance(ratio, Ratio) and ratio.censored is None:  # a bar cannot say "more than"
                values |= _interval(f"speedup_{CURRENCY_NAMES[currency]}/{name}", ratio)
    return values


def _interval(name: str, interval: Interval | Ratio) -> dict[str, float]:
    found = {name: interval.estimate, f"{name}/low": interval.low, f"{name}/high": interval.high}
    for end in ("low", "high"):
        if getattr(interval, f"{end}_censored", False):  # "more than" has no value to plot
            del found[f"{name}/{end}"]
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def report_page(
    results: Results, rows: list[TrialRow], settings: TrackerConfig, destination: tuple[str, str] | None, revision: str
) -> Any:
    """Build the page: the paper's panels for each model, beside the published losses where there are some.

    Runs of other revisions are of trials that have been run again, or removed.
    """
    import wandb_workspaces.reports.v2 as wr

    study = results.study
    doubts = [one.text for one in results.findings if one.severity == "serious"]
    told = [escaping.markdown(text) for text in (study.description, study.under_way, *doubts) if text]
    blocks: list[Any] = [wr.MarkdownBlock(text) for text in told]
    verdict = tables.markdown(tables.verdict(results))
    blocks += [wr.H2("Speed-ups"), wr.MarkdownBlock(re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", verdict))]
    speedups = [
        key for key in comparison(results) if key.startswith("speedup_") and not key.endswith(("/low", "/high"))
    ]
    entity, project = destination or ("", "")  # a run set of a project is looked up over the network

    def grid(title: str, filters: str, panels: Iterator[Any]) -> Any:
        published = f"Config('study') = '{study.name}' and Config('revision') = '{revision}'"
        runs = wr.Runset(entity=entity, project=project, name=title, filters=f"{published} and {filters}")
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    if speedups:
        bars = (
            wr.BarPlot(
                title=f"{label(study.baseline)}'s {name} over the arm's, at equal loss",
                metrics=[wr.SummaryMetric(key) for key in speedups if key.startswith(f"speedup_{name}/")],
            )
            for name in CURRENCY_NAMES.values()
        )
        blocks.append(grid(COMPARISON, f"Config('phase') = '{COMPARISON}'", bars))
    for model in study.models:
        of_model = [row for row in rows if row.model == model]
        references = list(dict.fromkeys(name for row in of_model for name in published_losses(row.config)))
        intervals = {k for row in of_model if (k := row.config["optimizer"].get("hessian_interval"))}
        of = f"Config('size') = '{model}' and Config('phase') = "
        blocks += [wr.H2(model), grid(model, f"{of}'reporting'", _curves(references, len(intervals)))]
        if intervals:
            blocks.append(grid(f"{model}, searches", f"{of}'tuning'", _grid()))
    title = f"{study.name}: arms against {label(study.baseline)}"  # `_save` finds the page by it
    return wr.Report(
        project=project or settings.project, entity=entity, title=title[:128], blocks=blocks, width="fluid"
    )


def _curves(references: list[str], intervals: int) -> Iterator[Any]:
    """The panels of reported runs: curves of each arm and horizon over each cost, unclipped fraction, k if it varies."""
    import wandb_workspaces.reports.v2 as wr

    by_cell: dict[str, Any] = {"groupby": wr.Config("cell"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    for axis, unit in {"tokens": "", "step": "", "flops": "model FLOPs", "seconds": "training seconds"}.items():
        title = f"Validation loss over {unit or axis}"
        yield wr.LinePlot(title=title, x=axis, y=["val/loss", *references], title_y="nats per token", **by_cell)
    if intervals:
        yield wr.LinePlot(title="Unclipped fraction", x="tokens", y=["train/unclipped_fraction"], **by_cell)
    if intervals > 1:
        k, loss = wr.Config("optimizer.hessian_interval"), wr.SummaryMetric("final_val_loss")
        yield wr.ScatterPlot(title="Final loss over k, steps between curvature estimates", x=k, y=loss, log_x=True)


def _grid() -> Iterator[Any]:
    """The panels of tuning runs: final loss over γ and β2, and over all hyper-parameters."""
    import wandb_workspaces.reports.v2 as wr

    loss = wr.SummaryMetric("final_val_loss")
    gamma, beta2 = wr.Config("optimizer.gamma"), wr.Config("optimizer.beta2")
    yield wr.ScatterPlot(title="Final loss over γ and β2", x=gamma, y=beta2, z=loss, log_x=True)
    searched = ("lr", "weight_decay", "gamma", "beta1", "beta2", "hessian_interval", "embedding_lr_ratio")
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(f"optimizer.{key}")) for key in searched]
    yield wr.ParallelCoordinatesPlot(title="Searches", columns=[*columns, wr.ParallelCoordinatesPlotColumn(loss)])


def _save(page: Any, destination: tuple[str, str]) -> str:
    """Save the page, in place of an earlier one of the same title, and return its address."""
    import wandb_workspaces.reports.v2 as wr

    earlier = report_url(*destination, page.title)
    if earlier is not None:
        page.id = wr.Report.from_url(earlier).id
    page.save()
    return str(page.url)
