"""How far the rows of the token embedding move, by how often their token occurs.

    python scripts/rare_rows.py                          runs in runs/rare_rows; results/claim_why/rare_rows.{csv,png}
    python scripts/rare_rows.py train.steps=500          with any overrides of the runs

The runs are first trials of study=claim_why: Sophia-G, Sophia-G with the paper's ε, the same without the steps of stale rows,
and AdamW. In n steps, a row that keeps its direction moves by the sum of their rates, and one whose direction is random by
about the root of n of it. Finished runs are not rerun.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.colours import colours, label
from analysis.figures import save
from data.dataset import TokenDataset
from data.files import write_atomically
from studies.expansion import expand
from studies.spec import load_spec
from training.compose import compose
from training.config import RunConfig
from training.corpus import token_directory_of
from training.records import RunRecord
from training.reliability.checkpoints import Checkpoint, available
from training.run import execute

STUDY = "claim_why"
ARMS = ("sophiag", "sophiag_eps12", "sophiag_fresh_rows", "adamw")
BETWEEN = 100  # steps between two checkpoints
ROWS = "token_embedding.weight"
BINS = (0.0, 0.25, 1.0, 4.0, 16.0, 64.0, np.inf)  # occurrences of a token in a batch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Movement:
    """Means over the tokens of one bin, the columns of their rows and the second half of a run."""

    arm: str
    least: float  # occurrences in a batch
    below: float
    tokens: int
    moved: float  # |change between two checkpoints| over the sum of the rates between them
    whole_rate: float  # share of the entries that the next step moves by the whole rate; NaN for AdamW


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of all runs")
    parser.add_argument("--work", type=Path, default=Path("runs/rare_rows"), help="directory of the runs")
    parser.add_argument(
        "--output", type=Path, default=Path("results") / STUDY, help="directory of the table and figure"
    )
    options = parser.parse_args(arguments)
    first = {trial.arm: trial.overrides for trial in reversed(expand(load_spec(STUDY), {}).trials)}
    found: list[Movement] = []
    for arm in ARMS:
        own = (f"output_dir={options.work}", f"name={arm}", f"checkpoint.interval={BETWEEN}", "checkpoint.keep=1000000")
        config = compose([*first[arm], *own, *options.overrides])
        outcome = execute(config)
        if outcome.status != "completed":
            return outcome.exit_code
        found += movements(arm, config, outcome.directory)
    table = pd.DataFrame(found)
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "rare_rows.csv", table.to_csv(index=False, float_format="%.4g"))
    save(draw(found), options.output / "rare_rows.png")
    print(table.to_string(index=False))
    return 0


def movements(arm: str, config: RunConfig, directory: Path) -> list[Movement]:
    """Return the means of a finished run."""
    often = occurrences(config)
    ratio = config.optimizer.embedding_lr_ratio
    rates = {line["step"]: ratio * line["lr"] for line in RunRecord.open(directory).metrics("train")}
    saved = [Checkpoint(path) for path in reversed(available(directory / "checkpoints"))]
    late = [one for one in saved if one.step >= config.train.steps // 2]
    weights = [one.tensor(f"model.{ROWS}").numpy()[: len(often)] for one in late]
    sums = [
        sum(rates[step] for step in range(early.step + 1, later.step + 1)) for early, later in itertools.pairwise(late)
    ]
    moved = np.mean([moved_by(*pair) for pair in zip(weights, weights[1:], sums, strict=False)], axis=0)
    whole = np.mean([whole_rate(config, one)[: len(often)] for one in late], axis=0)
    found = []
    for least, below in itertools.pairwise(BINS):
        inside = (often >= least) & (often < below)
        if inside.any():
            means = float(moved[inside].mean()), float(whole[inside].mean())
            found.append(Movement(arm, least, below, int(inside.sum()), *means))
    return found


def occurrences(config: RunConfig) -> Array:
    """Return how often each token occurs in a batch on average, (V,)."""
    stream = TokenDataset(token_directory_of(config), "train")
    length = config.train.sequence_length
    starts = np.arange(0, stream.tokens - length, length)
    tokens, targets = np.empty((2, len(starts), length), dtype=np.int64)
    stream.read(starts, tokens, targets)
    return np.bincount(tokens.ravel(), minlength=stream.vocab_size) * config.train.global_batch_size / len(starts)


def moved_by(before: Array, after: Array, rates: float) -> Array:
    """Return the mean change of each row's entries, (V,), over the sum of the rates of the steps between."""
    return np.abs(after - before).mean(axis=1) / rates


def whole_rate(config: RunConfig, checkpoint: Checkpoint) -> Array:
    """Return the share of each row's entries that Sophia's momentum moves by the whole rate, (V,); NaN for AdamW."""
    optimizer = config.optimizer
    if optimizer.name == "adamw":
        return np.full(checkpoint.shape(f"model.{ROWS}")[0], np.nan)
    values = optimizer.model_dump()
    values |= values.get("arguments", {})
    momentum, curvature = (checkpoint.tensor(f"optimizer.{ROWS}.{key}") for key in ("exp_avg", "hessian"))
    denominator = (values["gamma"] * curvature.clamp(min=0)).clamp(min=values["eps"])
    whole: Array = (momentum.abs() >= denominator).double().mean(dim=1).numpy()
    return whole


def draw(found: Sequence[Movement]) -> Figure:
    """Draw both quantities against a token's occurrences in a batch, a line for each arm."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ticks = [f"< {BINS[1]:g}", *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(BINS[1:-1]))]
    ticks.append(f"≥ {BINS[-2]:g}")
    paint = colours(one.arm for one in found)
    for panel, (axis, title) in enumerate(
        zip(axes, (f"change in {BETWEEN} steps / sum of the rates", "share of entries at the whole rate"), strict=True)
    ):
        for arm, colour in paint.items():
            own = [one for one in found if one.arm == arm]
            values = [one.whole_rate if panel else one.moved for one in own]
            axis.plot([BINS.index(one.least) for one in own], values, "o-", color=colour, label=label(arm))
        axis.set(xlabel="occurrences of the row's token in a batch", ylabel=title, ylim=(0, None))
        axis.set_xticks(range(len(ticks)), ticks)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
