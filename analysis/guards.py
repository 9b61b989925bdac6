"""Checks that find unfair comparisons and doubtful numbers in the records; a report shows them first.

A comparison of optimizers is fair if the runs differ only in the optimizer and its own hyper-parameters, if what the arms
share is equal or tuned in all of them, if all were tuned with the same effort, and if no loss is read in the middle of a
schedule.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any, Literal

from scipy import special

from analysis.colours import label
from analysis.comparison import Contrast, Endpoints, Interval, contrast
from analysis.runs import Origin, RecordedRun, flatten
from analysis.trial_tables import leaves
from analysis.trials import Cell, RecordedTrial, Study, short
from analysis.tuning import MATTERS, Edge, Tuning, edges, predicted_gain, tunings
from analysis.wallclock import seconds_per_occurrence

# Keys (and all below them) that do not affect what is measured.
INCIDENTAL = (
    *("name", "output_dir", "overwrite", "tracker", "launcher", "checkpoint", "profile"),
    *("data.directory", "data.local"),
    "train.shared_forward",  # its effect is compared instead
)
# Keys that do not change the loss curve (determinism contract) but change the timing.
TIMING = (
    *("strategy", "train.micro_batch_size", "train.compile", "train.deterministic", "train.device"),
    *("eval.micro_batch_size", "environment.hardware", "environment.world_size"),
)
# Whether curvature passes had their own forward, which changes FLOPs and seconds but not losses.
FORWARD = "curvature.forward"
# What distinguishes the arms of a comparison.
OPTIMIZER = ("optimizer",)

# What may differ between the horizons of an arm.
HORIZON = ("train.steps", "eval.interval", "schedule.warmup_steps", "schedule.warmup_share")
SEED = ("seed", "seeds", "environment.initial_weights_sha256")

# Hyper-parameters that are an arm's own: they mean something else in each optimizer, and may differ. Every other key that
# at least two arms have must be equal or searched in all.
_OWN = (
    *("name", "factory", "arguments", "betas[1]", "momentum", "eps", "gamma", "clip", "hessian_interval", "estimator"),
    *("batch_fraction", "bias_correction", "label_draws", "warm_start", "unclipped_target"),
)
OWN = tuple(f"optimizer.{key}" for key in _OWN)
EMBEDDINGS_RATE = "optimizer.embedding_lr_ratio"
# Of the shared keys, those worth as much as the effects that are measured.
_WARMUP = ("schedule.warmup_steps", "schedule.warmup_share")
_DECISIVE = ("optimizer.lr", EMBEDDINGS_RATE, "optimizer.decay_embeddings", *_WARMUP)
# Values of shared keys that a record may lack.
_DEFAULTS: dict[str, Any] = {EMBEDDINGS_RATE: 1.0, "optimizer.decay_embeddings": True}

# A larger share of steps with a clipped gradient norm, and a larger difference between clocks of the same work, are found.
_OFTEN_CLIPPED = 0.3
_DRIFT = 0.03
# A loss difference (nats) too small to tune for, even with little seed noise.
_MATTERS = 0.002

Affects = Literal["loss", "seconds", "FLOPs and seconds"]
Severity = Literal["serious", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "note")

# What runs differ in, and the consequence for a comparison.
_UNFAIR: dict[Affects, tuple[str, str]] = {
    "loss": ("more than the optimizer", "A difference of loss between them may not be due to the optimizer."),
    "seconds": ("what affects timing", "Losses are not affected; compare seconds by the reference-time model."),
    "FLOPs and seconds": (
        "the price of a curvature pass",
        "Losses are not affected; a ratio in compute or seconds holds for the prices that were paid. Runs of one "
        "train.shared_forward under one kind of strategy pay one price.",
    ),
}


@dataclass(frozen=True)
class Difference:
    """A key in which runs should not differ, with its value by run name."""

    key: str
    values: dict[str, Any]

    @property
    def affects(self) -> Affects:
        if self.key == FORWARD:
            return "FLOPs and seconds"
        return "seconds" if is_under(self.key, TIMING) else "loss"

    def __str__(self) -> str:
        runs_of: dict[str, list[str]] = {}
        for run, value in self.values.items():
            runs_of.setdefault(repr(value), []).append(run)
        shown = "; ".join(f"{value} in {_some(runs)}" for value, runs in runs_of.items())
        return f"{self.key}: {shown}"


# The order of findings, strongest doubt first: serious ones about the baseline, since every verdict rests on it; then other
# serious ones; then notes. Within each, by the guard that found them, in this order.
GUARDS = (
    *(
        "baseline",
        "machine",
        "fairness",
        "shared",
        "schedule",
        "seeds",
        "budget",
        "tuning",
        "edge",
        "curve",
        "diverged",
    ),
    *("set aside", "records", "degenerate", "clipping", "clock", "code", "figure"),
)


@dataclass(frozen=True)
class Finding:
    """A warning to the reader. A serious finding puts the verdict in doubt; a note qualifies it."""

    guard: str  # which check found it, of GUARDS
    severity: Severity
    title: str
    detail: str
    runs: tuple[Origin, ...] = ()
    baseline: bool = False  # whether it concerns the baseline
    figures: str = ""  # behind the detail, for a page that has room for them

    @property
    def text(self) -> str:
        return f"{self.severity.capitalize()}: {self.title}. {self.detail}".strip()

    @property
    def weight(self) -> float:
        """The larger, the stronger the doubt; see GUARDS."""
        rank = GUARDS.index(self.guard)
        baseline = self.baseline or self.guard in ("baseline", "curve")
        return (self.severity == "serious") * (2 + baseline) - rank / (len(GUARDS) + 1)


def differences(runs: Sequence[RecordedRun], *, by_design: Iterable[str] = OPTIMIZER) -> list[Difference]:
    """Return keys of configuration and environment in which the runs differ, unless at or below a key of `by_design`."""
    ignored = (*INCIDENTAL, *by_design)
    flattened = {run.name: _comparable_values(run) for run in runs}
    keys = sorted({key for values in flattened.values() for key in values if not is_under(key, ignored)})
    found = []
    for key in keys:
        values = {run: flat.get(key) for run, flat in flattened.items() if key != FORWARD or key in flat}
        if len({repr(value) for value in values.values()}) > 1:
            found.append(Difference(key, values))
    return found


def inspect(study: Study) -> list[Finding]:
    """Run every check on a study; the strongest doubts come first, as GUARDS says."""
    searches = tunings(study)
    checks = (
        *(_damaged, _reproduced, _fairness, _shared, _decayed, _seeds, _diverged, _budgets, _set_aside),
        *(_degenerate, _clipping, _clock, _code),
    )
    found = [finding for check in checks for finding in check(study)]
    found += [*_edges(study, searches), *_under_tuned(study, searches), *_lower_ablations(study, searches)]
    found += _single_runs(study, searches)
    return sorted(found, key=lambda finding: -finding.weight)


def _damaged(study: Study) -> Iterator[Finding]:
    """Records that cannot be read and are left out."""
    if study.damaged:
        count = len(study.damaged)
        title = f"{count} damaged record{' is' if count == 1 else 's are'} left out"
        yield Finding("records", "serious", title, study.left_out)


def _reproduced(study: Study) -> Iterator[Finding]:
    """Reported runs whose rerun ends farther from the record than other seeds do."""
    told, trials = [], []
    for trial in study.reporting:
        apart = study.reruns.get(trial.origin.name)
        losses = [one.loss for one in study.reporting if one.cell == trial.cell and math.isfinite(one.loss)]
        if apart is not None and len(losses) > 1 and apart > (spread := stdev(losses)):
            told.append(f"{_where(trial.cell)}: {apart:.2g} nats, where seeds differ by {spread:.2g}")
            trials.append(trial)
    if told:
        title = f"The machine of the rerun does not reproduce the records: {told[0]}"
        detail = "Runs made there cannot be compared with the records; look for other versions and threads."
        yield _finding(study, "machine", "serious", title, f"{'; '.join(told)}. {detail}", trials)


def _fairness(study: Study) -> Iterator[Finding]:
    """Differences other than the optimizer within a cell, and other than the horizon between cells of a model."""
    declared = tuple(sorted({key.split("[")[0] for arm in study.arms.values() for key in arm.search}))
    within = (*OPTIMIZER, *declared)
    between = (*within, *HORIZON, *SEED)
    groups: dict[tuple[tuple[str, ...], tuple[Any, ...]], list[RecordedRun]] = {}  # by what may differ, and cell
    for trial, run in _compared(study):
        groups.setdefault((within, (trial.model, trial.horizon, trial.seed)), []).append(run)
        groups.setdefault((between, (trial.model,)), []).append(run)
    for name, arm in study.arms.items():
        if arm.of is not None:
            groups[(*between, "model", *arm.varies), (name,)] = study.runs(arm=name) + study.runs(arm=arm.of)
    values: dict[str, dict[str, Any]] = {}
    for (allowed, _), runs in groups.items():
        for difference in differences(runs, by_design=allowed):
            values.setdefault(difference.key, {}).update(difference.values)
    trials = {trial.run.name: trial for trial in study.reporting if trial.run is not None}
    for affects, (what, consequence) in _UNFAIR.items():
        found = [one for key in values if (one := Difference(key, values[key])).affects == affects]
        if found:
            title = f"Runs differ in {what}: {_some([one.key for one in found])}"
            detail = f"{'. '.join(map(str, found))}. {consequence}"
            names = dict.fromkeys(name for one in found for name in one.values)
            severity: Severity = "serious" if affects == "loss" else "note"
            yield _finding(study, "fairness", severity, title, detail, [trials[name] for name in names])


def _shared(study: Study) -> Iterator[Finding]:
    """Hyper-parameters that several arms have, and that are neither equal nor searched in all of them."""
    optimizers = {trial.arm: run.optimizer for trial, run in _compared(study)}
    if len({*optimizers.values()}) < 2:  # settings of one optimizer are what is compared
        return
    declared = {key for arm in optimizers for key in study.arms[arm].search}
    tried: dict[tuple[str, str], set[str]] = {}  # by arm and key
    for trial in study.tuning:
        for key, value in trial.values.items():
            tried.setdefault((trial.arm, key), set()).add(short(value))
    # A search that tried one value is none.
    searched = {cell for cell, points in tried.items() if len(points) > 1}
    values: dict[tuple[str, str], dict[str, set[str]]] = {}  # by key and model, and arm
    for trial, run in _compared(study):
        for key, value in (_DEFAULTS | leaves(run.config)).items():
            if (key in declared or is_under(key, OPTIMIZER)) and not is_under(key, OWN):
                values.setdefault((key, trial.model), {}).setdefault(trial.arm, set()).add(short(value))
    unfair: dict[str, str] = {}
    for (key, _), by_arm in values.items():
        given = {arm: "searched" for arm in by_arm if (arm, key) in searched}
        unequal = any(not (a <= b or b <= a) for a, b in itertools.combinations(by_arm.values(), 2))
        # Equal rates are not fair either: that of one optimizer says nothing of another's.
        unequal |= key == "optimizer.lr" and len({optimizers[arm] for arm in by_arm}) > 1
        if len(given) == len(by_arm) or not (given or unequal):
            continue
        given |= {arm: " and ".join(sorted(by_arm[arm])) for arm in by_arm if arm not in given}
        arms_by_value = {value: [arm for arm in given if given[arm] == value] for value in given.values()}
        told = "; ".join(f"{value} for {_labels(arms)}" for value, arms in arms_by_value.items())
        unfair.setdefault(key, f"{key}: {told}.")
    decisive = (*_DECISIVE, *(["optimizer.weight_decay"] if study.planned else []))
    for severity in SEVERITIES:
        keys = [key for key in unfair if (key in decisive) == (severity == "serious")]
        if keys:
            detail = f"{' '.join(unfair[key] for key in keys)} What arms share must be equal or searched in all."
            title = f"Not tuned in every arm: {', '.join(keys)}"
            yield Finding("shared", severity, title, detail, baseline=True)
    plain = {
        arm for (key, _), by_arm in values.items() if key == EMBEDDINGS_RATE for arm in by_arm if by_arm[arm] == {"1"}
    }
    plain -= {arm for arm in optimizers if (arm, EMBEDDINGS_RATE) in searched or optimizers[arm] == "muon"}
    if plain and "muon" in optimizers.values():
        told = _labels(arm for arm in optimizers if arm in plain)
        title = f"Muon trains the embeddings by AdamW; their rate was not searched in {told}"
        detail = f"Part of Muon's difference may be that of the embeddings: search {EMBEDDINGS_RATE} in every arm."
        baseline = optimizers.get(study.baseline) == "muon"
        yield Finding("shared", "serious", title, detail, baseline=baseline)


def _decayed(study: Study) -> Iterator[Finding]:
    ended = [(trial, trial.run.config["schedule"]) for trial in study.reporting if trial.run is not None]
    if constant := [trial for trial, schedule in ended if float(schedule.get("final_ratio", 0.0)) > 0.5]:
        title = "Runs whose learning rate does not decay"
        detail = "The comparison is of the ends of fully decayed runs; these end at more than half of the peak rate."
        yield _finding(study, "schedule", "serious", title, detail, constant)


def _seeds(study: Study) -> Iterator[Finding]:
    reported = {trial.seed for trial in study.reporting}
    advice = "Hyper-parameters chosen on a seed fit its noise; report on seeds that the search has not seen."
    if both := sorted({trial.seed for trial in study.tuning} & reported):
        title = f"Seeds used for tuning are reported: {', '.join(map(str, both))}"
        yield Finding("seeds", "serious", title, advice, baseline=True)
    known = {name: seeds for name, seeds in study.builds_on.items() if seeds is not None}
    if seen := sorted(frozenset().union(*known.values()) & reported):
        title = f"Reported seeds were used to choose settings: {', '.join(map(str, seen))}"
        detail = f"This study builds on {', '.join(known)}, which ran them. {advice}"
        yield Finding("seeds", "serious", title, detail, baseline=True)
    for name in sorted(study.builds_on.keys() - known.keys()):
        title = f"{name}, on which this study builds, has no tables"
        detail = "Whether the reported seeds chose settings there is not known; its directory belongs next to this one."
        yield Finding("seeds", "note", title, detail)
    cells: dict[Cell, list[RecordedTrial]] = {}
    for trial in study.reporting:
        cells.setdefault(trial.cell, []).append(trial)
    lacking: list[RecordedTrial] = []
    ended: dict[Cell, int] = {}
    open_ = {cell: [trial for trial in members if not trial.ended] for cell, members in cells.items()}
    # While a study is under way, a cell waits for its seeds, unless the verdict has no other; the baseline's curve uses all.
    whole = {cell[:2] for cell, missing in open_.items() if not missing and not study.finished}
    whole -= {cell[:2] for cell in open_ if cell[0] == study.baseline}
    for cell, missing in open_.items():
        ended[cell] = len(cells[cell]) - len(missing)
        decides = study.arms[cell[0]].role == "arm" and cell[:2] not in whole
        lacking += missing if study.finished or (ended[cell] and decides) else []
    if lacking:
        told = "; ".join(f"{_where(trial.cell)}: seed {trial.seed} {trial.status}" for trial in lacking)
        why = "The number of seeds was fixed beforehand; a verdict on fewer is provisional"
        detail = f"{why if study.planned else 'What is said of these arms rests on the others alone'}. {told}."
        title = (
            f"{'Planned seeds' if study.planned else 'Runs'} have not ended: {_counted(trial.arm for trial in lacking)}"
        )
        yield _finding(study, "seeds", "serious", title, detail, lacking)
    if not study.planned and len({*ended.values()}) > 1:
        shown = "; ".join(f"{_where(cell)}: {ended[cell]}" for cell in sorted(ended))
        yield Finding("seeds", "note", "Cells have different numbers of seeds", shown)


def _diverged(study: Study) -> Iterator[Finding]:
    kinds: tuple[tuple[str, str, str, Severity, str], ...] = (
        ("Reported runs", "reporting", "arm", "serious", "Their cells are undecided; they are not dropped."),
        ("Tuning runs", "tuning", "arm", "note", "Diverged trials count against the arm's budget."),
        ("Runs of ablations", "reporting", "ablation", "note", "They do not affect the verdict."),
    )
    for name, phase, role, severity, detail in kinds:
        trials = [trial for trial in study.trials if trial.phase == phase and study.arms[trial.arm].role == role]
        if lost := [trial for trial in trials if trial.status == "diverged"]:
            title = f"{name} diverged: {_counted((t.arm for t in lost), [t.arm for t in trials])}"
            yield _finding(study, "diverged", severity, title, detail, lost)


def _edges(study: Study, searches: Sequence[Tuning]) -> Iterator[Finding]:
    """Values whose optimum may lie outside of what was tried; runs beyond the edge answer it."""
    found = edges(study, searches)
    if not found:
        return
    open_ = [edge for edge in found if edge.is_open]
    shown = _choices(open_ or found)
    own = sum(arm == study.baseline for arm, *_ in _choices(open_))
    title = f"{len(shown)} settings are" if len(shown) > 1 else "1 setting is"
    title += " at the edge of what was tried"
    title += f", {own} of them the baseline's" if own else ""
    steps = sorted({one.horizon for edge in found for one in edge.beyond})
    after = " and ".join(f"{one:,}" for one in steps)
    title += "" if open_ else f"; runs beyond it of {after} steps exclude a gain of {MATTERS:g} nats"
    at_edge = _grouped((edge.key, label(edge.arm)) for edge in open_)
    told = "; ".join(f"{key} ({', '.join(arms)})" for key, arms in at_edge.items())
    detail = f"The optimum may lie outside; widen the search. {told}." if told else ""
    detail += " An under-tuned baseline makes every other arm look good." if own else ""
    changes = _changes(study)
    beyond = {(one.ablation, edge.model, one.horizon) for edge in found for one in edge.beyond}
    beyond_text = _effects(study, {cell: change for cell, change in changes.items() if cell in beyond})
    detail = f"{detail}{_with_both(study, changes, beyond)}".strip()
    figures = f"What a value beyond it changes, in nats: {beyond_text} (95% intervals)." if beyond else ""
    yield Finding("edge", "serious" if own else "note", title, detail, baseline=own > 0, figures=figures)


def _choices(found: Iterable[Edge]) -> set[tuple[str, ...]]:
    """Return the choices behind edges: one that several horizons inherit counts once."""
    return {(one.arm, one.model, one.key, one.inherited_from or f"{one.horizon:,} steps") for one in found}


def _lower_ablations(study: Study, searches: Sequence[Tuning]) -> Iterator[Finding]:
    """Ablations of searched values that end lower than their arm, other than those beyond an edge."""
    told = {one.ablation for edge in edges(study, searches) for one in edge.beyond}
    changes = _changes(study)
    lower = {cell: one for cell, one in changes.items() if cell[0] not in told and one.interval.high < 0}
    if lower:
        arms = dict.fromkeys(one.arm for one in lower.values())
        title = f"Better settings than the reported ones are known: {_labels(arms)}"
        detail = f"What an ablation changes, in nats: {_effects(study, lower)} (95% intervals)."
        detail += _with_both(study, changes, lower)
        own = study.baseline in arms
        yield Finding("tuning", "serious" if own else "note", title, detail, baseline=own)


@dataclass(frozen=True)
class _Change:
    """What an ablation changes of its arm's searched values, and by how much it ends higher."""

    arm: str
    values: str
    interval: Interval  # of 95 %, nats


def _changes(study: Study) -> dict[Cell, _Change]:
    """Return the ablations of searched values alone, by cell."""
    used = {trial.cell: trial.values for trial in study.reporting if trial.values}
    found = {}
    for name, model in itertools.product(study.arm_names("ablation"), study.models):
        arm = str(study.arms[name].of)
        for end in study.endpoints(name, model):
            theirs, ours = used[name, model, end.horizon], used.get((arm, model, end.horizon), {})
            changed = {key: value for key, value in theirs.items() if ours.get(key) != value}
            if not changed or {key.split("[")[0] for key in changed} != {*study.arms[name].varies}:
                continue
            paired = contrast(end, _ends(study, arm)[model, end.horizon], 0.95)
            if isinstance(paired, Contrast) and paired.interval:
                values = ", ".join(f"{key}={short(value)}" for key, value in changed.items())
                found[name, model, end.horizon] = _Change(arm, values, paired.interval)
    return found


def _effects(study: Study, changes: Mapping[Cell, _Change]) -> str:
    grouped = _grouped(
        (f"{one.values} {_after(study, cell)}", f"{label(one.arm)} {one.interval.text}")
        for cell, one in changes.items()
    )
    return "; ".join(f"{change}: {', '.join(arms)}" for change, arms in grouped.items())


def _with_both(study: Study, changes: Mapping[Cell, _Change], cells: Collection[Cell]) -> str:
    """Tell each arm's difference from the baseline where both were run with one change, in one of the cells at least."""
    of_baseline = {(one.values, *cell[1:]): cell for cell, one in changes.items() if one.arm == study.baseline}
    told = []
    for cell, one in changes.items():
        name, model, horizon = cell
        other = of_baseline.get((one.values, model, horizon))
        if one.arm == study.baseline or other is None or not {cell, other} & {*cells}:
            continue
        level = study.corrected_level(model)
        ends = [_ends(study, arm)[model, horizon] for arm in (name, other[0], one.arm, study.baseline)]
        found = (contrast(ends[0], ends[1], level), contrast(ends[2], ends[3], level))
        shown = [of.interval.text for of in found if isinstance(of, Contrast) and of.interval]
        if len(shown) == 2:
            change = f" With {one.values} in both arms, minus {label(study.baseline)} {_after(study, cell)}"
            told.append(
                (f"{change} ({study.level_text(model)} intervals)", f"{label(one.arm)} {' instead of '.join(shown)}")
            )
    return "".join(f"{change}: {', '.join(arms)}." for change, arms in _grouped(told).items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, None]]:
    """Group the second texts by the first, each once."""
    groups: dict[str, dict[str, None]] = {}
    for first, second in pairs:
        groups.setdefault(first, {})[second] = None
    return groups


def _after(study: Study, cell: Cell) -> str:
    _, model, horizon = cell
    return f"after {horizon:,} steps" + (f" of {model}" if len(study.models) > 1 else "")


def _ends(study: Study, name: str) -> dict[tuple[str, int], Endpoints]:
    return {(model, end.horizon): end for model in study.models for end in study.endpoints(name, model)}


def _budgets(study: Study) -> Iterator[Finding]:
    """Tuning trials must be equal for all arms on each model and horizon, and within the budget."""
    counts: dict[tuple[str, int], Counter[str]] = {}
    for trial in study.tuning:
        if trial.run is not None and study.arms[trial.arm].role == "arm":
            counts.setdefault((trial.model, trial.horizon), Counter({study.baseline: 0}))[trial.arm] += 1
    for trial, _ in _compared(study):
        counts.get((trial.model, trial.horizon), Counter())[trial.arm] += 0
    searching = {trial.cell for trial in study.tuning if trial.run is None}
    fewer = {
        cell: [arm for arm in n if n[arm] < max(n.values()) and (arm, *cell) not in searching]
        for cell, n in counts.items()
    }
    over = {cell: [a for a in n if 0 < (study.arms[a].granted(*cell) or math.inf) < n[a]] for cell, n in counts.items()}
    for what, found in (("Fewer tuning trials than other arms", fewer), ("More tuning trials than granted", over)):
        arms = dict.fromkeys(arm for cell in sorted(found) for arm in found[cell])
        told = (f"{m}, {h:,} steps: {_counted(counts[m, h])}" for m, h in sorted(found) if found[m, h])
        if arms:
            title, detail = f"{what}: {_labels(arms)}", f"Trials: {'; '.join(told)}."
            yield Finding("budget", "serious", title, detail, baseline=study.baseline in arms)


def _under_tuned(study: Study, searches: Sequence[Tuning]) -> Iterator[Finding]:
    """Signs that an arm is under-tuned: a parabola in the learning rate, and any better recorded run."""
    lower, steep = "Tuning trials ended lower than the reported runs", "The learning rate looks under-tuned"
    meanings = {
        lower: "The reported runs do not use the best setting that was found, or the trial's seed was lucky.",
        steep: "A parabola through the best rate and its neighbours promises more: try rates in between.",
    }
    found: dict[str, list[tuple[str, Sequence[RecordedTrial]]]] = {lower: [], steep: []}
    by_cell = {search.cell: search for search in searches}
    for arm, model in itertools.product(study.arm_names(), study.models):
        ends = [end for end in study.endpoints(arm, model) if not end.diverged]
        freedom = float(sum(len(end.seeds) - 1 for end in ends))
        squares = sum(float(end.losses.var()) * len(end.seeds) for end in ends)
        spread = math.sqrt(squares / freedom) if freedom else 0.0  # over seeds, pooled over horizons
        for end in ends:
            cell = (arm, model, end.horizon)
            tried = [trial for trial in study.tuning if trial.cell == cell]
            # The luckiest of all tuning runs would be this far below the mean with a probability of one percent.
            luck = _quantile(0.01 / max(len(tried), 1), freedom) * spread * math.sqrt(1 + 1 / len(end.seeds))
            if better := [trial for trial in tried if trial.loss < end.mean - max(luck, _MATTERS)]:
                best = min(trial.loss for trial in better)
                told = f"{_where(cell)}: {best:.4f} against a reported mean of {end.mean:.4f} nats"
                found[lower].append((told, better))
            search = by_cell.get(cell)
            gain = predicted_gain(search, "optimizer.lr") if search else None
            if search and gain and gain > max(_quantile(0.01, freedom) * spread * math.sqrt(2), _MATTERS):
                told = f"{_where(cell)}: {gain:.4f} nats, with {spread:.4f} between seeds"
                found[steep].append((told, search.best.trials))
    for what, cells in found.items():
        if cells:
            trials = [trial for _, of_cell in cells for trial in of_cell]
            title = f"{what}: {_labels(dict.fromkeys(trial.arm for trial in trials))}"
            detail = f"{meanings[what]} {'; '.join(told for told, _ in cells)}."
            yield _finding(study, "tuning", "serious", title, detail, trials)


def _single_runs(study: Study, searches: Sequence[Tuning]) -> Iterator[Finding]:
    """Searches that chose between runs of one seed, closer than twice what the seeds of the arm's reported runs differ by."""
    close = []
    for one in searches:
        seeds = {trial.seed for of in one.candidates for trial in of.trials}
        losses = sorted(of.loss for of in one.candidates)
        ends = [end for end in study.endpoints(one.arm, one.model) if len(end.seeds) > 1 and not end.diverged]
        nearest = min(ends, key=lambda end: abs(end.horizon - one.horizon), default=None)
        if len(seeds) > 1 or len(losses) < 2 or nearest is None:
            continue
        if losses[1] - losses[0] < 2 * (noise := float(nearest.losses.std(ddof=1))):
            close.append(f"{_where(one.cell)} ({losses[1] - losses[0]:.2g} against {noise:.2g})")
    if close:
        title = f"{len(close)} of {len(searches)} searches chose between single runs that differ by less than twice the noise"
        detail = "The two lowest losses, nats, beside the standard deviation over seeds: "
        remedy = "Run the best settings again on further seeds (tuning.finalists)."
        yield Finding("tuning", "note", title, f"{detail}{_some(close)}. {remedy}")


def _quantile(tail: float, freedom: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`; 0 without degrees of freedom."""
    return -float(special.stdtrit(freedom, tail)) if freedom > 0 else 0.0


def _set_aside(study: Study) -> Iterator[Finding]:
    """Recorded trials that the study file no longer has: their results may have been seen, and tuned on."""
    if not study.set_aside:
        return
    of_arms = Counter(arm for arm, _ in study.set_aside)
    arms = [name for name, arm in study.arms.items() if arm.role == "arm"]
    unequal = len({of_arms[name] for name in arms}) > 1
    seen = sorted({seed for arm, seed in study.set_aside if arm in arms} & {one.seed for one in study.reporting})
    title = f"Recorded trials were set aside: {_counted(of_arms.elements())}"
    detail = "The study file no longer has them; they come on top of the budgets"
    detail += ", and not by the same number for every arm." if unequal else "."
    if seen:
        detail += f" Among them are earlier results of seeds that are reported: {', '.join(map(str, seen))}."
    baseline = study.baseline in of_arms
    yield Finding("set aside", "serious" if unequal or seen else "note", title, detail, baseline=baseline)


def _degenerate(study: Study) -> Iterator[Finding]:
    """Sophia is momentum-sign descent if every coordinate is clipped for longer than a refresh interval."""
    lost = []
    for trial in study.reporting:
        if trial.run is None or not trial.run.optimizer.startswith("sophia"):
            continue
        interval = int(trial.run.config["optimizer"].get("hessian_interval", 10))
        clipped, steps = trial.run.training["unclipped_fraction"] == 0, trial.run.training.steps
        stretches = [
            [step for _, step in of]
            for all_clipped, of in itertools.groupby(zip(clipped, steps, strict=True), key=lambda line: line[0])
            if all_clipped
        ]
        # A study's tables keep few train lines; the alarm of the run itself saw all.
        if trial.run.alarms or any(stretch[-1] - stretch[0] > interval for stretch in stretches):
            lost.append(trial)
    if lost:
        title = f"{len(lost)} Sophia runs had no unclipped coordinate for longer than a refresh interval"
        detail = "There Sophia is momentum-sign descent: γ is too small, or the curvature estimate is broken."
        yield _finding(study, "degenerate", "serious", title, detail, lost)


def _clipping(study: Study) -> Iterator[Finding]:
    shares: dict[tuple[str, str], list[float]] = {}
    for trial, run in _compared(study):
        if math.isfinite(run.clipped_norm_share):
            shares.setdefault((trial.model, trial.arm), []).append(run.clipped_norm_share)
    often = {cell: mean(each) for cell, each in shares.items() if mean(each) > _OFTEN_CLIPPED}
    if not often:
        return
    arms = dict.fromkeys(arm for _, arm in often)
    with_curvature = {trial.arm for trial, run in _compared(study) if _has_curvature(run.config["optimizer"])}
    curved = [arm for arm in arms if arm in with_curvature]
    title = f"The gradient's norm is clipped in more than {_OFTEN_CLIPPED:.0%} of the steps: {_labels(arms)}"
    detail = "; ".join(f"{label(arm)}, {model}: {share:.0%}" for (model, arm), share in often.items()) + "."
    if curved:
        detail += f" The clip scales m and not h ({_labels(curved)}): for Sophia it acts like a larger γ."
    yield Finding("clipping", "serious" if curved else "note", title, detail)


def _has_curvature(optimizer: Mapping[str, Any]) -> bool:
    """An external optimizer has an interval in any case, and an estimator of None without curvature."""
    return "hessian_interval" in optimizer and optimizer.get("estimator", "") is not None


def _clock(study: Study) -> Iterator[Finding]:
    """The same forward and backward pass, clocked differently in different arms or horizons."""
    clocks: dict[str, dict[Cell, list[float]]] = {}
    for trial, run in _compared(study):
        if seconds := seconds_per_occurrence(run, "forward_backward"):
            clocks.setdefault(trial.model, {}).setdefault(trial.cell, []).append(seconds)
    told, apart = [], 0.0
    for cells in clocks.values():
        medians = [(median(each), cell) for cell, each in cells.items()]
        (low, fast), (high, slow) = min(medians), max(medians)
        if high > (1 + _DRIFT) * low:
            apart = max(apart, high / low - 1)
            told.append(f"{low:.3g} s ({_where(fast)}) to {high:.3g} s ({_where(slow)})")
    if told:
        advice = "run `python scripts/study.py times` for this study" if study.planned else "time the arms in turn"
        remedy = f"For wall-clock, {advice} on the idle machine."
        remedy = "Use the reference times." if study.reference_times else remedy
        title = f"The machine drifted: the same forward and backward pass took up to {apart:.0%} longer"
        yield Finding("clock", "note", title, f"{'; '.join(told)}. Losses are not affected. {remedy}")


def _code(study: Study) -> Iterator[Finding]:
    recorded = [(trial, trial.run.environment.get("git") or {}) for trial in study.reporting if trial.run is not None]
    commits = Counter(str(git["commit"])[:10] for _, git in recorded if git.get("commit"))
    if len(commits) > 1:
        shown = "; ".join(f"{commit}: {runs} runs" for commit, runs in commits.items())
        yield Finding("code", "note", "The runs were made with different commits", shown)
    if dirty := tuple(trial.origin for trial, git in recorded if git.get("dirty")):
        detail = "Their code cannot be checked out again."
        yield Finding("code", "note", f"{len(dirty)} runs had uncommitted changes", detail, dirty)


def _comparable_values(run: RecordedRun) -> dict[str, Any]:
    keys = ("data_manifest_sha256", "initial_weights_sha256", "hardware", "world_size")
    environment = {f"environment.{key}": run.environment[key] for key in keys if key in run.environment}
    forward = _curvature_forward(run)
    return flat_config(run) | flatten(environment) | ({} if forward is None else {FORWARD: forward})


def flat_config(run: RecordedRun) -> dict[str, Any]:
    """Return the configuration by dotted key; `resume` becomes "start" unless the run began with another's checkpoint."""
    values = flatten(run.config)
    origin = values.get("resume", "auto")
    return values | {"resume": "start" if origin in ("auto", "never") else origin}


def _curvature_forward(run: RecordedRun) -> str | None:
    """Return which forward the curvature passes used; None if the estimator allows only one."""
    optimizer, summary = run.config["optimizer"], run.summary or {}
    if optimizer.get("estimator") != "gnb" or optimizer.get("label_draws", 1) > 1:
        return None
    if "shared_forwards" not in summary:  # unfinished, or recorded before this was counted
        keeps_graphs = run.config.get("strategy", {}).get("name") in ("ddp", "single")
        return "training's" if keeps_graphs and run.config["train"].get("shared_forward", True) else "their own"
    # The first pass of a warm start always has its own forward.
    passes = run.ledger.get("curvature", {}).get("count", 0)
    own = passes - summary["shared_forwards"] - bool(optimizer.get("warm_start"))
    return "training's" if own <= 0 else "both" if summary["shared_forwards"] else "their own"


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the prefixes or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _where(cell: Cell) -> str:
    return f"{label(cell[0])}, {cell[1]}, {cell[2]:,} steps"


def _finding(
    study: Study, guard: str, severity: Severity, title: str, detail: str, trials: Sequence[RecordedTrial]
) -> Finding:
    """Return a finding about trials."""
    baseline = any(trial.arm == study.baseline for trial in trials)
    return Finding(guard, severity, title, detail, tuple(trial.origin for trial in trials), baseline)


def _compared(study: Study) -> list[tuple[RecordedTrial, RecordedRun]]:
    """Return the reported trials with their runs, without ablations."""
    return [(trial, trial.run) for trial in study.reporting if trial.run and study.arms[trial.arm].role == "arm"]


def _labels(arms: Iterable[str]) -> str:
    return ", ".join(map(label, arms))


def _counted(arms: Iterable[str], of: Sequence[str] = ()) -> str:
    """Count each arm: "AdamW 2, Lion 1", or of how many: "AdamW 2 of 6"."""
    every = Counter(of)
    return ", ".join(f"{label(a)} {n}" + (f" of {every[a]}" if of else "") for a, n in sorted(Counter(arms).items()))
