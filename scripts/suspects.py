"""What explains Sophia-G's distance from AdamW in study=claim: contrasts of five studies, chosen before their first run.

    python scripts/suspects.py                results/claim/why.md and a figure for each suspect

A row is a sum of final validation losses with signs, paired by seed. Its interval is Student's t at 95 %, not corrected for
the number of rows. Runs of one seed start from the same weights and read the same tokens in all of these studies.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from analysis.comparison import Interval, paired_interval
from analysis.figures import save
from analysis.trials import load_study
from data.files import write_atomically
from training.exits import refuse
from training.records import RecordError

EPS, KINDS, POWER = "claim_eps", "claim_kinds", "claim_power"
SMALL, LARGE = "claim_batch_1k", "claim_batch_16k"

Cell = tuple[str, str]  # study, arm


@dataclass(frozen=True)
class Row:
    """A contrast: what is added, and what is subtracted."""

    text: str
    plus: tuple[Cell, ...]
    minus: tuple[Cell, ...]


def _row(text: str, study: str, arm: str, other: str) -> Row:
    return Row(text, ((study, arm),), ((study, other),))


SUSPECTS: dict[str, tuple[Row, ...]] = {
    "eps": (
        _row("ε 1.9e-6 − ε 1e-12", EPS, "sophiag_eps6", "sophiag_eps12"),
        _row("ε 2e-5 − ε 1.9e-6", EPS, "sophiag_eps5", "sophiag_eps6"),
        _row("ε 1e-12 without stale rows − with", EPS, "sophiag_fresh_rows", "sophiag_eps12"),
    ),
    "noise": (
        _row("Sophia-G − AdamW, 1,024 tokens a step", SMALL, "sophiag", "adamw"),
        _row("Sophia-G − AdamW, 4,096 tokens", KINDS, "sophiag", "adamw"),
        _row("Sophia-G − AdamW, 16,384 tokens", LARGE, "sophiag", "adamw"),
        Row("last − first", ((LARGE, "sophiag"), (SMALL, "adamw")), ((LARGE, "adamw"), (SMALL, "sophiag"))),
    ),
    "power": (
        _row("power 1 − AdamW", POWER, "sophiag", "adamw"),
        _row("power 0.75 − power 1", POWER, "sophiag_power75", "sophiag"),
        _row("power 0.5 − power 1", POWER, "sophiag_power50", "sophiag"),
        _row("power 0.5: training labels − sampled", POWER, "fisher_power50", "sophiag_power50"),
    ),
    "kinds": (
        _row("Sophia-G − AdamW", KINDS, "sophiag", "adamw"),
        _row("Sophia-G on embeddings − AdamW", KINDS, "on_embedding", "adamw"),
        _row("Sophia-G on attention − AdamW", KINDS, "on_attention", "adamw"),
        _row("Sophia-G on MLP − AdamW", KINDS, "on_mlp", "adamw"),
        _row("momentum-sign (h = 0) − Sophia-G", KINDS, "signum", "sophiag"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("results"), help="directory of the studies' tables")
    parser.add_argument(
        "--output", type=Path, default=Path("results/claim"), help="directory of the page and the figures"
    )
    options = parser.parse_args(arguments)
    try:
        losses = {
            cell: ends for study in (EPS, SMALL, LARGE, POWER, KINDS) for cell, ends in read(options.records, study)
        }
        text = ""
        for suspect, rows in SUSPECTS.items():
            found = {row.text: differences(losses, row) for row in rows}
            place = save(draw(found), options.output / f"why_{suspect}.png")
            text += f"![Differences of final loss: dots for seeds, mean and interval]({place.name})\n\n{table(found)}\n"
        write_atomically(options.output / "why.md", f"# Why: the contrasts\n\n{text}".rstrip() + "\n")
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    print(text)
    return 0


def read(records: Path, study: str) -> list[tuple[Cell, dict[int, float]]]:
    """Return the final losses of a study's reported runs by seed, for each arm."""
    found = load_study([records / study])
    return [
        ((study, arm), dict(zip(end.seeds, end.losses.tolist(), strict=True)))
        for arm in found.arm_names()
        for model in found.models
        for end in found.endpoints(arm, model)
    ]


def differences(losses: Mapping[Cell, Mapping[int, float]], row: Row) -> dict[int, float]:
    """Return the contrast at each seed that all of its cells have, nats.

    Raises:
        ValueError: they have no seed in common.
    """
    cells = (*row.plus, *row.minus)
    seeds = sorted(set.intersection(*({*losses.get(cell, {})} for cell in cells)))
    if not seeds:
        raise ValueError(f"{row.text}: no seed with runs of all of {', '.join('/'.join(cell) for cell in cells)}")
    return {
        seed: sum(losses[cell][seed] for cell in row.plus) - sum(losses[cell][seed] for cell in row.minus)
        for seed in seeds
    }


def interval(found: Mapping[int, float]) -> Interval:
    """Return the mean's interval; NaN ends for a single seed."""
    values = list(found.values())
    return paired_interval(values, 0.95) or Interval(values[0], float("nan"), float("nan"), 0.95)


def table(found: Mapping[str, Mapping[int, float]]) -> str:
    lines = ["| contrast of final losses, nats | mean [95% interval] | seeds |", "|:---|---:|---:|"]
    lines += [f"| {text} | {interval(values).text} | {len(values)} |" for text, values in found.items()]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Mapping[int, float]]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.5 * len(found)), layout="constrained")
    axis.axvline(0, color="black", linewidth=0.8)
    for place, values in enumerate(found.values()):
        one = interval(values)
        axis.plot(list(values.values()), [place] * len(values), "o", color="#8a8f98", markersize=4)
        axis.plot([one.low, one.high], [place, place], color="#c2342b", linewidth=1.6)
        axis.plot(one.estimate, place, "D", color="#c2342b", markersize=6)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlabel("difference of final validation loss, nats (below zero: the first is better)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
