"""Contrasts of final losses over several studies, paired by seed: a table and a figure.

Runs of one seed start from the same weights and read the same tokens also in different studies of one model and corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis.comparison import Interval, paired_interval
from analysis.figures import forest, panels
from analysis.trials import load_study

Cell = tuple[str, str]  # study, arm


@dataclass(frozen=True)
class Combination:
    """What is added, and what is subtracted."""

    text: str
    plus: tuple[Cell, ...]
    minus: tuple[Cell, ...]


@dataclass(frozen=True)
class Difference:
    """A contrast at each of its seeds, and its mean's interval; None for a single seed."""

    text: str
    by_seed: Mapping[int, float]  # nats
    interval: Interval | None

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(self.by_seed.values())


def read_losses(records: Path, studies: Iterable[str]) -> dict[Cell, dict[int, float]]:
    """Return the final losses of the reported runs by seed, for each arm and ablation.

    Raises:
        FileNotFoundError, RecordError: as `load_study`.
        ValueError: a study is unfinished, has several models or horizons, or a reported run diverged.
    """
    found: dict[Cell, dict[int, float]] = {}
    for name in studies:
        study = load_study([records / name])
        if study.under_way:
            raise ValueError(study.under_way)
        for arm in study.arm_names("arm", "ablation"):
            ends = [end for model in study.models for end in study.endpoints(arm, model)]
            if len(ends) != 1:
                raise ValueError(f"{name}: {arm} has {len(ends)} cells of reported runs; a contrast takes one")
            if ends[0].diverged:
                raise ValueError(f"{name}: runs of {arm} diverged with seeds {', '.join(map(str, ends[0].diverged))}")
            found[name, arm] = dict(zip(ends[0].seeds, ends[0].losses.tolist(), strict=True))
    return found


def differences(losses: Mapping[Cell, Mapping[int, float]], family: Sequence[Combination]) -> list[Difference]:
    """Return a family of contrasts, with intervals of 95 % that are corrected for their number (Bonferroni).

    Raises:
        ValueError: a contrast's cells have no seed in common.
    """
    level = 1 - 0.05 / len(family)
    found = []
    for one in family:
        cells = (*one.plus, *one.minus)
        seeds = sorted(set.intersection(*({*losses.get(cell, {})} for cell in cells)))
        if not seeds:
            raise ValueError(f"{one.text}: no seed with runs of all of {', '.join('/'.join(cell) for cell in cells)}")
        by_seed = {
            seed: sum(losses[cell][seed] for cell in one.plus) - sum(losses[cell][seed] for cell in one.minus)
            for seed in seeds
        }
        found.append(Difference(one.text, by_seed, paired_interval(list(by_seed.values()), level)))
    return found


def table(found: Sequence[Difference]) -> str:
    """Return a Markdown table."""
    level = 1 - 0.05 / len(found)
    lines = [f"| contrast of final losses, nats | mean [{100 * level:.4g}% interval] | seeds |", "|:---|---:|---:|"]
    for one in found:
        shown = one.interval.text if one.interval else f"{one.differences[0]:+.3f} (one seed)"
        lines.append(f"| {one.text} | {shown} | {len(one.by_seed)} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Difference]) -> Figure:
    """Draw a row for each contrast: seeds, mean and interval."""
    figure, (axis,) = panels([""], width=8, height=0.8 + 0.5 * len(found))
    rows = [(one.text, one, "#c2342b") for one in found]
    forest(axis, rows, "difference of final validation loss, nats (below zero: the first is better)")
    return figure
