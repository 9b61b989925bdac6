"""A study's result as a section of a page: one sentence, one table, its limits, and what others found."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from analysis import escaping
from analysis.colours import label
from analysis.comparison import Endpoints
from analysis.reference import PublishedLoss, load_reference
from analysis.results import VERDICT_CURRENCIES, Results, Verdict, model_sizes

_LIMITS = 3


def section(results: Results, directory: Path, page: Path, arm: str) -> str:
    """Return the section as Markdown.

    Args:
        directory: the study's directory, with its report.
        page: the page of the section; links are relative to it.
        arm: the arm of the sentence.

    Raises:
        ValueError: the study has no reported run of the arm.
    """
    verdicts = [one for one in results.verdicts if one.arm == arm]
    if not verdicts:
        raise ValueError(f"{directory} has no verdict on {arm!r}; choose one of {', '.join(results.study.arms)}")
    study = results.study
    reported, tuning = (sum(trial.run is not None for trial in trials) for trials in (study.reporting, study.tuning))
    place = escaping.href(directory, page.parent)
    parts = [
        *([escaping.markdown(study.under_way)] if study.under_way else []),
        *(f"**{escaping.markdown(one.sentence(study.baseline))}**" for one in verdicts),
        f"[Report]({place}/report.md) of [{study.name}]({place}/README.md): {reported:,} reported runs and {tuning:,} tuning "
        f"runs. Losses are final validation losses in nats, means over seeds; differences are paired by seed.",
        _table(results),
        "**Limits**",
        "\n".join(f"- {line}" for line in limits(results, verdicts)),
        "**Published results** of Sophia against AdamW. Losses of different data and vocabularies do not compare.",
        published(),
    ]
    return "\n\n".join(parts)


def limits(results: Results, verdicts: list[Verdict]) -> list[str]:
    """Return the scale of the runs, and the strongest reasons to doubt the result."""
    sizes, said = model_sizes(results.study), []
    for one in verdicts:
        end = one.at.endpoints if one.at else results.study.endpoints(one.arm, one.model)[-1]
        tokens = float(end.tokens.mean())
        size = sizes.get(one.model, math.nan)
        said.append(
            f"{size / 1e6:.1f}M parameters, {end.horizon:,} steps, {tokens / 1e6:.1f}M tokens, {tokens / size:.2g} "
            "tokens per parameter"
        )
    scale = (
        f"Scale: {'; '.join(said)}. The paper's smallest model has 125M parameters, 100,000 steps, 390 tokens per "
        "parameter. Short runs favour short averages (β1, β2) and leave little time to estimate the curvature."
    )
    doubts = [f"{one.title}. {one.detail}" for one in results.findings[: _LIMITS - 1]]
    return [scale, *map(escaping.markdown, doubts)]


def _table(results: Results) -> str:
    study = results.study
    rows = []
    for model in study.models:
        own = [one for one in results.verdicts if one.model == model and one.at is not None]
        for horizon in sorted({one.at.endpoints.horizon for one in own if one.at}):
            baseline = next(end for end in study.endpoints(study.baseline, model) if end.horizon == horizon)
            rows.append(_row(baseline, [""] * (2 + len(VERDICT_CURRENCIES))))
            for one in own:
                assert one.at is not None
                if one.at.endpoints.horizon == horizon:
                    same, ratios = one.at.same, [one.at.ratio_in(currency) for currency in VERDICT_CURRENCIES]
                    shown = "–" if isinstance(same, str) or same.interval is None else same.interval.text
                    told = ["–" if isinstance(ratio, str) else ratio.text for ratio in ratios]
                    rows.append(_row(one.at.endpoints, [shown, *told, one.word]))
    names = [f"minus {label(study.baseline)}", "ratio in steps", "in compute", "in wall-clock", "verdict"]
    table = pd.DataFrame(rows, columns=["model", "arm", "steps", "loss", *names])
    told = [column for column in table if not set(table[column]) <= {"", "–"}]
    return str(table[told].to_markdown(index=False, disable_numparse=True))


def _row(end: Endpoints, rest: list[str]) -> list[str]:
    loss = f"{end.mean:.3f}" if math.isfinite(end.mean) else f"{len(end.diverged)} of {len(end.seeds)} diverged"
    return [escaping.markdown(end.model), escaping.markdown(label(end.arm)), f"{end.horizon:,}", loss, *rest]


def published() -> str:
    """Return published pairs of Sophia and AdamW as a Markdown table."""
    reference = load_reference()
    rows = []
    for baseline in reference.losses:
        for other in reference.losses:
            if baseline.arm != "adamw" or not other.arm.startswith("sophia") or not _paired(baseline, other):
                continue
            rows.append(
                {
                    "source": baseline.source,
                    "size": baseline.size,
                    "length": _length(baseline, other),
                    "AdamW": f"{baseline.loss:.3f}",
                    "Sophia": f"{other.loss:.3f}" + ("" if other.arm == "sophia" else f" ({label(other.arm)})"),
                    "difference": f"{other.loss - baseline.loss:+.3f}",
                    "to know": reference.flaws.get(baseline.source, ""),
                }
            )
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def _paired(one: PublishedLoss, other: PublishedLoss) -> bool:
    return (one.source, one.size, one.chinchilla) == (other.source, other.size, other.chinchilla)


def _length(baseline: PublishedLoss, arm: PublishedLoss) -> str:
    if baseline.chinchilla is not None:
        return f"{baseline.chinchilla:g}× Chinchilla"
    if baseline.steps is None or arm.steps is None:
        return "equal"
    if baseline.steps != arm.steps:
        return f"{baseline.steps:,} steps, Sophia {arm.steps:,}"
    return f"{baseline.steps:,} steps"
