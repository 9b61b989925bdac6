"""From a study directory to its verdict: complete, corrected, and undecided without enough evidence."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report import render_html
from analysis.results import Results, analyse, in_short, write_json
from analysis.runs import load_run
from analysis.target import time_to_target
from analysis.trial_tables import read_trials, write_trials
from analysis.trials import load_study, study_of_runs
from analysis.wallclock import ReferenceTimes
from tests.analysis.synthetic import noise, power_law, write_run, write_study


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return analyse(load_study([write_study(tmp_path_factory.mktemp("study") / "synthetic")]))


def test_a_known_speed_up_is_found_in_every_currency(results: Results) -> None:
    for currency, truth in (("steps", 1.2), ("flops", 1.2 / 1.05), ("seconds", 1.2 / 1.05)):
        one = results.headline("sophiag", "tiny", currency, 1.0)  # type: ignore[arg-type]
        assert one.speed_up.low <= truth <= one.speed_up.high
        assert one.claim.verdict == "supported"
        assert results.headline("sophiag", "tiny", currency, 2.0).claim.verdict == "not supported"  # type: ignore[arg-type]
    assert results.headline("lion", "tiny", "steps", 1.0).claim.verdict == "not supported"


def test_p_values_are_corrected_over_all_claims_on_a_model(results: Results) -> None:
    """Two arms, three currencies, two claims."""
    on_tiny = [one for one in results.headlines if one.model == "tiny"]
    assert {one.family for one in on_tiny} == {12}
    assert len(on_tiny) == 12
    assert all(one.claim.adjusted_p >= one.claim.p for one in on_tiny)


def test_ablations_are_reported_but_claim_nothing(results: Results) -> None:
    assert not any("_k" in one.arm for one in results.headlines)
    assert any(one.endpoints.arm == "sophiag_k100" for one in results.finals)
    assert any(one.arm == "sophiag_k1" for one in results.speed_ups)


def test_differences_of_final_losses_are_paired_at_the_same_horizon(results: Results) -> None:
    by_cell = {(one.endpoints.arm, one.endpoints.model, one.endpoints.horizon): one for one in results.finals}
    arm, baseline = by_cell["sophiag", "tiny", 400], by_cell["adamw", "tiny", 400]
    assert arm.difference is not None
    assert arm.difference.estimate == pytest.approx(np.mean(arm.endpoints.losses - baseline.endpoints.losses))
    assert baseline.difference is None


def test_the_papers_rule_is_asked_at_each_horizon_that_has_a_half(results: Results) -> None:
    pairs = {(one.arm_horizon, one.baseline_horizon) for one in results.ends if one.arm == "sophiag"}
    assert pairs == {(200, 400)}
    assert all(one.verdict == "not supported" for one in results.ends)


def test_a_target_that_some_arm_never_reaches_is_kept_as_a_lower_bound(results: Results) -> None:
    lowest = min(one.target for one in results.target_times if one.model == "tiny")
    rows = [one for one in results.target_times if one.arm == "lion" and one.target == lowest]
    assert {one.reached for one in rows} == {0}
    assert {one.bound for one in rows} == {True}
    assert next(one for one in rows if one.horizon == 400).spent["steps"] == 400


@pytest.mark.parametrize(("late", "bound"), [(1, False), (2, True)])
def test_runs_that_do_not_reach_a_target_stay_in_the_median(late: int, bound: bool, tmp_path: Path) -> None:
    """Dropping them would make an arm look the faster the more often it fails."""
    write_run(tmp_path / "a", steps=100, final=3.0, evaluations=100, train_lines=False)
    for seed in range(3):
        final = 3.5 if seed < late else 2.9
        options = {"steps": 100, "final": final, "evaluations": 100, "train_lines": False}
        write_run(tmp_path / f"l{seed}", optimizer="lion", seed=seed, **options)
    rows = analyse(load_study([tmp_path])).target_times
    (one,) = [row for row in rows if row.arm == "lion"]
    assert (one.reached, one.runs, one.bound) == (3 - late, 3, bound)
    alone = time_to_target(load_run(tmp_path / "l2").evaluations, 3.0, "steps").spent
    assert one.spent["steps"] == pytest.approx(100 if bound else alone)


def test_costs_name_the_share_of_the_curvature_passes(results: Results) -> None:
    sophia = next(one for one in results.costs if one.arm == "sophiag" and one.model == "tiny")
    assert sophia.curvature_flops_share == pytest.approx(0.05 / 1.05)
    assert sophia.curvature_seconds_share == pytest.approx(0.05 / 1.05)
    assert sophia.seconds_per_step == pytest.approx(0.05 * 1.05)
    assert sophia.tuning_trials == 18


def test_a_sound_study_has_no_findings(results: Results) -> None:
    assert results.findings == []


def test_sentences_name_arm_model_currency_interval_and_both_verdicts(results: Results) -> None:
    first = results.sentences("sophiag", "tiny")[0]
    assert first.startswith("In steps, Sophia-G on tiny is 1.2")
    assert "times as fast as AdamW (200 steps, 3 seeds, 95% interval)" in first
    assert "faster at all is supported; the paper's 2× is not supported." in first


def test_json_is_strict_and_names_the_runs_behind_each_number(results: Results, tmp_path: Path) -> None:
    write_json(results, tmp_path / "report.json")

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert {one["verdict"] for one in content["verdict"]} <= {"supported", "not supported", "undecided"}
    runs = [run for one in content["final_losses"] for run in one["runs"]]
    assert runs
    assert {*runs} <= {trial.origin.name for trial in results.study.trials}


def test_noise_as_large_as_the_effect_is_undecided_and_the_number_of_seeds_is_reported(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for steps in (100, 200):
            for arm, speed in (("adamw", 1.0), ("sophiag", 1.1)):
                loss = power_law(steps * 1024, speedup=speed) + noise(seed, steps, len(arm), scale=0.1)
                write_run(
                    tmp_path / f"{arm}{steps}{seed}",
                    optimizer=arm,
                    seed=seed,
                    steps=steps,
                    final=loss,
                    train_lines=False,
                )
    results = analyse(load_study([tmp_path]))
    one = results.headline("sophiag", "tiny", "steps", 1.0)
    assert one.claim.verdict == "undecided"
    assert "seeds would" in results.sentences("sophiag", "tiny")[0]
    assert in_short(one.claim) == f"undecided (≈ {one.claim.seeds_to_decide:,} seeds)"
    assert f"&gt; 1: {in_short(one.claim)}" in render_html(results, tmp_path)
    assert any(finding.guard == "curve" for finding in results.findings), "two horizons are interpolated: say so"


def test_reference_times_give_wall_clock_beside_the_noisy_clock(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study", models={"tiny": 1e6})
    kinds = {"forward_backward": 0.04, "optimizer": 0.01, "data": 0.0, "curvature": 0.1}
    times = ReferenceTimes({"tiny": dict.fromkeys(("adamw", "lion", "sophiag"), kinds)}, "test")
    times.save(directory / "reference_times.json")
    results = analyse(load_study([directory]))
    modelled = [one for one in results.reference_speed_ups if one.arm == "sophiag" and one.horizon == 200]
    # Twenty refreshes of 0.1 s on top of 200 steps of 0.05 s.
    steps = next(one for one in results.speed_ups if one.arm == "sophiag" and one.horizon == 200)
    assert modelled[0].estimate == pytest.approx(steps.estimate * 10 / 12, rel=1e-6)


def test_tuning_is_billed_for_every_device(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study", models={"tiny": 1e6})
    before = {one.arm: one.tuning_device_seconds for one in analyse(load_study([directory])).costs}
    rows = read_trials(directory)
    for row in rows:
        row.environment["world_size"] = 8 if row.arm == "sophiag" else 1
    write_trials(directory, rows)
    after = {one.arm: one.tuning_device_seconds for one in analyse(load_study([directory])).costs}
    assert after["sophiag"] == pytest.approx(8 * before["sophiag"])
    assert after["adamw"] == before["adamw"] > 0


def test_bare_runs_are_arms_by_optimizer_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / "a", steps=4, train_lines=False)),
        load_run(
            write_run(tmp_path / "b", optimizer="lion", steps=4, config={"optimizer.lr": 1e-4}, train_lines=False)
        ),
        load_run(
            write_run(tmp_path / "c", optimizer="lion", steps=4, config={"optimizer.lr": 3e-4}, train_lines=False)
        ),
    ]
    assert [trial.arm for trial in study_of_runs(runs).trials] == ["adamw", "lion (lr=0.0001)", "lion (lr=0.0003)"]


def test_a_rate_tuned_per_horizon_does_not_split_an_arm(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / f"r{steps}", steps=steps, config={"optimizer.lr": rate}, train_lines=False))
        for steps, rate in ((4, 1e-3), (8, 5e-4))
    ]
    assert {trial.arm for trial in study_of_runs(runs).trials} == {"adamw"}


def test_without_a_finished_baseline_there_is_no_analysis(tmp_path: Path) -> None:
    write_run(tmp_path / "l", optimizer="lion", steps=4)
    with pytest.raises(ValueError, match="no finished reported run of the baseline 'adamw'"):
        analyse(load_study([tmp_path]))


def test_a_directory_without_runs_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_study([tmp_path])


def test_a_trend_against_size_comes_with_its_worth(results: Results) -> None:
    (found,) = [one for one in results.trends if (one.arm, one.currency) == ("lion", "steps")]
    assert found.points == 4
    assert "extrapolation" in found.worth(tokens=1e9, parameters=1e9)
    assert math.isfinite(found.at(tokens=1e6, parameters=2e6).estimate)


def test_json_has_no_digits_that_differ_between_processors(results: Results) -> None:
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for member in value:
                yield from numbers(member)
        elif isinstance(value, float):
            yield value

    found = list(numbers(results.as_json()))
    assert len(found) > 100
    assert all(value == float(f"{value:.6g}") or value.is_integer() for value in found)
