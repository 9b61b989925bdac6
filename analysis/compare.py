"""Compare runs of one horizon: single runs, or a sweep, with each optimizer's best setting.

This is a demonstration. A study tests the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from analysis import escaping
from analysis.colours import colours, label
from analysis.comparison import paired_interval
from analysis.figures import loss_limits, panels, save, seed_curves
from analysis.guards import OPTIMIZER, SEED, Difference, differences
from analysis.runs import CURRENCIES, Currency, Curve, RecordedRun, load_runs
from analysis.sensitivity import settings
from analysis.trials import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Setting:
    """Runs of one optimizer that differ only in their seed."""

    arm: str  # the optimizer
    runs: tuple[RecordedRun, ...]  # ascending in seed; each completed or diverged
    values: str  # the learning rate and the other values that distinguish the settings: "lr=0.003, gamma=0.05"

    @property
    def loss(self) -> float:
        """Mean final validation loss over the seeds, nats; infinite if a run diverged."""
        losses = [run.final_val_loss for run in self.runs]
        return float(np.mean(losses)) if np.all(np.isfinite(losses)) else float("inf")

    @property
    def outcome(self) -> str:
        """The loss as text: "4.1234", or the number of diverged runs."""
        if np.isfinite(self.loss):
            return f"{self.loss:.4f}"
        lost = sum(not np.isfinite(run.final_val_loss) for run in self.runs)
        return "diverged" if lost == len(self.runs) else f"{lost} of {len(self.runs)} diverged"

    @cached_property
    def curve(self) -> Curve:
        """The evaluations averaged over seeds, at the steps that all runs have."""
        curves = [run.evaluations for run in self.runs]
        spent: dict[str, NDArray[np.float64]] = {one: seed_curves(curves, one)[0] for one in CURRENCIES}
        return Curve({**spent, "val_loss": seed_curves(curves, "steps")[1].mean(axis=0)})

    def differences(self, baseline: Setting) -> tuple[float, ...]:
        """Return final loss minus the baseline's at common seeds, nats; empty if a run diverged."""
        losses, others = ({run.seed: run.final_val_loss for run in one.runs} for one in (self, baseline))
        paired = [losses[seed] - others[seed] for seed in losses if seed in others]
        return tuple(paired) if np.all(np.isfinite(paired)) else ()

    def difference(self, baseline: Setting) -> str:
        """Return the mean difference as text, with the reach of its 95 % interval: "-0.0990 ± 0.0025"."""
        paired = self.differences(baseline)
        interval = paired_interval(paired, 0.95)
        reach = "" if interval is None else f" ± {interval.high - interval.estimate:.2g}"
        return f"{np.mean(paired):+.4f}{reach}" if paired else "–"

    def crossing(self, target: float, currency: Currency) -> float | None:
        """Return the cost at which the curve first is at or below a loss (nats); None if it never is."""
        return first_crossing(self.curve[currency], self.curve["val_loss"], target)


def first_crossing(spent: NDArray[np.float64], loss: NDArray[np.float64], target: float) -> float | None:
    """Return where a falling curve first is at or below `target`, linear in log cost between evaluations, or None.

    Args:
        spent: (n,) not negative, ascending.
        loss: (n,) nats; NaN (a diverged evaluation) is never at the target.
    """
    below = np.flatnonzero(loss <= target)
    if len(below) == 0:
        return None
    index = int(below[0])
    if index == 0 or not np.isfinite(loss[index - 1]):
        return float(spent[index])
    before, after = float(spent[index - 1]), float(spent[index])
    share = float((loss[index - 1] - target) / (loss[index - 1] - loss[index]))
    return before + share * (after - before) if before <= 0 else before * (after / before) ** share


@dataclass(frozen=True)
class Comparison:
    """The best setting of each optimizer at one horizon."""

    arms: list[Setting]  # the baseline's first
    settings: list[Setting]  # all, each optimizer's best first
    warnings: list[Difference]
    left_out: list[str]  # unfinished runs with their status

    @property
    def baseline(self) -> Setting:
        return self.arms[0]

    @property
    def target(self) -> float:
        """The baseline's final validation loss, mean over its seeds, nats."""
        return float(self.baseline.curve["val_loss"][-1])

    @property
    def is_sweep(self) -> bool:
        """Whether an optimizer has more than one setting."""
        return len(self.settings) > len(self.arms)

    @property
    def caveat(self) -> str:
        if self.is_sweep:
            return "one horizon, best setting of each optimizer, chosen on the seeds shown: exploratory, not a test"
        return f"one horizon, {'one seed' if self._seeds == 1 else f'{self._seeds} seeds'}: a demonstration, not a test"

    @property
    def _seeds(self) -> int:
        return max(len(one.runs) for one in self.arms)

    def table(self) -> Table:
        """Return a rich table: final loss, and the steps, FLOPs and seconds to the baseline's final loss."""
        baseline = label(self.baseline.arm)
        caption = [
            f"In brackets: the share of {baseline}'s cost. A crossing in the middle of a schedule is not a speed-up: a fair "
            "test compares fully decayed runs over seeds and horizons."
        ]
        if self._seeds > 1:
            caption.append(
                "Losses and curves are means over seeds; differences are paired by seed, ± gives their 95% interval."
            )
        caption += [f"NOT COMPARABLE ({warning.affects}): {warning}" for warning in self.warnings]
        title = f"Final validation loss, and the steps, FLOPs and seconds to {baseline}'s final loss\n({self.caveat})"
        table = _table(
            title,
            ("optimizer", "best setting" if self.is_sweep else "setting"),
            ("seeds", "final loss", f"− {baseline}", "steps", "FLOPs", "seconds"),
            caption="\n".join(caption),
        )
        for one in self.arms:
            difference = "" if one is self.baseline else one.difference(self.baseline)
            spent = [self._spent(one, currency) for currency in ("steps", "flops", "seconds")]
            table.add_row(*map(Text, (*_cells(one), difference, *spent)))
        return table

    def tried(self) -> Table:
        """Return a rich table of every setting with its final loss."""
        table = _table("All settings", ("optimizer", "setting"), ("seeds", "final loss"))
        for one in self.settings:
            table.add_row(*map(Text, _cells(one)))
        return table

    def plot(self, path: str | Path) -> Path:
        """Write a figure in the format of the suffix: validation loss over steps and over seconds, side by side.

        Raises:
            RecordError: the file cannot be written.
        """
        figure, axes = panels(["", ""], ylabel="validation loss (nats)", width=11, height=4.6, share_y=True)
        self._draw(axes[0], "steps", "training steps")
        self._draw(axes[1], "seconds", "training time (seconds)")
        axes[0].set_ylim(*loss_limits({one.arm: [one.curve] for one in self.arms}, self.baseline.arm))
        axes[0].legend(frameon=False, loc="upper right")
        figure.suptitle(f"Validation loss, the same model and data under each optimizer\n{self.caveat}", fontsize=11)
        return save(figure, Path(path))

    def _draw(self, axis: Axes, currency: Currency, title: str) -> None:
        palette = colours(one.arm for one in self.arms)
        axis.axhline(self.target, color=palette[self.baseline.arm], linestyle=(0, (5, 4)), linewidth=1.1, alpha=0.8)
        for one in self.arms:
            colour, values = palette[one.arm], f" ({one.values})" if self.is_sweep else ""
            if len(one.runs) > 1:
                spent, losses = seed_curves([run.evaluations for run in one.runs], currency)
                axis.fill_between(spent, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            name = escaping.figure(f"{label(one.arm)}{values}  {one.outcome}")
            axis.plot(one.curve[currency], one.curve["val_loss"], color=colour, linewidth=2, label=name)
            crossing = one.crossing(self.target, currency)
            if crossing is not None and one is not self.baseline:
                axis.plot(crossing, self.target, "o", color=colour, markerfacecolor="white", markersize=6, zorder=5)
        text = escaping.figure(f"{label(self.baseline.arm)}'s final loss, {self.target:.3f}")
        axis.annotate(text, (0.015, self.target), xycoords=("axes fraction", "data"), va="top", fontsize=8.5)
        axis.set_xlim(left=0)
        axis.set_xlabel(title)

    def _spent(self, one: Setting, currency: Currency) -> str:
        spent, own = (setting.crossing(self.target, currency) for setting in (one, self.baseline))
        if spent is None or own is None:
            return "not reached"
        amount = f"{spent:.3g}" if currency == "flops" or spent < 100 else f"{spent:,.0f}"
        return amount if one is self.baseline else f"{amount} ({spent / own:.0%})"


def compare_runs(directories: Sequence[str | Path], baseline: str = "adamw") -> Comparison:
    """Compare each optimizer's best setting with the baseline's, at one horizon.

    Runs that differ only in the seed are one setting. An optimizer's best setting has the lowest mean final loss among
    those with the most seeds. Differences other than the optimizer are shown below the table.

    Raises:
        ValueError: no run of the baseline is finished, or its best setting diverged.
    """
    ended: list[RecordedRun] = []
    left_out: list[str] = []
    for run in load_runs(directories):
        if run.status in ("completed", "diverged") and len(run.evaluations):
            ended.append(run)
        else:
            left_out.append(f"{run.origin.path}: {run.optimizer}, {run.status}")
    if not any(run.optimizer == baseline for run in ended):
        optimizers = ", ".join(dict.fromkeys(run.optimizer for run in ended)) or "none"
        waiting = f"; unfinished: {'; '.join(left_out)}; rerun a run's command to resume it" if left_out else ""
        raise ValueError(
            f"none of the {len(ended)} finished runs is of the baseline {baseline!r} (optimizers: {optimizers}): name "
            f"another with --baseline, or add its runs{waiting}"
        )
    ranked = sorted(_settings(ended), key=_rank)
    best: dict[str, Setting] = {}
    for one in ranked:
        best.setdefault(one.arm, one)
    arms = [best.pop(baseline), *best.values()]
    if not np.isfinite(arms[0].loss):
        raise ValueError(
            f"every setting of the baseline {baseline!r} has a diverged run: run it with a lower optimizer.lr"
        )
    order = [one.arm for one in arms]
    compared = [run for one in arms for run in one.runs]
    paired = len({frozenset(run.seed for run in one.runs) for one in arms}) == 1
    several = len({run.seed for run in compared}) > 1
    return Comparison(
        arms=arms,
        settings=sorted(ranked, key=lambda one: order.index(one.arm)),
        warnings=differences(compared, by_design=(*OPTIMIZER, *SEED) if paired and several else OPTIMIZER),
        left_out=left_out,
    )


def _settings(runs: Sequence[RecordedRun]) -> list[Setting]:
    """Group runs by everything that determines them except the seed."""
    groups: dict[str, dict[int, RecordedRun]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(settings(run).items())), {})[run.seed] = run
    found = []
    firsts = [next(iter(by_seed.values())) for by_seed in groups.values()]
    for first, by_seed in zip(firsts, groups.values(), strict=True):
        values, siblings = settings(first), [settings(one) for one in firsts if one.optimizer == first.optimizer]
        shown = {key for own in siblings for key in own if len({repr(one.get(key)) for one in siblings}) > 1}
        shown |= {"optimizer.lr"} & values.keys()
        ordered = sorted(shown, key=lambda key: (key != "optimizer.lr", key))
        text = ", ".join(f"{key.removeprefix('optimizer.')}={short(values.get(key))}" for key in ordered)
        found.append(Setting(first.optimizer, tuple(by_seed[seed] for seed in sorted(by_seed)), text))
    return found


def _rank(setting: Setting) -> tuple[bool, int, float]:
    """Return the sort key, best first: without a diverged run, with more seeds, with a lower loss."""
    return not np.isfinite(setting.loss), -len(setting.runs), setting.loss


def _cells(one: Setting) -> tuple[str, str, str, str]:
    return label(one.arm), one.values, str(len(one.runs)), one.outcome


def _table(title: str, texts: Sequence[str], numbers: Sequence[str], caption: str = "") -> Table:
    table = Table(
        title=Text(title),
        caption=Text(caption),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column in (*texts, *numbers):
        table.add_column(
            Text(column), justify="right" if column in numbers else "left", no_wrap=column in ("optimizer", "seeds")
        )
    return table
