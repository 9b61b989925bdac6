"""A few runs of one horizon and one seed side by side: a demonstration, which a study then puts to the test."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from analysis.colours import colours, label
from analysis.guards import OPTIMIZER, Difference, differences
from analysis.records import Currency, Run, load_runs
from analysis.target import TimeToTarget, times_to_target
from training.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAVEAT = "one horizon, one seed: a demonstration, not a test"


@dataclass(frozen=True)
class ComparedRun:
    """One run, and what it had spent when it first reached the baseline's final loss."""

    run: Run
    arm: str  # the optimizer's name, made unique where an optimizer comes twice
    to_target: dict[Currency, TimeToTarget]


@dataclass(frozen=True)
class Comparison:
    """Runs of one horizon and one seed, the baseline first."""

    baseline: ComparedRun
    others: list[ComparedRun]
    target: float  # the baseline's final validation loss, nats
    warnings: list[Difference]

    @property
    def runs(self) -> list[ComparedRun]:
        return [self.baseline, *self.others]

    def table(self) -> Table:
        """A rich table: final loss, and the steps, FLOPs and seconds to the baseline's final loss."""
        baseline = label(self.baseline.arm)
        table = Table(
            title=f"Final validation loss, and the steps, FLOPs and seconds to {baseline}'s final loss\n({_CAVEAT})",
            caption=self._caption(),
            caption_justify="left",
            title_justify="left",
        )
        table.add_column("optimizer")
        table.add_column("final loss", justify="right")
        table.add_column(f"− {baseline}", justify="right")
        for currency in ("steps", "FLOPs", "seconds"):
            table.add_column(currency, justify="right", no_wrap=True)
        for compared in self.runs:
            final = compared.run.final_val_loss
            gap = "" if compared is self.baseline else f"{final - self.target:+.4f}" if np.isfinite(final) else "–"
            table.add_row(
                label(compared.arm),
                f"{final:.4f}" if np.isfinite(final) else compared.run.status,
                gap,
                *(self._spent(compared, currency) for currency in ("steps", "flops", "seconds")),
            )
        return table

    def plot(self, path: str | Path) -> Path:
        """Write a PNG (or what the suffix says): validation loss over steps and over seconds, side by side."""
        # The object interface, with no pyplot: no display, no global state, nothing to close.
        from matplotlib.figure import Figure

        path = Path(path)
        figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        self._draw(axes[0], "steps", "training steps")
        self._draw(axes[1], "seconds", "training time (seconds)")
        axes[0].set_ylabel("validation loss (nats)")
        axes[0].set_ylim(*self._loss_limits())
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].legend(handles, labels, frameon=False, loc="upper right")
        figure.suptitle(f"Validation loss, the same model and data under each optimizer\n{_CAVEAT}", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
        write_atomically(path, content.getvalue())
        return path

    def _draw(self, axis: Axes, currency: Currency, title: str) -> None:
        palette = colours(compared.arm for compared in self.runs)
        axis.axhline(self.target, color=palette[self.baseline.arm], linestyle=(0, (5, 4)), linewidth=1.1, alpha=0.8)
        for compared in self.runs:
            curve = compared.run.evaluations
            emphasis = 2.4 if compared.arm.startswith("sophia") else 1.8
            axis.plot(
                curve.axis(currency),
                curve["val_loss"],
                color=palette[compared.arm],
                linewidth=emphasis,
                label=f"{label(compared.arm)}  {_final(compared.run)}",
                solid_capstyle="round",
            )
            crossing = compared.to_target[currency]
            if crossing.reached and compared is not self.baseline:
                axis.plot(crossing.spent, self.target, "o", color=palette[compared.arm], markersize=6.5, zorder=5)
                axis.plot(crossing.spent, self.target, "o", color="white", markersize=2.5, zorder=6)
        axis.annotate(
            f"{label(self.baseline.arm)}'s final loss, {self.target:.3f}",
            xy=(0.015, self.target),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=palette[self.baseline.arm],
        )
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlim(left=0)
        axis.set_xlabel(title)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)

    def _loss_limits(self) -> tuple[float, float]:
        """The loss falls fastest in the first steps, where nothing is compared: show what comes after a twelfth."""
        lowest, highest = self.target, self.target
        for compared in self.runs:
            curve = compared.run.evaluations
            late = curve["val_loss"][curve.steps >= compared.run.horizon / 12]
            if len(late) and np.isfinite(late).any():
                lowest = min(lowest, float(np.nanmin(late)))
                # The first of the late losses: a divergence later on may leave the picture.
                highest = max(highest, float(late[np.isfinite(late)][0]))
        margin = 0.06 * max(highest - lowest, 1e-3)
        return lowest - 2 * margin, highest + margin

    def _spent(self, compared: ComparedRun, currency: Currency) -> str:
        spent = compared.to_target[currency]
        if not spent.reached:
            return "not reached"
        amount = f"{spent.spent:.3g}" if currency == "flops" else f"{spent.spent:,.0f}"
        if compared is self.baseline:
            return amount
        share = spent.spent / self.baseline.to_target[currency].spent
        return f"{amount} ({share:.0%})"

    def _caption(self) -> str:
        lines = [
            f"In brackets: the share of what {label(self.baseline.arm)} spent. A crossing in the middle of a schedule "
            "is no speed-up: the fair test compares runs that are each decayed to the end, over seeds and horizons."
        ]
        lines += [f"NOT COMPARABLE ({warning.affects}): {warning}" for warning in self.warnings]
        return "\n".join(lines)


def compare_runs(directories: Sequence[str | Path], baseline: str = "adamw") -> Comparison:
    """Compare one run per optimizer with the baseline's, all of one horizon and one seed.

    Differences beside the optimizer are labelled in the table, not hidden.

    Args:
        directories: run directories, the baseline's among them.
        baseline: the optimizer that the others are held against.

    Raises:
        ValueError: not exactly one run of the baseline among them, or it did not complete.
    """
    runs = load_runs(directories)
    candidates = [run for run in runs if run.optimizer == baseline]
    if len(candidates) != 1:
        raise ValueError(
            f"{len(candidates)} of the {len(runs)} runs are of the baseline {baseline!r} "
            f"(the optimizers are {', '.join(run.optimizer for run in runs) or 'none'}): give exactly one"
        )
    reference = candidates[0]
    target = reference.final_val_loss
    if not np.isfinite(target):
        raise ValueError(
            f"the baseline run {reference.directory} has no final validation loss (its status is "
            f"{reference.status!r}): let it finish, `python train.py` with the same arguments resumes it"
        )
    times = [run.optimizer for run in runs]
    compared = [
        ComparedRun(
            run=run,
            arm=run.optimizer if times.count(run.optimizer) == 1 else f"{run.optimizer} ({run.name})",
            to_target=times_to_target(run.evaluations, target),
        )
        for run in runs
    ]
    return Comparison(
        baseline=next(one for one in compared if one.run is reference),
        others=[one for one in compared if one.run is not reference],
        target=target,
        warnings=differences(runs, by_design=OPTIMIZER),
    )


def _final(run: Run) -> str:
    return f"{run.final_val_loss:.3f}" if np.isfinite(run.final_val_loss) else run.status
