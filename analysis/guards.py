"""Checks that find unfair comparisons and doubtful numbers in the records; a report shows them first.

A comparison of optimizers is fair if the runs differ only in the optimizer and its own hyper-parameters, if what the arms
share is equal or tuned in all of them, if all were tuned with the same effort, and if no loss is read in the middle of a
schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from scipy import special

from analysis.colours import label
from analysis.runs import Origin, RecordedRun, flatten
from analysis.trials import RecordedTrial, Study, short
from analysis.tuning import Tuning, edges, predicted_gain, tunings
from analysis.wallclock import seconds_per_occurrence

# Keys (and all below them) that do not affect what is measured.
INCIDENTAL = (
    *("name", "output_dir", "resume", "overwrite", "tracker", "launcher", "checkpoint", "profile"),
    *("data.directory", "data.local_directory"),
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
OWN = tuple(
    f"optimizer.{key}"
    for key in (
        *(
            "name",
            "factory",
            "arguments",
            "betas[1]",
            "momentum",
            "eps",
            "gamma",
            "clip",
            "hessian_interval",
            "estimator",
        ),
        *("batch_fraction", "bias_correction", "label_draws", "warm_start", "unclipped_target"),
    )
)
EMBEDDINGS_RATE = "optimizer.embedding_lr_ratio"
# Of the shared keys, those worth as much as the effects that are measured.
_DECISIVE = (
    *("optimizer.lr", EMBEDDINGS_RATE, "optimizer.decay_embeddings", "schedule.warmup_steps", "schedule.warmup_share"),
)
# Values of shared keys that a record may lack.
_DEFAULTS: Mapping[str, Any] = {EMBEDDINGS_RATE: 1.0, "optimizer.decay_embeddings": True}

# A larger share of steps with a clipped gradient norm, and a larger difference between clocks of the same work, are found.
_OFTEN_CLIPPED = 0.3
_DRIFT = 0.03
# A loss difference (nats) too small to tune for, even with little seed noise.
_MATTERS = 0.002

Affects = Literal["loss", "seconds", "FLOPs and seconds"]
Severity = Literal["serious", "note"]


# What runs differ in, and the consequence for a comparison.
_UNFAIR: dict[Affects, tuple[str, str]] = {
    "loss": ("more than the optimizer", "A difference of loss between them may not be due to the optimizer."),
    "seconds": (
        "what affects timing",
        "Losses are not affected; compare seconds by the reference-time model.",
    ),
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
    affects: Affects

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
        "fairness",
        "shared",
        "schedule",
        "seeds",
        "budget",
        "tuning",
        "edge",
        "curve",
        "diverged",
        "set aside",
    ),
    *("records", "degenerate", "clipping", "clock", "code", "figure"),
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

    @property
    def weight(self) -> float:
        """The larger, the stronger the doubt; see GUARDS."""
        rank = GUARDS.index(self.guard) if self.guard in GUARDS else len(GUARDS)
        baseline = self.baseline or self.guard in ("baseline", "curve")
        return (self.severity == "serious") * (2 + baseline) - rank / (len(GUARDS) + 1)


def differences(runs: Sequence[RecordedRun], *, by_design: Iterable[str] = OPTIMIZER) -> list[Difference]:
    """Return keys of configuration and environment in which the runs differ and should not.

    Args:
        runs: the compared runs.
        by_design: keys (with all below them) that may differ, such as "optimizer" or "train.steps".
    """
    ignored = (*INCIDENTAL, *by_design)
    flattened = {run.name: _comparable_values(run) for run in runs}
    keys = sorted({key for values in flattened.values() for key in values if not is_under(key, ignored)})
    found = []
    for key in keys:
        values = {run: flat.get(key) for run, flat in flattened.items() if key != FORWARD or key in flat}
        if len({repr(value) for value in values.values()}) > 1:
            found.append(Difference(key, values, _affects(key)))
    return found


def _affects(key: str) -> Affects:
    if key == FORWARD:
        return "FLOPs and seconds"
    return "seconds" if is_under(key, TIMING) else "loss"


def inspect(study: Study) -> list[Finding]:
    """Run every check on a study; the strongest doubts come first, as GUARDS says."""
    searches = tunings(study)
    found = [
        *_damaged(study),
        *_fairness(study),
        *_shared(study),
        *_decayed(study),
        *_seeds(study),
        *_diverged(study),
        *_edges(study, searches),
        *_budgets(study),
        *_under_tuned(study, searches),
        *_set_aside(study),
        *_degenerate(study),
        *_clipping(study),
        *_clock(study),
        *_code(study),
    ]
    return sorted(found, key=lambda finding: -finding.weight)


def _damaged(study: Study) -> list[Finding]:
    """Records that cannot be read and are left out."""
    if not study.damaged:
        return []
    count = len(study.damaged)
    title = f"{count} damaged record{' is' if count == 1 else 's are'} left out"
    return [Finding("records", "serious", title, study.left_out)]


def _fairness(study: Study) -> list[Finding]:
    """Differences other than the optimizer within a cell, and other than the horizon between cells of a model."""
    declared = tuple(sorted({key.split("[")[0] for arm in study.arms.values() for key in arm.search}))
    cells: dict[tuple[Any, ...], list[RecordedTrial]] = {}
    for trial in _compared(study):
        cells.setdefault((trial.model, trial.horizon, trial.seed), []).append(trial)
        cells.setdefault((trial.model,), []).append(trial)
    groups: list[tuple[list[RecordedRun], tuple[str, ...]]] = []
    for cell, members in cells.items():
        allowed = (*OPTIMIZER, *declared) if len(cell) == 3 else (*OPTIMIZER, *declared, *HORIZON, *SEED)
        groups.append(([trial.run for trial in members if trial.run is not None], allowed))
    for name, arm in study.arms.items():
        if arm.role == "ablation" and arm.of is not None:
            varied = study.runs(arm=name) + study.runs(arm=arm.of)
            groups.append((varied, (*OPTIMIZER, *declared, *HORIZON, *SEED, "model", *arm.varies)))
    by_key: dict[str, Difference] = {}
    for runs, allowed in groups:
        for difference in differences(runs, by_design=allowed):
            known = by_key.get(difference.key)
            values = {**(known.values if known else {}), **difference.values}
            by_key[difference.key] = Difference(difference.key, values, difference.affects)
    trials = {trial.run.name: trial for trial in study.reporting if trial.run is not None}
    findings = []
    for affects, (title, consequence) in _UNFAIR.items():
        found = [difference for difference in by_key.values() if difference.affects == affects]
        names = dict.fromkeys(name for difference in found for name in difference.values if name in trials)
        if found:
            findings.append(
                Finding(
                    guard="fairness",
                    severity="serious" if affects == "loss" else "note",
                    title=f"Runs differ in {title}: {_some([difference.key for difference in found])}",
                    detail=f"{'. '.join(map(str, found))}. {consequence}",
                    runs=tuple(trials[name].origin for name in names),
                    baseline=any(trials[name].arm == study.baseline for name in names),
                )
            )
    return findings


def _shared(study: Study) -> list[Finding]:
    """Hyper-parameters that several arms have, and that are neither equal nor searched in all of them."""
    searched = {arm: {*study.arms[arm].search} for arm in study.arm_names()}
    declared = {key for keys in searched.values() for key in keys}
    optimizers: dict[str, str] = {}
    values: dict[str, dict[str, dict[str, set[str]]]] = {}  # by key, model and arm
    for trial in _compared(study):
        assert trial.run is not None
        optimizers[trial.arm] = trial.run.optimizer
        for key, value in (_DEFAULTS | _leaves(trial.run.config)).items():
            if (key in declared or is_under(key, OPTIMIZER)) and not is_under(key, OWN):
                of_arm = values.setdefault(key, {}).setdefault(trial.model, {}).setdefault(trial.arm, set())
                of_arm.add(short(value))
    if len({*optimizers.values()}) < 2:  # settings of one optimizer are what is compared
        return []
    unfair: dict[Severity, dict[str, str]] = {"serious": {}, "note": {}}
    touched: set[str] = set()
    for key, by_model in values.items():
        decisive = key in _DECISIVE or (key == "optimizer.weight_decay" and study.planned)
        for by_arm in by_model.values():
            tuned = [arm for arm in by_arm if {key, key.split("[")[0]} & searched[arm]]
            unequal = any(not (a <= b or b <= a) for a, b in itertools.combinations(by_arm.values(), 2))
            # Rates of different optimizers cannot be compared, so that equal ones are not fair.
            untuned = not tuned and (
                unequal or (key == "optimizer.lr" and len({optimizers[arm] for arm in by_arm}) > 1)
            )
            if untuned or 0 < len(tuned) < len(by_arm):
                fixed: dict[str, list[str]] = {"searched": tuned} if tuned else {}
                for arm in by_arm:
                    if arm not in tuned:
                        fixed.setdefault(" and ".join(sorted(by_arm[arm])), []).append(arm)
                told = "; ".join(f"{value} for {_labels(arms)}" for value, arms in fixed.items())
                unfair["serious" if decisive else "note"].setdefault(key, f"{key}: {told}.")
                touched |= {f"{key} {arm}" for arm in by_arm}
    findings = [
        Finding(
            "shared",
            severity,
            f"Not tuned in every arm: {', '.join(told)}",
            f"{' '.join(told.values())} What arms share must be equal or searched in all; else it may be the difference.",
            baseline=any(f"{key} {study.baseline}" in touched for key in told),
        )
        for severity, told in unfair.items()
        if told
    ]
    single = [
        arm
        for arm, optimizer in optimizers.items()
        if optimizer != "muon"
        and EMBEDDINGS_RATE not in searched[arm]
        and any(by_arm.get(arm) == {"1"} for by_arm in values[EMBEDDINGS_RATE].values())
    ]
    if "muon" in optimizers.values() and single:
        findings.append(
            Finding(
                "shared",
                "serious",
                f"Muon trains the embeddings by AdamW, and other arms have one rate for all matrices: {_labels(single)}",
                f"Part of the difference may be the embeddings' rate: search {EMBEDDINGS_RATE} in every arm.",
                baseline=study.baseline in single or optimizers.get(study.baseline) == "muon",
            )
        )
    return findings


def _decayed(study: Study) -> list[Finding]:
    constant = [
        trial
        for trial in study.reporting
        if trial.run is not None and float(trial.run.config["schedule"].get("final_ratio", 0.0)) > 0.5
    ]
    if not constant:
        return []
    return [
        Finding(
            "schedule",
            "serious",
            "Runs whose learning rate does not decay",
            "The comparison is of the ends of fully decayed runs; these end at more than half of the peak rate.",
            tuple(trial.origin for trial in constant),
            any(trial.arm == study.baseline for trial in constant),
        )
    ]


def _seeds(study: Study) -> list[Finding]:
    findings = []
    reported = {trial.seed for trial in study.reporting}
    advice = "Hyper-parameters chosen on a seed fit its noise; report on seeds that the search has not seen."
    if both := sorted({trial.seed for trial in study.tuning} & reported):
        title = f"Seeds used for tuning are reported: {', '.join(map(str, both))}"
        findings.append(Finding("seeds", "serious", title, advice, baseline=True))
    known = {name: seeds for name, seeds in study.builds_on.items() if seeds is not None}
    if seen := sorted(frozenset().union(*known.values()) & reported):
        title = f"Reported seeds were used to choose settings: {', '.join(map(str, seen))}"
        detail = f"This study builds on {', '.join(known)}, which ran them. {advice}"
        findings.append(Finding("seeds", "serious", title, detail, baseline=True))
    for name in study.builds_on.keys() - known.keys():
        title = f"{name}, on which this study builds, has no tables"
        detail = "Whether the reported seeds chose settings there is not known; its directory belongs next to this one."
        findings.append(Finding("seeds", "note", title, detail))
    cells: dict[_Cell, list[RecordedTrial]] = {}
    for trial in study.reporting:
        cells.setdefault(_cell(trial), []).append(trial)
    lacking: dict[_Cell, list[RecordedTrial]] = {}
    for cell, members in sorted(cells.items()):
        missing = [trial for trial in members if trial.status not in ("completed", "diverged")]
        # `under_way` lists the cells that have not started.
        if study.planned and missing and (study.finished or len(missing) < len(members)):
            lacking[cell] = missing
    if lacking:
        arms = dict.fromkeys(arm for arm, _, _ in lacking)
        told = (f"{_where(c)}: {', '.join(f'seed {t.seed} {t.status}' for t in ts)}" for c, ts in lacking.items())
        findings.append(
            Finding(
                "seeds",
                "serious",
                "Planned seeds have not ended"
                + (f": {_where(*lacking)}" if len(lacking) == 1 else f" in {len(lacking)} cells of {_labels(arms)}"),
                f"The number of seeds was fixed beforehand; a verdict on fewer is provisional. {'; '.join(told)}.",
                tuple(trial.origin for trials in lacking.values() for trial in trials),
                study.baseline in arms,
            )
        )
    if not study.planned and len({len(members) for members in cells.values()}) > 1:
        shown = "; ".join(f"{_where(cell)}: {len(members)}" for cell, members in sorted(cells.items()))
        findings.append(Finding("seeds", "note", "Cells have different numbers of seeds", shown))
    return findings


def _diverged(study: Study) -> list[Finding]:
    findings = []
    kinds: tuple[tuple[str, str, str, Severity, str], ...] = (
        ("Reported runs", "reporting", "arm", "serious", "Their cells are undecided; they are not dropped."),
        ("Tuning runs", "tuning", "arm", "note", "Diverged trials count against the arm's budget."),
        ("Runs of ablations", "reporting", "ablation", "note", "They do not affect the verdict."),
    )
    for name, phase, role, severity, detail in kinds:
        trials = [trial for trial in study.trials if trial.phase == phase and study.arms[trial.arm].role == role]
        lost = [trial for trial in trials if trial.status == "diverged"]
        arms = dict.fromkeys(trial.arm for trial in lost)
        told = (f"{sum(t.arm == a for t in lost)} of {sum(t.arm == a for t in trials)} of {label(a)}" for a in arms)
        if lost:
            origins = tuple(trial.origin for trial in lost)
            title = f"{name} diverged: {', '.join(told)}"
            findings.append(Finding("diverged", severity, title, detail, origins, study.baseline in arms))
    return findings


def _edges(study: Study, searches: Sequence[Tuning]) -> list[Finding]:
    found = edges(study, searches)
    if not found:
        return []
    count, own = len(found), sum(edge.arm == study.baseline for edge in found)
    keys: dict[str, dict[str, None]] = {}
    for edge in found:
        keys.setdefault(edge.arm, {})[edge.key] = None
    told = "; ".join(f"{label(arm)}: {', '.join(of_arm)}" for arm, of_arm in keys.items())
    return [
        Finding(
            "edge",
            "serious" if own else "note",
            f"{count} reported value{' is' if count == 1 else 's are'} the last that was tried"
            + (f", {own} of them of the baseline" if own else ""),
            f"An optimum may lie outside; widen the search. {told}."
            + (" An under-tuned baseline makes every other arm look good." if own else ""),
            baseline=own > 0,
        )
    ]


def _budgets(study: Study) -> list[Finding]:
    """Tuning trials must be equal for all arms on each model and horizon, and within the budget."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for trial in study.tuning:
        if trial.run is not None and study.arms[trial.arm].role == "arm":
            cell = counts.setdefault((trial.model, trial.horizon), {study.baseline: 0})
            cell[trial.arm] = cell.get(trial.arm, 0) + 1
    for trial in _compared(study):
        counts.get((trial.model, trial.horizon), {}).setdefault(trial.arm, 0)
    fewer: dict[str, None] = {}
    over: dict[str, None] = {}
    told: dict[str, list[str]] = {"fewer": [], "over": []}
    for (model, horizon), by_arm in sorted(counts.items()):
        most = max(by_arm.values())
        less = [arm for arm, count in by_arm.items() if count < most]
        more = [arm for arm in by_arm if 0 < (study.arms[arm].granted(model, horizon) or math.inf) < by_arm[arm]]
        shown = ", ".join(f"{label(arm)} {count}" for arm, count in sorted(by_arm.items()))
        for arms, of_cell, kind in ((fewer, less, "fewer"), (over, more, "over")):
            arms |= dict.fromkeys(of_cell)
            told[kind] += [f"{model}, {horizon:,} steps: {shown}."] if of_cell else []
    findings = []
    for title, arms, kind in (
        ("Fewer tuning trials than other arms", fewer, "fewer"),
        ("More tuning trials than granted", over, "over"),
    ):
        if arms:
            detail = f"Trials: {' '.join(told[kind])}"
            findings.append(
                Finding("budget", "serious", f"{title}: {_labels(arms)}", detail, baseline=study.baseline in arms)
            )
    return findings


def _under_tuned(study: Study, searches: Sequence[Tuning]) -> list[Finding]:
    """Signs that an arm is under-tuned: a parabola in the learning rate, and any better recorded run."""
    lower: dict[_Cell, tuple[str, tuple[Origin, ...]]] = {}
    promised: dict[_Cell, tuple[str, tuple[Origin, ...]]] = {}
    for arm, model in itertools.product(study.arm_names(), study.models):
        ends = [end for end in study.endpoints(arm, model) if not end.diverged]
        freedom = float(sum(len(end.seeds) - 1 for end in ends))
        squares = sum(float(end.losses.var()) * len(end.seeds) for end in ends)
        spread = math.sqrt(squares / freedom) if freedom else 0.0  # over seeds, pooled over horizons
        for end in ends:
            cell = (arm, model, end.horizon)
            reported = float(end.losses.mean())
            tried = [trial for trial in study.tuning if _cell(trial) == cell]
            # The luckiest of all tuning runs would be this far below the mean with a probability of one percent.
            luck = _quantile(0.01 / max(len(tried), 1), freedom) * spread * math.sqrt(1 + 1 / len(end.seeds))
            better = [trial for trial in tried if trial.loss < reported - max(luck, _MATTERS)]
            if better:
                found = f"{min(trial.loss for trial in better):.4f} against a reported mean of {reported:.4f} nats"
                lower[cell] = (found, tuple(trial.origin for trial in better))
            search = next((one for one in searches if (one.arm, one.model, one.horizon) == cell), None)
            gain = predicted_gain(search, "optimizer.lr") if search else None
            if search and gain and gain > max(_quantile(0.01, freedom) * spread * math.sqrt(2), _MATTERS):
                origins = tuple(trial.origin for trial in search.best.trials)
                promised[cell] = (f"{gain:.4f} nats, with {spread:.4f} between seeds", origins)
    findings = []
    for found_in, title, meaning in (
        (
            lower,
            "Tuning trials ended lower than the reported runs",
            "The reported runs do not use the best setting that was found, or the trial's seed was lucky.",
        ),
        (
            promised,
            "The learning rate looks under-tuned",
            "A parabola through the best rate and its neighbours promises more: try rates in between.",
        ),
    ):
        if found_in:
            told = "; ".join(f"{_where(cell)}: {numbers}" for cell, (numbers, _) in found_in.items())
            arms = dict.fromkeys(arm for arm, _, _ in found_in)
            origins = tuple(origin for _, of_cell in found_in.values() for origin in of_cell)
            full = f"{title}: {_labels(arms)}"
            findings.append(
                Finding("tuning", "serious", full, f"{meaning} {told}.", origins, baseline=study.baseline in arms)
            )
    return findings


def _quantile(tail: float, freedom: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`; 0 without degrees of freedom."""
    return -float(special.stdtrit(freedom, tail)) if freedom > 0 else 0.0


def _set_aside(study: Study) -> list[Finding]:
    """Recorded trials that the study file no longer has: their results may have been seen, and tuned on."""
    if not study.set_aside:
        return []
    arms = {name for name, arm in study.arms.items() if arm.role == "arm"}
    unequal = len({study.set_aside.get(arm, 0) for arm in arms}) > 1
    told = ", ".join(f"{label(arm)} {count}" for arm, count in sorted(study.set_aside.items()))
    count = sum(study.set_aside.values())
    return [
        Finding(
            "set aside",
            "serious" if unequal else "note",
            f"{count} recorded trial{' was' if count == 1 else 's were'} set aside: {told}",
            "They are not in the study file any more, and come on top of the budgets"
            + (", not by the same number for every arm." if unequal else "."),
            baseline=unequal and study.baseline in study.set_aside,
        )
    ]


def _degenerate(study: Study) -> list[Finding]:
    """Sophia is momentum-sign descent if every coordinate is clipped for longer than a refresh interval."""
    lost = []
    for trial in study.reporting:
        if trial.run is None or not trial.run.optimizer.startswith("sophia") or len(trial.run.training) < 2:
            continue
        fraction, steps = trial.run.training["unclipped_fraction"], trial.run.training.steps
        interval = int(trial.run.config["optimizer"].get("hessian_interval", 10))
        since: float | None = None
        for zero, step in zip(fraction == 0, steps, strict=True):
            since = (step if since is None else since) if zero else None
            if since is not None and step - since > interval:
                lost.append(trial)
                break
    if not lost:
        return []
    return [
        Finding(
            "degenerate",
            "serious",
            f"{len(lost)} Sophia runs had no unclipped coordinate for longer than a refresh interval",
            "There Sophia is momentum-sign descent: γ is too small, or the curvature estimate is broken.",
            tuple(trial.origin for trial in lost),
        )
    ]


def _clipping(study: Study) -> list[Finding]:
    shares: dict[tuple[str, str], list[float]] = {}
    curved: dict[str, None] = {}
    for trial in _compared(study):
        if trial.run is not None and math.isfinite(trial.run.clipped_norm_share):
            shares.setdefault((trial.model, trial.arm), []).append(trial.run.clipped_norm_share)
    often = {cell: sum(each) / len(each) for cell, each in shares.items() if sum(each) > _OFTEN_CLIPPED * len(each)}
    for trial in _compared(study):
        if trial.run is not None and (trial.model, trial.arm) in often:
            curved |= {trial.arm: None} if "hessian_interval" in trial.run.config["optimizer"] else {}
    if not often:
        return []
    models = {model: ", ".join(f"{label(a)} {often[m, a]:.0%}" for m, a in often if m == model) for model, _ in often}
    why = f" It scales m and not h, so that γ is not what was set: {_labels(curved)}." if curved else ""
    return [
        Finding(
            "clipping",
            "serious" if curved else "note",
            f"The gradient's norm is clipped in more than {_OFTEN_CLIPPED:.0%} of the steps: "
            f"{_labels(dict.fromkeys(arm for _, arm in often))}",
            "; ".join(f"{model}: {told}" for model, told in models.items()) + f".{why}",
        )
    ]


def _clock(study: Study) -> list[Finding]:
    """The same forward and backward pass, clocked differently in different arms or horizons: the machine drifted."""
    clocks: dict[str, dict[tuple[str, int], list[float]]] = {}
    for trial in _compared(study):
        if trial.run is not None and (seconds := seconds_per_occurrence(trial.run, "forward_backward")):
            clocks.setdefault(trial.model, {}).setdefault((trial.arm, trial.horizon), []).append(seconds)
    told, most = [], 0.0
    for model, cells in clocks.items():
        medians = sorted((median(seconds), cell) for cell, seconds in cells.items())
        (low, fast), (high, slow) = medians[0], medians[-1]
        if high > (1 + _DRIFT) * low:
            most = max(most, high / low - 1)
            ends = (f"{seconds:.3g} s ({label(a)}, {h:,} steps)" for seconds, (a, h) in ((low, fast), (high, slow)))
            told.append(f"{model}: {' to '.join(ends)}.")
    if not told:
        return []
    advice = f"run `python scripts/study.py times study={study.name}`" if study.planned else "time the arms in turn"
    remedy = "Use the reference times." if study.reference_times else f"For wall-clock, {advice} on the idle machine."
    title = f"The machine drifted: the same forward and backward pass took up to {most:.0%} longer"
    return [Finding("clock", "note", title, f"{' '.join(told)} Losses are not affected. {remedy}")]


def _code(study: Study) -> list[Finding]:
    commits: dict[str, list[Origin]] = {}
    dirty = []
    for trial in study.reporting:
        git = {} if trial.run is None else trial.run.environment.get("git") or {}
        if git.get("commit"):
            commits.setdefault(str(git["commit"])[:10], []).append(trial.origin)
        if git.get("dirty"):
            dirty.append(trial.origin)
    findings = []
    if len(commits) > 1:
        shown = "; ".join(f"{commit}: {len(runs)} runs" for commit, runs in commits.items())
        findings.append(Finding("code", "note", "The runs were made with different commits", shown))
    if dirty:
        detail = "Their code cannot be checked out again."
        findings.append(Finding("code", "note", f"{len(dirty)} runs had uncommitted changes", detail, tuple(dirty)))
    return findings


def _comparable_values(run: RecordedRun) -> dict[str, Any]:
    values = flatten(run.config)
    environment = run.environment
    for key in ("data_manifest_sha256", "initial_weights_sha256", "hardware", "world_size"):
        if key in environment:
            entry = environment[key]
            values.update(flatten({f"environment.{key}": entry}))
    if (forward := _curvature_forward(run)) is not None:
        values[FORWARD] = forward
    return values


def _curvature_forward(run: RecordedRun) -> str | None:
    """Return which forward the curvature passes used; None if the estimator allows only one."""
    optimizer, summary = run.config["optimizer"], run.summary or {}
    if optimizer.get("estimator") != "gnb" or optimizer.get("label_draws", 1) > 1:
        return None
    if "shared_forwards" not in summary:  # unfinished, or recorded before this was counted
        keeps_graphs = run.config.get("strategy", {}).get("name") in ("ddp", "single")
        return "training's" if keeps_graphs and run.config["train"].get("shared_forward", True) else "their own"
    # The first pass of a warm start always has its own forward.
    passes = summary.get("ledger", {}).get("curvature", {}).get("count", 0)
    own = passes - summary["shared_forwards"] - bool(optimizer.get("warm_start"))
    return "training's" if own <= 0 else "both" if summary["shared_forwards"] else "their own"


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the prefixes or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


_Cell = tuple[str, str, int]  # arm, model, horizon


def _cell(trial: RecordedTrial) -> _Cell:
    return trial.arm, trial.model, trial.horizon


def _compared(study: Study) -> list[RecordedTrial]:
    """Return the reported trials with a run, without ablations."""
    return [trial for trial in study.reporting if trial.run is not None and study.arms[trial.arm].role == "arm"]


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration, with an entry for each member of a list, as search spaces name them."""
    flat = flatten(config)
    members = {f"{key}[{i}]": one for key, many in flat.items() if isinstance(many, list) for i, one in enumerate(many)}
    return {key: value for key, value in flat.items() if not isinstance(value, list)} | members


def _labels(arms: Iterable[str]) -> str:
    return ", ".join(map(label, arms))


def _where(cell: _Cell) -> str:
    arm, model, horizon = cell
    return f"{label(arm)}, {model}, {horizon:,} steps"
