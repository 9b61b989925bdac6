"""A study's result as a section of a page: one sentence, one table, its limits, and what others found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from analysis import escaping, tables
from analysis.results import Results, model_sizes

_DOUBTS = 2


def section(results: Results, directory: Path, page: Path, arm: str) -> str:
    """Return the section as Markdown, with links relative to `page`. Its first sentences are the verdicts on `arm`.

    Raises:
        ValueError: the study has no reported run of the arm.
    """
    study, place = results.study, escaping.href(directory, page.parent)
    verdicts = [one for one in results.verdicts if one.arm == arm]
    if not verdicts:
        raise ValueError(f"{directory} has no verdict on {arm!r}; choose one of {', '.join(study.arms)}")
    reported, tuning = (sum(trial.run is not None for trial in trials) for trials in (study.reporting, study.tuning))
    sizes, scales = model_sizes(study), []
    for one in verdicts:
        end = one.at.endpoints if one.at else study.endpoints(arm, one.model)[-1]
        tokens, size = float(end.tokens.mean()), sizes.get(one.model, math.nan)
        scales.append(
            f"{size / 1e6:.1f}M parameters, {end.horizon:,} steps, {tokens / 1e6:.1f}M tokens, {tokens / size:.2g} tokens "
            "per parameter"
        )
    limits = [
        f"Scale: {'; '.join(scales)}. The paper's smallest model has 125M parameters, 100,000 steps, 390 tokens per "
        "parameter. Short runs favour short averages (β1, β2) and leave little time to estimate the curvature.",
        *(escaping.markdown(f"{one.title}. {one.detail}") for one in results.findings[:_DOUBTS]),
    ]
    parts = [
        *([escaping.markdown(study.under_way)] if study.under_way else []),
        *(f"**{escaping.markdown(one.sentence(study.baseline))}**" for one in verdicts),
        _body(tables.verdict(results)),
        f"{reported:,} reported and {tuning:,} tuning runs of [{study.name}]({place}/README.md), with "
        f"[its report]({place}/report.md). Limits:",
        "\n".join(f"- {line}" for line in limits),
        "What others found:",
        _body(tables.published(results)),
    ]
    return "\n\n".join(part.strip() for part in parts)


def _body(table: tables.Table) -> str:
    """Return a table with its note, without heading and links to runs."""
    return tables.markdown(replace(table, linked="")).split("\n", 2)[2]
