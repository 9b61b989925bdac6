"""How far the rows of the token embedding move and how well their tokens are predicted, by how often these occur.

    python scripts/rare_rows.py                          runs in runs/rare_rows; results/claim_eps/rare_rows.{csv,png}
    python scripts/rare_rows.py train.steps=500          with any overrides of the runs

The runs are first trials of study=claim_eps (Sophia-G with the paper's ε, a larger one, and without the steps of stale rows)
and of claim_kinds (AdamW). Finished runs are not rerun.
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
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.colours import colours, label
from analysis.figures import save
from data import TokenDataset, ValidationWindows
from data.errors import DataError
from data.files import write_atomically
from downstream.inference import open_trained
from studies.expansion import expand
from studies.spec import load_spec
from training.compose import compose
from training.config import ConfigurationError, RunConfig, SophiaConfig
from training.corpus import token_directory_of
from training.exits import refuse
from training.records import RecordError, RunRecord
from training.reliability.checkpoints import Checkpoint, CheckpointError, available
from training.run import execute

ARMS = {
    "sophiag_eps12": "claim_eps",
    "sophiag_eps6": "claim_eps",
    "sophiag_fresh_rows": "claim_eps",
    "adamw": "claim_kinds",
}
SEED = 1000
BETWEEN = 100  # steps between two checkpoints
ROWS = "token_embedding.weight"
BINS = (0.0, 0.25, 1.0, 4.0, 16.0, 64.0, np.inf)  # occurrences of a token in a batch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Means over the tokens of one bin, the columns of their rows and the second half of a run."""

    arm: str
    least: float  # occurrences in a batch
    below: float
    tokens: int
    moved: float  # |change between two checkpoints|
    straight: float  # of what the rates allow: 1 if every step went the same way by the whole rate
    whole_rate: float  # share of the entries that a step moves by the whole rate; NaN for other rules than Sophia's
    targets: int  # validation targets that are such tokens
    loss: float  # their mean validation loss at the end, nats


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of all runs")
    parser.add_argument("--work", type=Path, default=Path("runs/rare_rows"), help="directory of the runs")
    parser.add_argument(
        "--output", type=Path, default=Path("results/claim_eps"), help="directory of the table and figure"
    )
    options = parser.parse_args(arguments)
    try:
        return measure(options.overrides, options.work, options.output)
    except (CheckpointError, ConfigurationError, DataError, OSError, RecordError) as error:
        return refuse(error)


def measure(overrides: Sequence[str], work: Path, output: Path) -> int:
    """Train what is not trained yet, and write the table and the figure; return the exit code."""
    found: list[Bin] = []
    for arm, study in ARMS.items():
        first = next(trial for trial in expand(load_spec(study), {}).trials if trial.arm == arm)
        own = (
            f"output_dir={work}",
            f"name={arm}",
            f"seed={SEED}",
            f"checkpoint.interval={BETWEEN}",
            "checkpoint.keep=1000000",
        )
        config = compose([*first.overrides, *own, *overrides])
        outcome = execute(config)
        if outcome.status != "completed":
            return outcome.exit_code
        found += bins(arm, config, outcome.directory)
    table = pd.DataFrame(found)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "rare_rows.csv", table.to_csv(index=False, float_format="%.4g"))
    save(draw(table), output / "rare_rows.png")
    print(table.to_string(index=False))
    return 0


def bins(arm: str, config: RunConfig, directory: Path) -> list[Bin]:
    """Return the means of a finished run."""
    per_batch = occurrences(config)
    ratio = config.optimizer.embedding_lr_ratio
    rates = {line["step"]: ratio * line["lr"] for line in RunRecord.open(directory).metrics("train")}
    saved = [Checkpoint(path) for path in reversed(available(directory / "checkpoints"))]
    late = [one for one in saved if one.step >= config.train.steps // 2]
    if len(late) < 2:
        raise ConfigurationError(f"train.steps={config.train.steps}: give at least {2 * BETWEEN}")
    rows = [one.tensor(f"model.{ROWS}").numpy()[: len(per_batch)] for one in late]
    moved = np.array([np.abs(after - before).mean(axis=1) for before, after in itertools.pairwise(rows)])
    allowed = [
        sum(rates[step] for step in range(early.step + 1, later.step + 1)) for early, later in itertools.pairwise(late)
    ]
    straight = (moved / np.array(allowed)[:, None]).mean(axis=0)
    whole = np.mean([whole_rate(config, one)[: len(per_batch)] for one in late], axis=0)
    losses, targets = validation_losses(config, directory, len(per_batch))
    found = []
    for least, below in itertools.pairwise(BINS):
        inside = (per_batch >= least) & (per_batch < below)
        if inside.any():
            count = int(targets[inside].sum())
            found.append(
                Bin(
                    arm=arm,
                    least=least,
                    below=below,
                    tokens=int(inside.sum()),
                    moved=float(moved.mean(axis=0)[inside].mean()),
                    straight=float(straight[inside].mean()),
                    whole_rate=float(whole[inside].mean()),
                    targets=count,
                    loss=float(losses[inside].sum() / count) if count else float("nan"),
                )
            )
    return found


def validation_losses(config: RunConfig, directory: Path, vocabulary: int) -> tuple[Array, Array]:
    """Return the summed validation losses (nats) and the number of targets by token, (V,) each, of the last checkpoint."""
    trained = open_trained(directory)
    split = TokenDataset(token_directory_of(config), "validation")
    windows = ValidationWindows(split, config.eval.tokens, config.train.sequence_length)
    losses, counts = np.zeros((2, vocabulary))
    for batch in windows.batches(16):
        logits = trained.model.logits(torch.from_numpy(batch.tokens))
        targets = torch.from_numpy(batch.targets).flatten()
        each = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        known = targets >= 0
        losses += np.bincount(targets[known], weights=each[known], minlength=vocabulary)
        counts += np.bincount(targets[known], minlength=vocabulary)
    return losses, counts


def occurrences(config: RunConfig) -> Array:
    """Return how often each token occurs in a batch on average, (V,)."""
    stream = TokenDataset(token_directory_of(config), "train")
    length = config.train.sequence_length
    starts = np.arange(0, stream.tokens - length, length)
    tokens, targets = np.empty((2, len(starts), length), dtype=np.int64)
    stream.read(starts, tokens, targets)
    return np.bincount(tokens.ravel(), minlength=stream.vocab_size) * config.train.global_batch_size / len(starts)


def whole_rate(config: RunConfig, checkpoint: Checkpoint) -> Array:
    """Return the share of each row's entries that Sophia's momentum moves by the whole rate, (V,); NaN for other rules."""
    optimizer = config.optimizer
    if not isinstance(optimizer, SophiaConfig):
        return np.full(checkpoint.shape(f"model.{ROWS}")[0], np.nan)
    momentum, curvature = (checkpoint.tensor(f"optimizer.{ROWS}.{key}") for key in ("exp_avg", "hessian"))
    denominator = (optimizer.gamma * curvature.clamp(min=0)).clamp(min=optimizer.eps)
    whole: Array = (momentum.abs() >= denominator).double().mean(dim=1).numpy()
    return whole


def draw(table: pd.DataFrame) -> Figure:
    """Draw movement, the share at the whole rate, and the loss minus AdamW's, against a token's occurrences in a batch."""
    figure, (movement, share, loss) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    ticks = [f"< {BINS[1]:g}", *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(BINS[1:-1]))]
    ticks.append(f"≥ {BINS[-2]:g}")
    adamw = table[table.arm == "adamw"].set_index("least").loss
    for arm, colour in colours(table.arm).items():
        own = table[table.arm == arm].set_index("least")
        places = [BINS.index(least) for least in own.index]
        line = {"color": colour, "marker": "o", "label": label(arm)}
        movement.plot(places, own.moved, **line)
        if own.whole_rate.notna().any():
            share.plot(places, own.whole_rate, **line)
        loss.plot(places, own.loss - adamw, **line)
    movement.set(title=f"mean |change| of an entry in {BETWEEN} steps", yscale="log")
    share.set(title="share of entries at the whole rate", ylim=(0, 1))
    loss.set(title="validation loss minus AdamW's (nats)")
    for axis in (movement, share, loss):
        axis.set_xlabel("occurrences of the row's token in a batch")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.grid(alpha=0.3)
    movement.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
