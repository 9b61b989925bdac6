"""The content of a study's report as data: verdicts, speed-ups, differences, costs, findings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.colours import label
from analysis.guards import Finding, inspect
from analysis.runs import CURRENCIES, Currency, Origin, RecordedRun
from analysis.scaling import ScalingLaw, Trend, scaling_law, trend
from analysis.sensitivity import Ablation, Grid, ablations, sensitivity_grid
from analysis.speedup import (
    CLAIM_CURRENCIES,
    THRESHOLDS,
    Baseline,
    Claim,
    EndOfRuns,
    Endpoints,
    SpeedUp,
    correct,
    correct_ends,
    end_of_runs,
    fit_baseline,
    headline,
    speed_ups,
)
from analysis.statistics import Interval
from analysis.target import time_to_target
from analysis.trials import Study
from analysis.tuning import Tuning, tunings
from analysis.wallclock import TRAINING_KINDS
from data.files import write_atomically

CURRENCY_NAMES: Mapping[str, str] = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
CLAIM_NAMES: Mapping[str, str] = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "compute",
    "seconds": "wall-clock",
}


@dataclass(frozen=True)
class Headline:
    """One claim about one arm on one model, at the horizon chosen by the design, corrected for the family."""

    arm: str
    model: str
    currency: Currency
    speed_up: SpeedUp
    claim: Claim
    family: int  # number of claims on this model that are corrected together


@dataclass(frozen=True)
class FinalLoss:
    """An arm's final losses at one horizon, and their paired difference from the baseline's at the same horizon."""

    endpoints: Endpoints
    mean: float  # nats; NaN if a run diverged
    standard_deviation: float  # over seeds
    difference: Interval | None  # None for the baseline and without common seeds
    p: float


@dataclass(frozen=True)
class TargetTime:
    """The median cost at which the runs of one cell first reached a target loss.

    A run that did not reach it counts with more than its total cost, so the median may be a lower bound.
    """

    arm: str
    model: str
    horizon: int
    target: float  # nats
    reached: int
    runs: int
    spent: Mapping[Currency, float]
    bound: bool  # the median run did not reach the target: `spent` is a lower bound


@dataclass(frozen=True)
class ArmCost:
    """The cost of one arm's reported runs on one model, as means over runs."""

    arm: str
    model: str
    runs: int
    seconds_per_step: float
    seconds_by_kind: Mapping[str, float]  # per step
    flops_per_token: float
    curvature_seconds_share: float
    curvature_flops_share: float
    clipped_norm_share: float  # share of steps with a clipped gradient norm
    peak_memory_bytes: float
    tuning_trials: int
    tuning_diverged: int
    tuning_device_seconds: float


@dataclass(frozen=True)
class Results:
    """The content of a study's report."""

    study: Study
    findings: Sequence[Finding]
    headlines: Sequence[Headline]
    speed_ups: Sequence[SpeedUp]
    reference_speed_ups: Sequence[SpeedUp]  # seconds by the reference-time model; empty without reference times
    finals: Sequence[FinalLoss]
    ends: Sequence[EndOfRuns]  # the paper's rule, at half the baseline's steps
    crossings: Sequence[Any]
    target_times: Sequence[TargetTime]
    tunings: Sequence[Tuning]
    costs: Sequence[ArmCost]
    ablations: Sequence[Ablation]
    grid: Grid | None  # over (β2, γ), if there are runs for it
    baselines: Mapping[str, Baseline]  # by model
    token_laws: Sequence[ScalingLaw]
    size_laws: Sequence[ScalingLaw]
    trends: Sequence[Trend]

    def headline(self, arm: str, model: str, currency: Currency, threshold: float) -> Headline:
        return next(
            one
            for one in self.headlines
            if (one.arm, one.model, one.currency, one.claim.threshold) == (arm, model, currency, threshold)
        )

    def sentences(self, arm: str, model: str) -> list[str]:
        """Return the verdict on one arm in words, one sentence per currency."""
        return [self._sentence(arm, model, currency) for currency in CLAIM_CURRENCIES]

    def _sentence(self, arm: str, model: str, currency: Currency) -> str:
        parts = []
        for threshold in THRESHOLDS:
            one = self.headline(arm, model, currency, threshold)
            words = "faster at all" if threshold == 1 else f"the paper's {threshold:g}×"
            parts.append(f"{words} is {one.claim.verdict}{_why_undecided(one)}")
        at = self.headline(arm, model, currency, 1.0).speed_up
        level = f"{at.level:.0%} interval"
        known = not math.isnan(at.estimate)
        ratio = f"is {at.text} times as fast as {label(self.study.baseline)}" if known else "has no speed-up"
        return (
            f"In {CLAIM_NAMES[currency]}, {label(arm)} on {model} {ratio} "
            f"({at.horizon:,} steps, {at.seeds} seeds, {level}): {'; '.join(parts)}."
        )

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; runs are named by their trial or, without a study, by their directory."""
        return {
            "study": self.study.name,
            "baseline": self.study.baseline,
            "level": self.study.level,
            "seeds": list(self.study.seeds),
            "verdict": [
                {
                    "arm": one.arm,
                    "model": one.model,
                    "currency": one.currency,
                    "threshold": one.claim.threshold,
                    "verdict": one.claim.verdict,
                    "p": _number(one.claim.p),
                    "adjusted_p": _number(one.claim.adjusted_p),
                    "family": one.family,
                    "horizon": one.speed_up.horizon,
                    "estimate": _number(one.speed_up.estimate),
                    "estimate_censored": one.speed_up.estimate_censored,
                    "low": _number(one.speed_up.low),
                    "low_censored": one.speed_up.low_censored,
                    "high": _number(one.speed_up.high),
                    "high_censored": one.speed_up.high_censored,
                    "seeds": one.speed_up.seeds,
                    "seeds_to_decide": one.claim.seeds_to_decide,
                    "testable": one.claim.testable,
                }
                for one in self.headlines
            ],
            "findings": [self._plain(finding) for finding in self.findings],
            "final_losses": [
                {
                    "arm": one.endpoints.arm,
                    "model": one.endpoints.model,
                    "horizon": one.endpoints.horizon,
                    "seeds": list(one.endpoints.seeds),
                    "losses": [_number(loss) for loss in one.endpoints.losses],
                    "mean": _number(one.mean),
                    "standard_deviation": _number(one.standard_deviation),
                    "difference": self._plain(one.difference),
                    "p": _number(one.p),
                    "runs": [_named(run) for run in one.endpoints.runs],
                }
                for one in self.finals
            ],
            "speed_ups": [self._plain(one) for one in self.speed_ups],
            "reference_speed_ups": [self._plain(one) for one in self.reference_speed_ups],
            "end_of_runs": [self._plain(one) for one in self.ends],
            "mid_run_crossings_not_speed_ups": [self._plain(one) for one in self.crossings],
            "time_to_target": [self._plain(one) for one in self.target_times],
            "costs": [self._plain(one) for one in self.costs],
            "ablations": [self._plain(one) for one in self.ablations],
            "beta2_gamma_grid": None
            if self.grid is None
            else {
                "gamma": [_number(gamma) for gamma in self.grid.gammas],
                "beta2": [_number(beta) for beta in self.grid.betas],
                "loss": [[_number(loss) for loss in row] for row in self.grid.losses],
                "runs": [_named(run.origin) for run in self.grid.runs],
            },
        }

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Origin):
            return _named(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: self._plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): self._plain(member) for key, member in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(member) for member in value]
        return _number(value) if isinstance(value, float) else value


def analyse(study: Study, *, against_baseline: bool = True) -> Results:
    """Analyse a study.

    Args:
        against_baseline: if False, omit verdicts when the baseline has no run, for figures that need none.

    Raises:
        ValueError: the baseline has no finished reported run.
    """
    if against_baseline and not any(study.endpoints(study.baseline, model) for model in study.models):
        settings = [arm for arm in study.arms if arm.startswith(f"{study.baseline} (")]
        if settings:
            raise ValueError(
                f"these runs are a sweep with {len(settings)} settings of the baseline {study.baseline!r}: compare them "
                f"with scripts/compare.py, or choose one, --baseline {settings[0]!r}"
            )
        raise ValueError(
            f"no finished reported run of the baseline {study.baseline!r} in {study.name}: run it first, or name "
            f"another baseline (arms: {', '.join(study.arms) or 'none'})"
            + (f"; damaged: {study.left_out}" if study.damaged else "")
        )
    baselines: dict[str, Baseline] = {}
    findings = list(inspect(study))
    measured: list[SpeedUp] = []
    modelled: list[SpeedUp] = []
    headlines: list[Headline] = []
    ends: list[EndOfRuns] = []
    for model in study.models:
        cells = study.endpoints(study.baseline, model)
        if not cells:
            continue
        try:
            baselines[model] = fit_baseline(cells)
        except ValueError as error:
            findings.insert(0, Finding("baseline", "serious", f"{model}: the baseline cannot be used", str(error)))
            continue
        findings += _curve_findings(study, model, baselines[model])
        model_ends: list[EndOfRuns] = []
        chosen: list[tuple[SpeedUp, Claim]] = []
        for arm in [*study.arm_names(), *study.arm_names("ablation")]:
            arm_cells = study.endpoints(arm, model)
            if arm == study.baseline or not arm_cells:
                continue
            by_currency = {
                currency: speed_ups(arm_cells, baselines[model], currency, level=study.level) for currency in CURRENCIES
            }
            measured += [one for results in by_currency.values() for one in results]
            modelled += _modelled(study, arm, model)
            if study.arms[arm].role == "arm":
                model_ends += end_of_runs(arm_cells, cells, level=study.level)
                for currency in CLAIM_CURRENCIES:
                    one = headline(by_currency[currency])
                    chosen += [(one, claim) for claim in one.claims]
        corrected = correct([claim for _, claim in chosen], study.level)
        headlines += [
            Headline(one.arm, model, one.currency, one, claim, len(chosen))
            for (one, _), claim in zip(chosen, corrected, strict=True)
        ]
        ends += correct_ends(model_ends, study.level)
    findings.sort(key=lambda finding: -finding.weight)
    return Results(
        study=study,
        findings=findings,
        headlines=headlines,
        speed_ups=measured,
        reference_speed_ups=modelled,
        finals=_finals(study),
        ends=ends,
        crossings=(),
        target_times=_target_times(study),
        tunings=tunings(study),
        costs=_costs(study),
        ablations=ablations(study),
        grid=sensitivity_grid(study),
        baselines=baselines,
        token_laws=_token_laws(study),
        size_laws=_size_laws(study),
        trends=_trends(study, measured),
    )


def write_json(results: Results, path: Path) -> None:
    """Write the results as strict JSON; non-finite numbers are null.

    Numbers have six significant digits; more would differ between processors.
    """
    write_atomically(path, json.dumps(results.as_json(), indent=1, allow_nan=False) + "\n")


def _named(origin: Origin) -> str:
    return origin.trial or origin.path.as_posix()


def model_sizes(study: Study) -> dict[str, float]:
    """Return the number of parameters of each model, from the records."""
    sizes: dict[str, float] = {}
    for trial in study.reporting:
        summary = {} if trial.run is None else trial.run.summary or {}
        if summary.get("parameters"):
            sizes[trial.model] = float(summary["parameters"])
    return sizes


def _why_undecided(one: Headline) -> str:
    if one.claim.verdict != "undecided":
        return ""
    if one.speed_up.reason:
        return f" ({one.speed_up.reason})"
    if not one.claim.testable:
        low, high = one.speed_up.range
        return f" (the baseline's horizons allow ratios from {low:.2f} to {high:.2f} to be tested)"
    if one.claim.difference is None or one.claim.difference.degrees_of_freedom <= 0:
        return " (one seed: no interval)"
    if one.claim.seeds_to_decide is None:
        return " (more than 1,000 seeds would be needed: too small an effect to matter)"
    alone = one.claim.p < 1 - one.speed_up.level
    p = f"p = {one.claim.p:.3f} alone, {one.claim.adjusted_p:.3f} among {one.family} claims; " if alone else ""
    return f" ({p}about {one.claim.seeds_to_decide:,} seeds would decide)"


def in_short(claim: Claim) -> str:
    """Return a claim's verdict; if undecided, with the number of seeds that would decide it."""
    if claim.verdict != "undecided" or claim.difference is None or claim.difference.degrees_of_freedom <= 0:
        return claim.verdict
    if not claim.testable:
        return "undecided (out of range)"
    seeds = claim.seeds_to_decide
    return f"undecided ({'> 1,000' if seeds is None else f'≈ {seeds:,}'} seeds)"


def _curve_findings(study: Study, model: str, baseline: Baseline) -> list[Finding]:
    findings = []
    count = len(baseline.endpoints)
    if count < 4:
        findings.append(
            Finding(
                "curve",
                "note",
                f"{model}: {label(study.baseline)} has {count} horizons, so its loss is interpolated between them",
                "A line above a convex curve flatters the arms between two horizons; four horizons allow a fit.",
            )
        )
    elif baseline.lack_of_fit_p < 0.01:
        findings.append(
            Finding(
                "curve",
                "serious",
                f"{model}: the losses of {label(study.baseline)} do not follow the power law",
                f"Its misfit is beyond the noise of the seeds (p = {baseline.lack_of_fit_p:.2g}): trust the comparison "
                "of ends of runs more than the D-equivalent ratio.",
            )
        )
    return findings


def _modelled(study: Study, arm: str, model: str) -> list[SpeedUp]:
    times = study.reference_times
    if times is None:
        return []
    arm_cells = study.endpoints(arm, model, times=times)
    baseline_cells = study.endpoints(study.baseline, model, times=times)
    if not _finite_seconds(arm_cells) or not _finite_seconds(baseline_cells):
        return []
    return speed_ups(arm_cells, fit_baseline(baseline_cells), "seconds", level=study.level)


def _finite_seconds(cells: Sequence[Endpoints]) -> bool:
    return all(np.all(np.isfinite(end.seconds)) for end in cells)


def _finals(study: Study) -> list[FinalLoss]:
    finals = []
    for model in study.models:
        baseline = study.endpoints(study.baseline, model)
        for arm in [*study.arm_names(), *study.arm_names("ablation")]:
            cells = study.endpoints(arm, model)
            same = {one.arm_horizon: one for one in end_of_runs(cells, baseline, ratio=1.0, level=study.level)}
            for end in cells:
                complete = not end.diverged
                paired = same.get(end.horizon) if arm != study.baseline else None
                finals.append(
                    FinalLoss(
                        endpoints=end,
                        mean=float(end.losses.mean()) if complete else math.nan,
                        standard_deviation=float(end.losses.std(ddof=1))
                        if complete and len(end.seeds) > 1
                        else math.nan,
                        difference=paired.difference if paired else None,
                        p=paired.p if paired else math.nan,
                    )
                )
    return finals


def _target_times(study: Study) -> list[TargetTime]:
    """Return times to the baseline's mean final losses, along the curves of every cell's runs."""
    rows = []
    for model in study.models:
        ends = [end for end in study.endpoints(study.baseline, model) if not end.diverged]
        for target in (float(end.losses.mean()) for end in ends):
            for arm in study.arm_names():
                by_horizon: dict[int, list[RecordedRun]] = {}
                for run in study.runs(arm=arm, model=model):
                    if len(run.evaluations):
                        by_horizon.setdefault(run.horizon, []).append(run)
                for horizon, runs in sorted(by_horizon.items()):
                    rows.append(_target_time(arm, model, horizon, target, runs))
    return rows


def _target_time(arm: str, model: str, horizon: int, target: float, runs: Sequence[RecordedRun]) -> TargetTime:
    spent: dict[Currency, float] = {}
    reached, bound = 0, False
    for currency in CURRENCIES:
        times = [time_to_target(run.evaluations, target, currency) for run in runs]
        reached = sum(time.reached for time in times)
        spent[currency] = float(np.median([time.spent for time in times]))
        bound = not math.isfinite(np.median([time.spent if time.reached else math.inf for time in times]))
    return TargetTime(arm, model, horizon, target, reached, len(runs), spent, bound)


def _costs(study: Study) -> list[ArmCost]:
    costs = []
    for model in study.models:
        for arm in [*study.arm_names(), *study.arm_names("ablation")]:
            runs = [run for run in study.runs(arm=arm, model=model) if run.summary]
            if not runs:
                continue
            tuning = [trial for trial in study.tuning if trial.arm == arm and trial.model == model and trial.run]
            steps = sum(run.total("steps") for run in runs)
            seconds = {kind: sum(_entry(run, kind, "seconds") for run in runs) for kind in TRAINING_KINDS}
            flops = sum(run.total("flops") for run in runs)
            shares = [run.clipped_norm_share for run in runs if math.isfinite(run.clipped_norm_share)]
            total = sum(seconds.values()) or sum(run.total("seconds") for run in runs)
            costs.append(
                ArmCost(
                    arm=arm,
                    model=model,
                    runs=len(runs),
                    seconds_per_step=total / steps if steps else math.nan,
                    seconds_by_kind={kind: value / steps if steps else math.nan for kind, value in seconds.items()},
                    flops_per_token=flops / max(sum(run.total("tokens") for run in runs), 1.0),
                    curvature_seconds_share=seconds["curvature"] / total if total else math.nan,
                    curvature_flops_share=sum(_entry(run, "curvature", "flops") for run in runs) / flops
                    if flops
                    else math.nan,
                    clipped_norm_share=float(np.mean(shares)) if shares else math.nan,
                    peak_memory_bytes=max(float((run.summary or {}).get("peak_memory_bytes") or 0) for run in runs),
                    tuning_trials=len(tuning),
                    tuning_diverged=sum(trial.status == "diverged" for trial in tuning),
                    tuning_device_seconds=sum(trial.device_seconds for trial in tuning),
                )
            )
    return costs


def _entry(run: RecordedRun, kind: str, what: str) -> float:
    ledger = (run.summary or {}).get("ledger") or {}
    return float((ledger.get(kind) or {}).get(what, 0.0))


def _token_laws(study: Study) -> list[ScalingLaw]:
    laws = []
    for model in study.models:
        for arm in study.arm_names():
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            law = scaling_law(arm, "tokens", [float(end.tokens.mean()) for end in ends], ends, study.level)
            if law is not None and len(ends) >= 4:
                laws.append(dataclasses.replace(law, arm=f"{arm} on {model}" if len(study.models) > 1 else arm))
    return laws


def _size_laws(study: Study) -> list[ScalingLaw]:
    """Fit laws at the longest horizon of each model, for arms with at least three models."""
    sizes = model_sizes(study)
    laws = []
    for arm in study.arm_names():
        points = []
        for model in study.models:
            ends = [end for end in study.endpoints(arm, model) if not end.diverged]
            if ends and model in sizes:
                points.append((sizes[model], ends[-1]))
        law = scaling_law(arm, "parameters", [size for size, _ in points], [end for _, end in points], study.level)
        if law is not None:
            laws.append(law)
    return laws


def _trends(study: Study, results: Sequence[SpeedUp]) -> list[Trend]:
    sizes = model_sizes(study)
    tokens = {
        (arm, model, end.horizon): float(end.tokens.mean())
        for arm in study.arm_names()
        for model in study.models
        for end in study.endpoints(arm, model)
    }
    trends = []
    for arm in study.arm_names():
        for currency in CLAIM_CURRENCIES:
            own = [one for one in results if (one.arm, one.currency) == (arm, currency) and one.model in sizes]
            found = trend(own, [tokens[arm, one.model, one.horizon] for one in own], [sizes[one.model] for one in own])
            if found is not None:
                trends.append(found)
    return trends


def significant(value: float, digits: int = 6) -> float:
    """Round to `digits` significant digits; whole numbers do not change."""
    return float(value) if float(value).is_integer() else float(f"{value:.{digits}g}")


def _number(value: float) -> float | None:
    return significant(value) if math.isfinite(value) else None
