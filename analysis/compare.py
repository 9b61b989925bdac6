"""Compare runs of one horizon: single runs, or a sweep, with each optimizer's best setting.

This is a demonstration. A study tests the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from analysis import escaping
from analysis.colours import colours, label
from analysis.comparison import paired_interval
from analysis.figures import dress, loss_limits, save, seed_curves
from analysis.guards import INCIDENTAL, OPTIMIZER, SEED, TIMING, Difference, differences, is_under
from analysis.runs import CURRENCIES, Currency, Curve, RecordedRun, flatten, load_runs
from analysis.trials import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Setting:
    """Runs of one optimizer that differ only in their seed."""

    optimizer: str
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


@dataclass(frozen=True)
class ComparedArm:
    """An optimizer's best setting."""

    setting: Setting
    curve: Curve  # evaluations, averaged over the seeds
    differences: tuple[float, ...]  # final loss minus the baseline's at common seeds, nats; empty if a run diverged

    @property
    def arm(self) -> str:
        return self.setting.optimizer

    @property
    def difference(self) -> str:
        """The mean difference as text, with the reach of its 95 % interval: "-0.0990 ± 0.0025"."""
        if not self.differences:
            return "–"
        interval = paired_interval(self.differences, 0.95)
        reach = "" if interval is None else f" ± {interval.high - interval.estimate:.2g}"
        return f"{np.mean(self.differences):+.4f}{reach}"

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
    """The best setting of each optimizer at one horizon, the baseline's first."""

    baseline: ComparedArm
    others: list[ComparedArm]
    settings: list[Setting]  # all settings
    target: float  # the baseline's final validation loss, mean over its seeds, nats
    warnings: list[Difference]
    left_out: list[str]  # unfinished runs with their status

    @property
    def arms(self) -> list[ComparedArm]:
        return [self.baseline, *self.others]

    @property
    def caveat(self) -> str:
        if self.is_sweep:
            return "one horizon, best setting of each optimizer, chosen on the seeds shown: exploratory, not a test"
        seeds = max(len(one.setting.runs) for one in self.arms)
        return f"one horizon, {'one seed' if seeds == 1 else f'{seeds} seeds'}: a demonstration, not a test"

    @property
    def is_sweep(self) -> bool:
        """Whether an optimizer has more than one setting."""
        return len(self.settings) > len(self.arms)

    def table(self) -> Table:
        """Return a rich table: final loss, and the steps, FLOPs and seconds to the baseline's final loss."""
        baseline = label(self.baseline.arm)
        title = f"Final validation loss, and the steps, FLOPs and seconds to {baseline}'s final loss\n({self.caveat})"
        table = _table(title, caption=Text(self._caption()), caption_justify="left")
        table.add_column("optimizer", no_wrap=True)
        table.add_column("best setting" if self.is_sweep else "setting")
        table.add_column("seeds", justify="right", no_wrap=True)
        table.add_column("final loss", justify="right")
        table.add_column(Text(f"− {baseline}"), justify="right")
        for currency in ("steps", "FLOPs", "seconds"):
            table.add_column(currency, justify="right")
        for one in self.arms:
            cells = (
                label(one.arm),
                one.setting.values,
                str(len(one.setting.runs)),
                one.setting.outcome,
                "" if one is self.baseline else one.difference,
                *(self._spent(one, currency) for currency in ("steps", "flops", "seconds")),
            )
            table.add_row(*map(Text, cells))
        return table

    def tried(self) -> Table:
        """Return a rich table of every setting with its final loss, each optimizer's best first."""
        table = _table("All settings")
        for column in ("optimizer", "setting", "seeds", "final loss"):
            table.add_column(column, justify="right" if column in ("seeds", "final loss") else "left")
        order = [one.arm for one in self.arms]
        for one in sorted(self.settings, key=lambda one: (order.index(one.optimizer), *_rank(one))):
            table.add_row(*map(Text, (label(one.optimizer), one.values, str(len(one.runs)), one.outcome)))
        return table

    def plot(self, path: str | Path) -> Path:
        """Write a figure in the format of the suffix: validation loss over steps and over seconds, side by side.

        Raises:
            RecordError: the file cannot be written.
        """
        # The object interface instead of pyplot: no display, no global state, nothing to close.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        self._draw(axes[0], "steps", "training steps")
        self._draw(axes[1], "seconds", "training time (seconds)")
        axes[0].set_ylabel("validation loss (nats)")
        axes[0].set_ylim(*loss_limits({one.arm: [one.curve] for one in self.arms}, self.baseline.arm))
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].legend(handles, labels, frameon=False, loc="upper right")
        figure.suptitle(f"Validation loss, the same model and data under each optimizer\n{self.caveat}", fontsize=11)
        return save(figure, Path(path))

    def _draw(self, axis: Axes, currency: Currency, title: str) -> None:
        palette = colours(compared.arm for compared in self.arms)
        axis.axhline(self.target, color=palette[self.baseline.arm], linestyle=(0, (5, 4)), linewidth=1.1, alpha=0.8)
        for compared in self.arms:
            setting, colour = compared.setting, palette[compared.arm]
            if len(setting.runs) > 1:
                spent, losses = seed_curves([run.evaluations for run in setting.runs], currency)
                axis.fill_between(spent, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            name = label(compared.arm) + (f" ({setting.values})" if self.is_sweep else "")
            axis.plot(
                compared.curve[currency],
                compared.curve["val_loss"],
                color=colour,
                linewidth=2,
                label=escaping.figure(f"{name}  {setting.outcome}"),
            )
            crossing = compared.crossing(self.target, currency)
            if crossing is not None and compared is not self.baseline:
                axis.plot(crossing, self.target, "o", color=colour, markerfacecolor="white", markersize=6, zorder=5)
        text = escaping.figure(f"{label(self.baseline.arm)}'s final loss, {self.target:.3f}")
        axis.annotate(text, (0.015, self.target), xycoords=("axes fraction", "data"), va="top", fontsize=8.5)
        axis.set_xlim(left=0)
        axis.set_xlabel(title)
        dress(axis)

    def _spent(self, compared: ComparedArm, currency: Currency) -> str:
        spent, own = (one.crossing(self.target, currency) for one in (compared, self.baseline))
        if spent is None or own is None:
            return "not reached"
        amount = f"{spent:.3g}" if currency == "flops" or spent < 100 else f"{spent:,.0f}"
        return amount if compared is self.baseline else f"{amount} ({spent / own:.0%})"

    def _caption(self) -> str:
        lines = [
            f"In brackets: the share of {label(self.baseline.arm)}'s cost. A crossing in the middle of a schedule is not a "
            "speed-up: a fair test compares fully decayed runs over seeds and horizons."
        ]
        if max(len(one.setting.runs) for one in self.arms) > 1:
            lines.append(
                "Losses and curves are means over seeds; differences are paired by seed, ± gives their 95% interval."
            )
        lines += [f"NOT COMPARABLE ({warning.affects}): {warning}" for warning in self.warnings]
        return "\n".join(lines)


def compare_runs(directories: Sequence[str | Path], baseline: str = "adamw") -> Comparison:
    """Compare each optimizer's best setting with the baseline's, at one horizon.

    Runs that differ only in the seed are one setting. An optimizer's best setting has the lowest mean final loss among
    those with the most seeds. Differences other than the optimizer are shown below the table.

    Args:
        directories: run directories, including some of the baseline.
        baseline: the optimizer to compare with.

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
    settings = _settings(ended)
    best: dict[str, Setting] = {}
    for one in sorted(settings, key=_rank):
        best.setdefault(one.optimizer, one)
    reference = best.pop(baseline)
    target = float(_mean_curve(reference.runs)["val_loss"][-1])
    if not np.isfinite(reference.loss):
        raise ValueError(
            f"every setting of the baseline {baseline!r} has a diverged run: run it with a lower optimizer.lr"
        )
    chosen = [reference, *best.values()]
    compared = [ComparedArm(one, _mean_curve(one.runs), _paired(one, reference)) for one in chosen]
    seeds = {run.seed for run in ended}
    return Comparison(
        baseline=compared[0],
        others=compared[1:],
        settings=settings,
        target=target,
        warnings=differences(
            [run for one in chosen for run in one.runs], by_design=OPTIMIZER if len(seeds) == 1 else (*OPTIMIZER, *SEED)
        ),
        left_out=left_out,
    )


def _settings(runs: Sequence[RecordedRun]) -> list[Setting]:
    """Group runs by everything that determines them except the seed."""
    ignored = (*INCIDENTAL, *TIMING, "seed", "seeds")
    values = [{k: v for k, v in flatten(run.config).items() if not is_under(k, ignored)} for run in runs]
    groups: dict[str, dict[int, RecordedRun]] = {}
    of: dict[str, tuple[str, dict[str, object]]] = {}
    for run, own in zip(runs, values, strict=True):
        key = repr(sorted(own.items()))
        groups.setdefault(key, {})[run.seed] = run
        of[key] = run.optimizer, own
    settings = []
    for key, by_seed in groups.items():
        optimizer = next(iter(by_seed.values())).optimizer
        siblings = [own for name, own in of.values() if name == optimizer]
        differing = {name for own in siblings for name in own if len({repr(one.get(name)) for one in siblings}) > 1}
        shown = [
            f"{name.removeprefix('optimizer.')}={short(of[key][1].get(name))}"
            for name in ("optimizer.lr", *sorted(differing - {"optimizer.lr"}))
            if name in of[key][1] or name in differing
        ]
        settings.append(Setting(optimizer, tuple(by_seed[seed] for seed in sorted(by_seed)), ", ".join(shown)))
    return settings


def _rank(setting: Setting) -> tuple[bool, int, float]:
    """Return the sort key, best first: without a diverged run, with more seeds, with a lower loss."""
    return not np.isfinite(setting.loss), -len(setting.runs), setting.loss


def _mean_curve(runs: Sequence[RecordedRun]) -> Curve:
    """Return the evaluations averaged over seeds, at the steps that all runs have."""
    curves = [run.evaluations for run in runs]
    spent: dict[str, NDArray[np.float64]] = {currency: seed_curves(curves, currency)[0] for currency in CURRENCIES}
    return Curve({**spent, "val_loss": seed_curves(curves, "steps")[1].mean(axis=0)})


def _paired(one: Setting, reference: Setting) -> tuple[float, ...]:
    losses, others = ({run.seed: run.final_val_loss for run in setting.runs} for setting in (one, reference))
    paired = [losses[seed] - others[seed] for seed in losses if seed in others]
    return tuple(paired) if np.all(np.isfinite(paired)) else ()


def _table(title: str, **options: Any) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    return Table(title=Text(title), pad_edge=False, show_edge=False, **look, **options)
