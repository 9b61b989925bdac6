"""The content of a study's report as data: verdicts, contrasts, ratios, costs, findings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analysis.colours import label
from analysis.comparison import (
    PAPER_RATIO,
    ArmDiverged,
    Baseline,
    Compared,
    Contrast,
    Endpoints,
    Ratio,
    compare,
    fit_baseline,
)
from analysis.guards import Finding, Severity, inspect
from analysis.runs import Currency, Origin, RecordedRun
from analysis.sensitivity import Ablation, Grid, ablations, sensitivity_grid
from analysis.trials import Study
from analysis.tuning import Tuning, tunings
from analysis.wallclock import TRAINING_KINDS
from data.files import write_atomically

# The currencies of a verdict, with their names.
CURRENCY_NAMES: Mapping[Currency, str] = {"steps": "steps", "flops": "compute", "seconds": "wall-clock"}
VERDICT_CURRENCIES: tuple[Currency, ...] = tuple(CURRENCY_NAMES)

# A shorter run says nothing about the paper's claim, which is about 100,000 steps at 390 tokens a parameter.
CLAIM_STEPS = 1000
CLAIM_TOKENS_PER_PARAMETER = 10

Word = Literal["faster", "slower", "not told apart", "no verdict"]
Claim = Literal["seen", "not seen at this scale", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """What a study says about one arm on one model.

    The horizons are chosen by the design, not by the losses: `at` is the longest at which the arm and the baseline both have
    all their runs, `paper` the longest of the arm for which the baseline has twice the steps. Ratios are those of `paper`, if
    there is one, because at the baseline's longest horizon none above 1 can be measured.
    """

    arm: str
    model: str
    at: Compared | None
    paper: Compared | None
    tokens_per_parameter: float  # of the arm's runs in `paper`, else `at`; NaN if the size is not recorded
    size: float = math.nan  # parameters

    @property
    def word(self) -> Word:
        """Whether the arm ends lower ("faster") or higher ("slower") than the baseline after the same steps."""
        if self.at is None or isinstance(self.at.same, str) or self.at.same.interval is None:
            return "no verdict"
        words: dict[str, Word] = {"lower": "faster", "higher": "slower", "not told apart": "not told apart"}
        return words[self.at.same.word]

    def word_in(self, currency: Currency) -> Word:
        """Return the verdict in a currency: where an arm pays more for a step, "faster" needs a ratio that outweighs it."""
        word, rated = self.word, self.rated
        if currency in ("steps", "tokens") or word == "no verdict" or rated is None:
            return word
        price, ratio = rated.prices.get(currency), rated.ratio_in(currency)
        if price is None:
            return "no verdict"
        if isinstance(ratio, str):
            agrees = price == 1 or word == ("slower" if price > 1 else "faster")
            return word if agrees else "no verdict"
        if ratio.low > 1 and not ratio.low_censored:
            return "faster"
        if ratio.high < 1 and not ratio.high_censored:
            return "slower"
        return "not told apart" if ratio.covers(1.0) and ratio.low <= 1 <= ratio.high else "no verdict"

    @property
    def rated(self) -> Compared | None:
        """The arm's cell whose ratios are given."""
        return self.paper or self.at

    @property
    def claim(self) -> Claim:
        """The paper's claim: after half the steps the arm ends below the baseline. Runs that diverge do not."""
        if self.not_tested:
            return "not tested"
        assert self.paper is not None
        half = self.paper.half
        return "seen" if isinstance(half, Contrast) and half.word == "lower" else "not seen at this scale"

    @property
    def not_tested(self) -> str:
        """Why the runs do not test the claim; empty if they do."""
        if self.paper is None:
            return f"no run with a baseline of {PAPER_RATIO} times its steps"
        half = self.paper.half
        if isinstance(half, str) and not isinstance(half, ArmDiverged):
            return half
        if isinstance(half, Contrast) and half.interval is None:
            return "one seed"
        if self.paper.endpoints.horizon < CLAIM_STEPS:
            return f"{self.paper.endpoints.horizon:,} steps are too short; {CLAIM_STEPS:,} are the least"
        if not self.tokens_per_parameter >= CLAIM_TOKENS_PER_PARAMETER:
            shown = f"{self.tokens_per_parameter:.2g}" if math.isfinite(self.tokens_per_parameter) else "unknown"
            return f"{shown} tokens per parameter are too few; {CLAIM_TOKENS_PER_PARAMETER} are the least"
        return ""

    def sentence(self, baseline: str) -> str:
        """Return the verdict and what it says of the paper's claim, in sentences."""
        size = f" ({self.size / 1e6:.1f}M parameters)" if math.isfinite(self.size) else ""
        subject = f"{label(self.arm)} on {self.model}{size}"
        claim = "" if self.not_tested else f" {self._claimed(label(baseline))}"
        if self.at is None or isinstance(self.at.same, str):
            reason = "no horizon in common" if self.at is None else self.at.same
            return f"{subject}: no verdict ({reason}).{claim}"
        same, steps = self.at.same, f"{self.at.same.horizon:,} steps"
        if same.interval is None:
            apart = f"the final loss differs by {same.differences[0]:+.3f} nats after {steps}"
            return f"{subject}: no verdict (one seed); {apart}.{claim}"
        words = {"faster": "is faster than", "slower": "is slower than", "not told apart": "is not told apart from"}
        text = (
            f"{subject} {words[self.word]} {label(baseline)}: after {steps} its final loss differs by "
            f"{same.interval.text} nats ({len(same.seeds)} seeds, {100 * same.interval.level:.3g}% interval)"
        )
        assert self.rated is not None
        ratios = [
            f"{ratio.text} times as fast in {CURRENCY_NAMES[currency]}"
            for currency in VERDICT_CURRENCIES
            if isinstance(ratio := self.rated.ratio_in(currency), Ratio)
        ]
        if ratios:
            horizon = self.rated.endpoints.horizon
            text += f"; {f'over {horizon:,} steps ' if horizon != same.horizon else ''}it is {', '.join(ratios)}"
        elif self.word == "not told apart":
            text += (
                f"; with this spread over seeds, a true difference of {same.smallest_detectable:.3f} nats would be found "
                "four times in five"
            )
        return f"{text}. {self._claimed(label(baseline))}"

    def _claimed(self, baseline: str) -> str:
        text = f"The paper's {PAPER_RATIO}×: {self.claim}"
        if self.not_tested:
            return f"{text} ({self.not_tested})."
        assert self.paper is not None
        half = self.paper.half
        if isinstance(half, str):
            return f"{text} ({half})."
        assert half.interval is not None
        apart = ", not told apart from zero" if half.word == "not told apart" else ""
        return (
            f"{text}: after {half.horizon:,} steps its loss differs from {baseline}'s after {half.baseline_horizon:,} by "
            f"{half.interval.text} nats{apart}."
        )


@dataclass(frozen=True)
class ArmCost:
    """The cost of one arm's reported runs on one model, as means over runs, by the runs' own clocks."""

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


@dataclass(frozen=True)
class Results:
    """The content of a study's report."""

    study: Study
    findings: Sequence[Finding]  # strongest first
    verdicts: Sequence[Verdict]  # by model, then arm
    compared: Sequence[Compared]  # every arm and ablation at every horizon but the baseline
    baselines: Mapping[str, Baseline]  # by model
    tunings: Sequence[Tuning]
    costs: Sequence[ArmCost]
    ablations: Sequence[Ablation]
    grid: Grid | None  # over (β2, γ), if there are runs for it

    def verdict(self, arm: str, model: str) -> Verdict:
        return next(one for one in self.verdicts if (one.arm, one.model) == (arm, model))

    @property
    def sentences(self) -> list[str]:
        return [one.sentence(self.study.baseline) for one in self.verdicts]

    @property
    def doubts(self) -> Sequence[Finding]:
        """The strongest findings, for a page's top: all serious ones, and at least three."""
        return self.findings[: max(3, sum(one.severity == "serious" for one in self.findings))]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; runs are named by their trial or, without a study, by their directory."""
        cell = ("arm", "model", "horizon")
        return _plain(
            {
                "study": self.study.name,
                "baseline": self.study.baseline,
                "level": self.study.level,
                "seeds": self.study.seeds,
                "verdicts": [
                    {
                        "arm": one.arm,
                        "model": one.model,
                        "horizon": one.at.endpoints.horizon if one.at else None,
                        "word": {currency: one.word_in(currency) for currency in VERDICT_CURRENCIES},
                        "difference": one.at.same if one.at else None,
                        "ratio_horizon": one.rated.endpoints.horizon if one.rated else None,
                        "ratio": {c: one.rated.ratio_in(c) for c in VERDICT_CURRENCIES} if one.rated else None,
                        "paper_claim": one.claim,
                        "paper_claim_not_tested": one.not_tested,
                        "paper_difference": one.paper.half if one.paper else None,
                        "sentence": one.sentence(self.study.baseline),
                    }
                    for one in self.verdicts
                ],
                "findings": self.findings,
                "final_losses": [
                    _attributes(end, *cell, "seeds", "losses", "mean", "bits_per_byte", "standard_deviation", "runs")
                    for end in self.endpoints()
                ],
                "compared": [
                    _attributes(one.endpoints, *cell) | _attributes(one, "same", "half", "ratio", "prices")
                    for one in self.compared
                ],
                "self_tests": {model: baseline.self_test for model, baseline in self.baselines.items()},
                "costs": self.costs,
                "ablations": self.ablations,
                "beta2_gamma_grid": self.grid
                and {
                    "gamma": self.grid.gammas,
                    "beta2": self.grid.betas,
                    "loss": self.grid.losses,
                    "runs": [run.origin.name for run in self.grid.runs],
                },
            }
        )

    def endpoints(self) -> list[Endpoints]:
        """Return every cell of reported runs, the baseline's first on each model."""
        study, arms = self.study, self.study.arm_names("arm", "ablation")
        return [end for model in study.models for arm in arms for end in study.endpoints(arm, model)]


def analyse(study: Study, *, against_baseline: bool = True) -> Results:
    """Analyse a study. ValueError if the baseline has no finished reported run, unless `against_baseline` is False."""
    if against_baseline and not any(study.endpoints(study.baseline, model) for model in study.models):
        raise ValueError(_no_baseline(study))
    baselines: dict[str, Baseline] = {}
    findings = list(inspect(study))
    compared: list[Compared] = []
    verdicts: list[Verdict] = []
    sizes = model_sizes(study)
    # Of a study under way: the next sitting adds their seeds, so that they wait for their verdict.
    waiting = {one.cell for one in study.reporting if study.planned and not one.ended}
    for model in study.models:
        cells = study.endpoints(study.baseline, model)
        if not cells:
            continue
        try:
            baselines[model] = fit_baseline(cells)
        except ValueError as error:
            findings.append(Finding("baseline", "serious", f"{model}: the baseline cannot be used", str(error)))
            continue
        level = study.corrected_level(model)
        whole = [end for end in cells if (study.baseline, model, end.horizon) not in waiting]
        horizons = {end.horizon for end in whole or cells}
        for arm in study.arm_names("arm", "ablation"):
            if arm == study.baseline:
                continue
            own = compare(study.endpoints(arm, model), cells, baselines[model], level)
            compared += own
            if own and study.arms[arm].role == "arm":
                ended = [one for one in own if (arm, model, one.endpoints.horizon) not in waiting]
                verdicts.append(_verdict(ended or own, horizons, sizes.get(model, math.nan)))
        test = baselines[model].self_test
        if not test.passed:
            title = f"{model}: no ratios, only differences of loss"
            findings.append(Finding("curve", "note", title, f"{test.reason[0].upper()}{test.reason[1:]}."))
    searches = tunings(study)
    findings = [*_within_noise_of_search(verdicts, searches, study), *findings]
    findings.sort(key=lambda finding: -finding.weight)
    return Results(
        study=study,
        findings=findings,
        verdicts=verdicts,
        compared=compared,
        baselines=baselines,
        tunings=searches,
        costs=_costs(study),
        ablations=ablations(study),
        grid=sensitivity_grid(study),
    )


_LUCK = (
    "Other points of the same searches might change the sign. In nats, each beside one standard deviation, as if the two "
    "searches had drawn their points independently:"
)


def _within_noise_of_search(verdicts: Sequence[Verdict], searches: Sequence[Tuning], study: Study) -> Iterator[Finding]:
    """Differences that other random points of the two searches might undo."""
    noise = {
        (one.arm, one.model): one.noise
        for one in searches
        if study.arms[one.arm].method in ("random", "halton") and math.isfinite(one.noise)
    }
    told, claims = [], []
    decided = False
    for one in verdicts:
        own, baselines = noise.get((one.arm, one.model)), noise.get((study.baseline, one.model))
        same = one.at.same if one.at else ""
        if own is None or baselines is None or one.word == "no verdict" or not isinstance(same, Contrast):
            continue
        both, where = math.hypot(own, baselines), f"{label(one.arm)} on {one.model}"
        if abs(difference := float(same.differences.mean())) < 2 * both:
            told.append(f"{where} ({difference:+.3f} against {both:.3f})")
            decided |= one.word in ("faster", "slower")
        half = one.paper.half if one.paper and one.claim == "seen" else None
        if isinstance(half, Contrast) and abs(difference := float(half.differences.mean())) < 2 * both:
            claims.append(f"{where} ({-difference:.3f} against {both:.3f})")
    if told:
        title = "Differences within twice the noise of the searches"
        severity: Severity = "serious" if decided else "note"
        yield Finding("tuning", severity, title, f"{_LUCK} {'; '.join(told)}.")
    if claims:
        title = "The paper's 2× is seen by less than twice the noise of the searches"
        yield Finding("tuning", "serious", title, f"{_LUCK} {'; '.join(claims)}.")


def _no_baseline(study: Study) -> str:
    if settings := [arm for arm in study.arms if arm.startswith(f"{study.baseline} (")]:
        return (
            f"these runs are a sweep with {len(settings)} settings of the baseline {study.baseline!r}: compare them "
            f"with scripts/compare.py, or choose one, --baseline {settings[0]!r}"
        )
    return (
        f"no finished reported run of the baseline {study.baseline!r} in {study.name}: run it first, or name "
        f"another baseline (arms: {', '.join(study.arms) or 'none'})"
        + (f"; damaged: {study.left_out}" if study.damaged else "")
    )


def _verdict(own: Sequence[Compared], horizons: Collection[int], size: float) -> Verdict:
    """Choose the arm's longest cells for which the baseline has cells, whether or not their runs diverged."""
    arm, model = own[0].endpoints.arm, own[0].endpoints.model
    at = next((one for one in reversed(own) if one.endpoints.horizon in horizons), None)
    paper = next((one for one in reversed(own) if PAPER_RATIO * one.endpoints.horizon in horizons), None)
    told = paper or at
    tokens = float(told.endpoints.tokens.mean()) if told else math.nan
    return Verdict(arm, model, at, paper, tokens / size, size)


def model_sizes(study: Study) -> dict[str, float]:
    """Return the number of parameters of each model, from the records."""
    runs = [(trial.model, trial.run) for trial in study.reporting if trial.run is not None]
    return {model: float(size) for model, run in runs if (size := (run.summary or {}).get("parameters"))}


def _costs(study: Study) -> list[ArmCost]:
    costs = []
    for model, arm in itertools.product(study.models, study.arm_names("arm", "ablation")):
        runs = [run for run in study.runs(arm=arm, model=model) if run.summary]
        if not runs:
            continue
        steps, tokens, flops, clock = (
            sum(run.total(currency) for run in runs) for currency in ("steps", "tokens", "flops", "seconds")
        )
        seconds = {kind: _ledger_sum(runs, kind, "seconds") for kind in TRAINING_KINDS}
        shares = [run.clipped_norm_share for run in runs if math.isfinite(run.clipped_norm_share)]
        total = sum(seconds.values()) or clock
        costs.append(
            ArmCost(
                arm=arm,
                model=model,
                runs=len(runs),
                seconds_per_step=_over(total, steps),
                seconds_by_kind={kind: _over(value, steps) for kind, value in seconds.items()},
                flops_per_token=flops / max(tokens, 1.0),
                curvature_seconds_share=_over(seconds["curvature"], total),
                curvature_flops_share=_over(_ledger_sum(runs, "curvature", "flops"), flops),
                clipped_norm_share=float(np.mean(shares)) if shares else math.nan,
                peak_memory_bytes=max(float((run.summary or {}).get("peak_memory_bytes") or 0) for run in runs),
            )
        )
    return costs


def _ledger_sum(runs: Sequence[RecordedRun], kind: str, what: str) -> float:
    return sum(run.ledger.get(kind, {}).get(what, 0.0) for run in runs)


def _over(value: float, by: float) -> float:
    return value / by if by else math.nan


def write_json(results: Results, path: Path) -> None:
    """Write the results as strict JSON; non-finite numbers are null.

    Numbers have six significant digits; more would differ between processors.
    """
    write_atomically(path, json.dumps(results.as_json(), indent=1, allow_nan=False) + "\n")


def significant(value: float, digits: int = 6) -> float:
    """Round to `digits` significant digits; whole numbers do not change."""
    return float(value) if float(value).is_integer() else float(f"{value:.{digits}g}")


def _attributes(of: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Origin):
        return value.trial or value.path.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(_attributes(value, *(field.name for field in dataclasses.fields(value))))
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if isinstance(value, float):
        return significant(value) if math.isfinite(value) else None
    return value
