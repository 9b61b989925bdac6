"""Checks that find unfair comparisons and doubtful numbers in the records; a report shows them first.

A comparison of optimizers is fair if the runs differ only in the optimizer and its hyper-parameters, if both arms were
tuned with the same effort, and if no loss is read in the middle of a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import special

from analysis.colours import label
from analysis.runs import Origin, RecordedRun, flatten
from analysis.comparison import Endpoints
from analysis.target import time_to_target
from analysis.trials import RecordedTrial, Study
from analysis.tuning import Tuning, predicted_gain, tunings

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


@dataclass(frozen=True)
class Finding:
    """A warning to the reader. A serious finding puts the verdict in doubt; a note qualifies it."""

    guard: str  # which check found it: "fairness", "edge", "budget", "tuning", "diverged", "seeds", …
    severity: Severity
    title: str
    detail: str
    runs: tuple[Origin, ...] = ()


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
    """Run every check on a study; serious findings come first."""
    searches = tunings(study)
    found = [
        *_damaged(study),
        *_fairness(study),
        *_decayed(study),
        *_seeds(study),
        *_diverged(study),
        *_edges(study, searches),
        *_budgets(study),
        *_under_tuned(study, searches),
        *_degenerate(study),
        *_code(study),
    ]
    return sorted(found, key=lambda finding: finding.severity != "serious")


def _damaged(study: Study) -> list[Finding]:
    """Records that cannot be read and are left out."""
    if not study.damaged:
        return []
    count = len(study.damaged)
    title = f"{count} damaged record{' is' if count == 1 else 's are'} left out"
    return [Finding("records", "serious", title, study.left_out)]


@dataclass(frozen=True)
class Crossing:
    """Where an arm's curve crosses the baseline's final loss of the *same* horizon.

    This is not a speed-up: the decaying schedule makes curves of one horizon cross. Only final losses count.
    """

    arm: str
    model: str
    horizon: int
    seed: int
    share: float | None  # of the baseline's steps; None if not reached


def mid_run_crossings(study: Study) -> list[Crossing]:
    """Return the crossings of all arms at all horizons, paired by seed."""
    baseline = {
        (trial.model, trial.horizon, trial.seed): trial.run
        for trial in study.reporting
        if trial.arm == study.baseline and trial.run is not None and trial.run.completed
    }
    crossings = []
    for trial in study.reporting:
        reference = baseline.get((trial.model, trial.horizon, trial.seed))
        if trial.arm == study.baseline or reference is None or trial.run is None or not len(trial.run.evaluations):
            continue
        time = time_to_target(trial.run.evaluations, reference.final_val_loss, "steps")
        share = time.spent / reference.total("steps") if time.reached else None
        crossings.append(Crossing(trial.arm, trial.model, trial.horizon, trial.seed, share))
    return crossings


def _fairness(study: Study) -> list[Finding]:
    """Differences other than the optimizer within a cell, and other than the horizon between cells of a model."""
    declared = tuple(sorted({key.split("[")[0] for arm in study.arms.values() for key in arm.search}))
    cells: dict[tuple[Any, ...], list[RecordedTrial]] = {}
    for trial in study.reporting:
        if trial.run is None:
            continue
        arm = study.arms[trial.arm]
        if arm.role == "arm":
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
    origins = {trial.run.name: trial.origin for trial in study.reporting if trial.run is not None}
    findings = []
    for difference in by_key.values():
        title, consequence = _UNFAIR[difference.affects]
        findings.append(
            Finding(
                guard="fairness",
                severity="serious" if difference.affects == "loss" else "note",
                title=f"Runs differ in {title}: {difference.key}",
                detail=f"{difference}. {consequence}",
                runs=tuple(origins[name] for name in difference.values if name in origins),
            )
        )
    tuned = [key for key in declared if not is_under(key, OPTIMIZER)]
    if tuned:
        title = f"Tuned for each arm in addition to the optimizer's hyper-parameters: {', '.join(tuned)}"
        findings.append(Finding("fairness", "note", title, "Declared in the study's search spaces."))
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
        )
    ]


def _seeds(study: Study) -> list[Finding]:
    findings = []
    both = sorted({trial.seed for trial in study.tuning} & {trial.seed for trial in study.reporting})
    if both:
        findings.append(
            Finding(
                "seeds",
                "serious",
                f"Seeds used for tuning are reported: {', '.join(map(str, both))}",
                "Hyper-parameters chosen on a seed fit its noise; report on seeds that the search has not seen.",
            )
        )
    cells: dict[tuple[str, str, int], list[RecordedTrial]] = {}
    for trial in study.reporting:
        cells.setdefault((trial.arm, trial.model, trial.horizon), []).append(trial)
    for (arm, model, horizon), members in sorted(cells.items()):
        ended = [trial for trial in members if trial.status in ("completed", "diverged")]
        if not ended and not study.finished:  # `under_way` lists what has not started
            continue
        if study.planned and len(ended) < len(members):
            missing = [trial for trial in members if trial not in ended]
            findings.append(
                Finding(
                    "seeds",
                    "serious",
                    f"{label(arm)}, {model}, {horizon:,} steps: {len(ended)} of {len(members)} seeds have ended",
                    "The number of seeds was fixed beforehand; a verdict on fewer is provisional: "
                    + ", ".join(f"seed {trial.seed} {trial.status}" for trial in missing),
                    tuple(trial.origin for trial in missing),
                )
            )
    sizes = {len(members) for members in cells.values()}
    if not study.planned and len(sizes) > 1:
        shown = "; ".join(f"{label(a)}, {m}, {h:,} steps: {len(c)}" for (a, m, h), c in sorted(cells.items()))
        findings.append(Finding("seeds", "note", "Cells have different numbers of seeds", shown))
    return findings


def _diverged(study: Study) -> list[Finding]:
    findings = []
    for phase, severity in (("reporting", "serious"), ("tuning", "note")):
        for arm in study.arms:
            trials = [trial for trial in study.trials if trial.arm == arm and trial.phase == phase]
            lost = [trial for trial in trials if trial.status == "diverged"]
            if lost:
                findings.append(
                    Finding(
                        "diverged",
                        "serious" if severity == "serious" else "note",
                        f"{label(arm)}: {len(lost)} of {len(trials)} {phase} runs diverged",
                        "A diverged reported run leaves its cell undecided; it is not dropped."
                        if phase == "reporting"
                        else "Diverged trials count against the arm's budget.",
                        tuple(trial.origin for trial in lost),
                    )
                )
    return findings


def _edges(study: Study, searches: Sequence[Tuning]) -> list[Finding]:
    findings = []
    for search in searches:
        for edge in search.edges:
            baseline = search.arm == study.baseline
            findings.append(
                Finding(
                    "edge",
                    "serious" if baseline else "note",
                    f"{label(search.arm)}, {search.model}, {search.horizon:,} steps: the best {edge.key} is the "
                    f"{edge.side} that was tried, {edge.value:g}",
                    "The optimum may lie outside: widen the search"
                    + (". An under-tuned baseline makes every other arm look good." if baseline else "."),
                    tuple(trial.origin for trial in search.best.trials),
                )
            )
    return findings


def _budgets(study: Study) -> list[Finding]:
    """Tuning trials must be equal for all arms on each model and horizon, and within the budget."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for trial in study.tuning:
        if trial.run is not None and study.arms[trial.arm].role == "arm":
            cell = counts.setdefault((trial.model, trial.horizon), {})
            cell[trial.arm] = cell.get(trial.arm, 0) + 1
    findings = []
    for (model, horizon), by_arm in sorted(counts.items()):
        arms = {arm: by_arm.get(arm, 0) for arm in {*by_arm, study.baseline}}
        shown = ", ".join(f"{label(arm)} {count}" for arm, count in sorted(arms.items()))
        if len(set(arms.values())) > 1:
            short = arms[study.baseline] < max(arms.values())
            findings.append(
                Finding(
                    "budget",
                    "serious" if short else "note",
                    f"{model}, {horizon:,} steps: the arms were not tuned with the same number of trials",
                    f"Trials: {shown}."
                    + (f" {label(study.baseline)}, the baseline, had fewer than another arm." if short else ""),
                )
            )
        over = [
            arm
            for arm, count in arms.items()
            if (granted := study.arms[arm].granted(model, horizon)) and count > granted
        ]
        if over:
            findings.append(
                Finding(
                    "budget",
                    "serious",
                    f"{model}, {horizon:,} steps: more tuning trials than granted for {', '.join(map(label, over))}",
                    f"Trials: {shown}.",
                )
            )
    return findings


def _under_tuned(study: Study, searches: Sequence[Tuning]) -> list[Finding]:
    """Signs that the baseline is under-tuned: a parabola in the learning rate, and any better recorded run."""
    findings = []
    for model in study.models:
        ends = [end for end in study.endpoints(study.baseline, model) if not end.diverged]
        spread, freedom = _seed_noise(ends)
        for end in ends:
            reported = float(end.losses.mean())
            tried = [
                trial
                for trial in study.tuning
                if (trial.arm, trial.model, trial.horizon) == (study.baseline, model, end.horizon)
            ]
            # The luckiest of all tuning runs would be this far below the mean with a probability of one percent.
            luck = _quantile(0.01 / max(len(tried), 1), freedom) * spread * math.sqrt(1 + 1 / len(end.seeds))
            better = [trial for trial in tried if trial.loss < reported - max(luck, _MATTERS)]
            where = f"{label(study.baseline)}, {model}, {end.horizon:,} steps"
            if better:
                best = min(trial.loss for trial in better)
                findings.append(
                    Finding(
                        "tuning",
                        "serious",
                        f"{where}: a tuning trial ended lower than the reported runs",
                        f"{best:.4f} against a reported mean of {reported:.4f} nats: the reported runs do not use the "
                        "best hyper-parameters that were found, or the seed of the trial was lucky.",
                        tuple(trial.origin for trial in better),
                    )
                )
            for search in searches:
                if (search.arm, search.model, search.horizon) != (study.baseline, model, end.horizon):
                    continue
                gain = predicted_gain(search, "optimizer.lr")
                if gain is not None and gain > max(_quantile(0.01, freedom) * spread * math.sqrt(2), _MATTERS):
                    findings.append(
                        Finding(
                            "tuning",
                            "serious",
                            f"{where}: the learning rate looks under-tuned",
                            f"A parabola through the best rate and its neighbours promises {gain:.4f} nats more, "
                            f"beyond the noise of a seed ({spread:.4f}): try rates in between.",
                            tuple(trial.origin for trial in search.best.trials),
                        )
                    )
    return findings


def _seed_noise(ends: Sequence[Endpoints]) -> tuple[float, float]:
    """Return the standard deviation of the final loss over seeds, pooled over horizons, and its degrees of freedom."""
    freedom = float(sum(len(end.seeds) - 1 for end in ends))
    if freedom <= 0:
        return 0.0, 0.0
    squares = sum(float(end.losses.var()) * len(end.seeds) for end in ends)
    return math.sqrt(squares / freedom), freedom


def _quantile(tail: float, freedom: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`; 0 without degrees of freedom."""
    return -float(special.stdtrit(freedom, tail)) if freedom > 0 else 0.0


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
