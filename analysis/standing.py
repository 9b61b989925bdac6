"""A study's result as a section of a page (one sentence, one table, its limits, what others found), or as a row of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from analysis import escaping, tables
from analysis.colours import label
from analysis.comparison import Contrast, Endpoints
from analysis.results import Results, Verdict, model_sizes

_SHORT_STEPS = 1000
_SHORT = " Short runs favour short averages (β1, β2) and leave little time to estimate the curvature."


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
    ends = [_end(results, one) for one in verdicts]
    scale = "; ".join(_scale(results, one) for one in verdicts)
    limits = [
        f"Scale: {scale}. The paper's smallest model has 125M parameters, 100,000 steps of 491,520 tokens, 390 tokens per "
        "parameter." + (_SHORT if all(one.horizon < _SHORT_STEPS for one in ends) else ""),
        *(
            escaping.markdown(one.text) + (f" [Figures]({place}/report.md#warnings)." if one.figures else "")
            for one in results.doubts
        ),
    ]
    parts = [
        *(f"**{escaping.markdown(one.sentence(study.baseline))}**" for one in verdicts),
        *(escaping.markdown(line) for line in _lengths(results, arm)),
        *(escaping.markdown(line) for line in _costs(results, arm)),
        *([escaping.markdown(study.under_way)] if study.under_way else []),
        _body(tables.verdict(results)),
        f"From {reported:,} reported and {tuning:,} tuning runs of [{study.name}]({place}/README.md), with "
        f"[its report]({place}/report.md): {escaping.markdown(study.description)} Limits, the strongest first:",
        "\n".join(f"- {line}" for line in limits),
        "What others found:",
        _body(tables.published_losses(results)),
    ]
    return "\n\n".join(part.strip() for part in parts)


def overview(studies: Sequence[tuple[Results, Path]], page: Path, arm: str) -> str:
    """Return one table of all studies as Markdown, with links relative to `page`: question, scale, answer on `arm`, doubts."""
    lines = ["| study | question | scale | answer | how sure |", "|:---|:---|:---|:---|:---|"]
    for results, directory in studies:
        study, verdicts = results.study, [one for one in results.verdicts if one.arm == arm]
        serious = sum(one.severity == "serious" for one in results.findings)
        seeds = sorted({len(end.seeds) for one in verdicts for end in study.endpoints(arm, one.model)})
        cells = [
            f"[{study.name}]({escaping.href(directory, page.parent)}/README.md)",
            study.description,
            "; ".join(_scale(results, one) for one in verdicts),
            " ".join(one.sentence(study.baseline) for one in verdicts),
            " to ".join(str(count) for count in sorted({*seeds[:1], *seeds[-1:]}))
            + f" seeds; serious doubts of the report: {serious or 'none'}"
            + (f". {study.under_way}" if study.under_way else ""),
        ]
        lines.append("| " + " | ".join([cells[0], *map(escaping.markdown, cells[1:])]) + " |")
    return "\n".join(lines)


def _lengths(results: Results, arm: str) -> Iterator[str]:
    """Yield, for each model, the arm's differences from the baseline at every horizon, if there are several."""
    study, baseline = results.study, label(results.study.baseline)
    planned = study.arms[arm].seeds
    for model in results.baselines:
        told = []
        for one in results.compared:
            end, same = one.endpoints, one.same
            if (end.arm, end.model) == (arm, model) and isinstance(same, Contrast) and same.interval:
                higher, n = int((same.differences > 0).sum()), len(same.seeds)
                more = planned.get((model, end.horizon), n) - n
                of = f"{n} seeds, {more} to come" if more > 0 else f"{n} seeds"
                told.append(f"{same.interval.text} after {end.horizon:,} (higher on {higher} of {of})")
        if len(told) > 1:
            ends = study.endpoints(study.baseline, model)[-2:]
            gain = (
                f" {baseline} gains {ends[0].mean - ends[1].mean:.3f} from {ends[0].horizon:,} to {ends[1].horizon:,}."
            )
            where = f"{label(arm)} minus {baseline} on {model} by number of steps"
            yield f"{where}: {'; '.join(told)}; nats, {study.level_text(model)} intervals.{gain}"


def _costs(results: Results, arm: str) -> Iterator[str]:
    """Yield, for each model, what a token costs the arm relative to the baseline, at the longest horizon of both."""
    names, baseline = {"flops": "FLOPs", "seconds": "time (reference times)"}, label(results.study.baseline)
    for model in results.baselines:
        prices = [one.prices for one in results.compared if (one.endpoints.arm, one.endpoints.model) == (arm, model)]
        told = [
            f"{price:.3f} times {baseline}'s {names[of]}" for of, price in (prices or [{}])[-1].items() if of in names
        ]
        if told:
            yield f"A token costs {label(arm)} on {model} {' and '.join(told)}."


def _end(results: Results, verdict: Verdict) -> Endpoints:
    return verdict.at.endpoints if verdict.at else results.study.endpoints(verdict.arm, verdict.model)[-1]


def _scale(results: Results, verdict: Verdict) -> str:
    """The size, and the shortest and longest run that the verdict and the paper's test compare."""
    end, size = _end(results, verdict), model_sizes(results.study).get(verdict.model, math.nan)
    half = verdict.paper.half if verdict.paper and not verdict.not_tested else None
    longest = half.baseline_horizon if isinstance(half, Contrast) else end.horizon
    horizons = sorted({end.horizon, max(end.horizon, longest)})
    per_step = float(end.tokens.mean()) / end.horizon
    steps = " to ".join(f"{horizon:,}" for horizon in horizons)
    each = " to ".join(f"{horizon * per_step / size:.2g}" for horizon in horizons)
    return f"{size / 1e6:.1f}M parameters, {steps} steps of {per_step:,.0f} tokens, {each} tokens per parameter"


def _body(table: tables.Table) -> str:
    """Return a table with its note, without heading and links to runs."""
    return tables.markdown(replace(table, linked="")).split("\n", 2)[2]
