"""A study's result as a section of a page: verdict, figure, limits, and comparison with published results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from analysis import escaping
from analysis.colours import label
from analysis.reference import PublishedLoss, load_reference
from analysis.results import Results, model_sizes
from analysis.tables import Cell, Table, markdown

FIGURE = "speedups"


def section(results: Results, directory: Path, page: Path, arm: str) -> str:
    """Return the section as Markdown.

    Args:
        directory: the study's directory, with its report.
        page: the page of the section; links are relative to it.
        arm: the arm of the verdict, on all models with reported runs of it.
    """
    parts = [
        verdict(results, directory, page, arm),
        f"![Speed-ups with their intervals]({escaping.href(directory, page.parent)}/figures/{FIGURE}.png)",
        limits(results, _models(results, arm)),
        markdown(side_by_side(results, arm)).split("\n", 2)[2],
    ]
    return "\n\n".join(part.strip() for part in parts)


def verdict(results: Results, directory: Path, page: Path, arm: str) -> str:
    """Return the section's first part: the arm's verdict, three sentences per model. Arguments as in `section`."""
    study, place = results.study, escaping.href(directory, page.parent)
    parts = [
        f"**{label(arm)} against a tuned {label(study.baseline)}** ([report]({place}/report.md), {_runs(results)}):"
    ]
    if study.under_way:
        parts.insert(0, escaping.markdown(study.under_way))
    for model in _models(results, arm):
        parts.append("\n".join(f"- {escaping.markdown(sentence)}" for sentence in results.sentences(arm, model)))
    return "\n\n".join(part.strip() for part in parts)


def limits(results: Results, models: Sequence[str]) -> str:
    """Return the limits of the study, in numbers."""
    study, sizes = results.study, model_sizes(results.study)
    said = []
    for model in models:
        longest = study.endpoints(study.baseline, model)[-1]
        tokens = float(longest.tokens.mean())
        said.append(
            f"{sizes[model] / 1e6:.1f}M parameters, {longest.horizon:,} steps, {tokens / 1e6:.1f}M tokens, "
            f"{tokens / sizes[model]:.1f} tokens per parameter"
        )
    return (
        f"**Limits**: the study says nothing about the paper's scale. The longest runs here have {'; '.join(said)}; the "
        "paper's smallest have 125M parameters, 100,000 steps, 49B tokens, 390 tokens per parameter. Runs of a few hundred "
        "steps favour short averages (β1, β2) and leave little time to estimate the curvature, so the result may not "
        "transfer. `study=paper_125m` makes the same comparison at the paper's scale; it needs GPUs."
    )


def side_by_side(results: Results, arm: str) -> Table:
    """Return the paper's claim, independent results and this study, one row per comparison at equal length."""
    study, reference = results.study, load_reference()
    rows = []
    for published in reference.losses:
        if published.arm != "adamw":
            continue
        for other in _opponents(published, reference.losses):
            difference = other.loss - published.loss
            rows.append(
                (
                    Cell("the paper" if published.source == "paper" else published.source),
                    Cell(published.size),
                    Cell(_length(published, other)),
                    Cell(f"{published.loss:.3f}"),
                    Cell(f"{_name(other.arm)} {other.loss:.3f}"),
                    Cell(f"{difference:+.3f}"),
                    Cell("2 (claimed)" if published.source == "paper" else "–"),
                )
            )
    sizes = model_sizes(study)
    baselines = {
        (one.endpoints.model, one.endpoints.horizon): one
        for one in results.finals
        if one.endpoints.arm == study.baseline
    }
    steps = {(one.model, one.horizon): one for one in results.speed_ups if (one.arm, one.currency) == (arm, "steps")}
    for one in results.finals:
        key = one.endpoints.model, one.endpoints.horizon
        if one.endpoints.arm != arm or key not in baselines or one.difference is None:
            continue
        interval = one.difference
        rows.append(
            (
                Cell(f"**{study.name}**"),
                Cell(f"{sizes[key[0]] / 1e6:.1f}M"),
                Cell(f"{key[1]:,} steps"),
                Cell(_loss(baselines[key].mean)),
                Cell(f"{label(arm)} {_loss(one.mean)}"),
                Cell(f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"),
                Cell(steps[key].text if key in steps else "–"),
            )
        )
    return Table(
        name="standing",
        title="Side by side",
        columns=("source", "size", "length", label(study.baseline), "Sophia", "difference, nats", "speed-up in steps"),
        rows=tuple(rows),
        note="Differences are Sophia's final validation loss less AdamW's at equal length, where not said otherwise; losses "
        "of different corpora and vocabularies do not compare with each other. Sources: results/reference.json.",
        numeric=(3, 4, 5, 6),
    )


def _opponents(published: PublishedLoss, losses: Sequence[PublishedLoss]) -> list[PublishedLoss]:
    """Return Sophia's losses from the same source at the same size and, if given, the same horizon."""
    return [
        one
        for one in losses
        if one.arm.startswith("sophia")
        and (one.source, one.size, one.chinchilla) == (published.source, published.size, published.chinchilla)
    ]


def _length(baseline: PublishedLoss, arm: PublishedLoss) -> str:
    if baseline.chinchilla is not None:
        return f"{baseline.chinchilla:g}× Chinchilla"
    if baseline.steps is None or arm.steps is None:
        return "equal"
    if baseline.steps != arm.steps:
        return f"{baseline.steps:,} steps, Sophia {arm.steps:,}"
    return f"{baseline.steps:,} steps"


def _name(arm: str) -> str:
    return "Sophia" if arm == "sophia" else label(arm)


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _models(results: Results, arm: str) -> list[str]:
    """Return the models with reported runs of the arm."""
    told = {one.model for one in results.headlines if one.arm == arm}
    return [model for model in results.study.models if model in told]


def _runs(results: Results) -> str:
    study = results.study
    reported = sum(trial.run is not None for trial in study.reporting)
    tuning = sum(trial.run is not None for trial in study.tuning)
    return f"{reported:,} reported runs and {tuning:,} tuning runs, with records"
