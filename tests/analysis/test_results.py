"""From a study directory to its verdict: complete, and no verdict without enough evidence."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import Contrast, Currency, Ratio
from analysis.results import Results, analyse, write_json
from analysis.runs import load_run
from analysis.trials import load_study, study_of_runs
from tests.analysis.synthetic import TOKENS_PER_STEP, noise, power_law, write_run, write_tables


def test_a_known_speed_up_is_found(results: Results) -> None:
    for model in ("tiny", "small"):
        sophia, lion = results.verdict("sophiag", model), results.verdict("lion", model)
        assert (sophia.word, lion.word) == ("faster", "slower")
        cells = {(one.endpoints.arm, one.endpoints.model, one.endpoints.horizon): one for one in results.compared}
        currency: Currency
        for currency, truth in (("steps", 1.2), ("flops", 1.2 / 1.05)):
            ratio = cells["sophiag", model, 200].ratio_in(currency)
            assert isinstance(ratio, Ratio)
            assert ratio.low <= truth <= ratio.high
            assert not ratio.high_censored


def test_the_verdict_is_at_the_longest_common_horizon_and_the_claim_at_the_longest_with_a_double(
    results: Results,
) -> None:
    one = results.verdict("sophiag", "tiny")
    assert one.at is not None
    assert one.paper is not None
    assert one.at.endpoints.horizon == 400
    assert one.paper.endpoints.horizon == 200
    assert isinstance(one.paper.half, Contrast)
    assert (one.paper.half.horizon, one.paper.half.baseline_horizon, one.paper.half.word) == (200, 400, "higher")
    assert (one.claim, one.not_tested) == ("not tested", "200 steps are too short; 1,000 are the least")


def test_ablations_are_compared_but_have_no_verdict_and_no_part_in_the_family(results: Results) -> None:
    assert {one.arm for one in results.verdicts} == {"lion", "sophiag"}
    assert any(one.endpoints.arm == "sophiag_k100" for one in results.compared)
    assert results.study.corrected_level("tiny") == 1 - 0.05 / 2
    one = next(one for one in results.ablations if one.arm == "sophiag_k100")
    assert one.interval is not None
    assert one.interval.level == 0.95


def test_a_horizon_whose_seeds_have_not_all_ended_waits_for_its_verdict(tmp_path: Path) -> None:
    values = {"name": "one", "baseline": "adamw", "models": {"tiny": {"seeds": [1, 2]}}}
    values |= {"tuning": {"method": "grid", "trials": 1}, "arms": {"adamw": {"search": {}}, "lion": {"search": {}}}}
    trials: list[tuple[dict[str, Any], Path | None]] = []
    for arm, steps, seed in itertools.product(("adamw", "lion"), (100, 200), (1, 2)):
        row = {"arm": arm, "phase": "reporting", "model": "tiny", "horizon": steps, "seed": seed}
        missing = (arm, steps, seed) == ("lion", 200, 2)
        place = tmp_path / "runs" / f"{arm}{steps}{seed}"
        trials.append((row, None if missing else write_run(place, optimizer=arm, seed=seed, steps=steps)))
    write_tables(tmp_path / "one", values | {"plan": {"trials_at_most": 8}}, trials)
    (one,) = analyse(load_study([tmp_path / "one"])).verdicts
    assert one.at is not None
    assert one.at.endpoints.horizon == 100


def test_a_diverged_run_leaves_no_verdict_at_the_horizon_that_the_design_chose(tmp_path: Path) -> None:
    for steps in (100, 200):
        for seed in (1, 2):
            write_run(tmp_path / f"a{steps}{seed}", seed=seed, steps=steps, train_lines=False)
            status = "diverged" if (steps, seed) == (200, 2) else "completed"
            options = {"optimizer": "sophiag", "seed": seed, "steps": steps, "train_lines": False, "status": status}
            write_run(tmp_path / f"s{steps}{seed}", final=3.0, **options)  # type: ignore[arg-type]
    one = analyse(load_study([tmp_path])).verdict("sophiag", "tiny")
    assert one.at is not None
    assert one.at.endpoints.horizon == 200
    assert one.word == "no verdict"
    assert (
        one.sentence("adamw")
        == "Sophia-G on tiny (1.0M parameters): no verdict (1 of 2 runs of Sophia-G diverged at 200 steps)."
    )


def test_a_diverged_run_counts_with_the_tokens_of_a_whole_one(tmp_path: Path) -> None:
    """Else the scale of a study would depend on how early its runs diverge."""
    for seed, status in ((1, "completed"), (2, "diverged")):
        run = write_run(tmp_path / f"s{seed}", seed=seed, steps=100, status=status, train_lines=False)
        if status == "diverged":
            summary = json.loads((run / "summary.json").read_text())
            cut = {key: summary[key] // 2 for key in ("steps", "tokens", "flops")}
            (run / "summary.json").write_text(json.dumps(summary | cut))
    (end,) = load_study([tmp_path]).endpoints("adamw", "tiny")
    assert end.tokens.tolist() == [100 * TOKENS_PER_STEP] * 2
    assert end.flops[0] == end.flops[1]


def test_noise_as_large_as_the_effect_is_not_told_apart_and_the_detectable_difference_is_named(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for arm, speed in (("adamw", 1.0), ("sophiag", 1.1)):
            loss = power_law(100 * 1024, speedup=speed) + noise(seed, len(arm), scale=0.1)
            write_run(tmp_path / f"{arm}{seed}", optimizer=arm, seed=seed, steps=100, final=loss, train_lines=False)
    results = analyse(load_study([tmp_path]))
    one = results.verdict("sophiag", "tiny")
    assert one.word == "not told apart"
    assert "would be found four times in five" in one.sentence("adamw")
    assert any(finding.guard == "curve" for finding in results.findings), "one horizon gives no ratio: say so"


def test_one_seed_gives_a_difference_and_no_verdict(tmp_path: Path) -> None:
    for arm, loss in (("adamw", 3.0), ("lion", 3.25)):
        write_run(tmp_path / arm, optimizer=arm, steps=100, final=loss, train_lines=False)
    one = analyse(load_study([tmp_path])).verdict("lion", "tiny")
    assert one.word == "no verdict"
    assert one.sentence("adamw").endswith("(one seed); the final loss differs by +0.250 nats after 100 steps.")


def test_one_seed_at_the_longest_horizon_leaves_the_claim_its_verdict(tmp_path: Path) -> None:
    for arm, steps, seeds in (("adamw", 40000, (1, 2)), ("lion", 20000, (1, 2)), ("lion", 40000, (1,))):
        for seed in seeds:
            path = tmp_path / f"{arm}{steps}{seed}"
            write_run(path, optimizer=arm, steps=steps, seed=seed, final=3 + 0.01 * seed, train_lines=False)
    one = analyse(load_study([tmp_path])).verdict("lion", "tiny")
    assert "no verdict (one seed)" in one.sentence("adamw")
    assert "The paper's 2×: " in one.sentence("adamw")


def test_costs_name_the_share_of_the_curvature_passes(results: Results) -> None:
    sophia = next(one for one in results.costs if one.arm == "sophiag" and one.model == "tiny")
    assert sophia.curvature_flops_share == pytest.approx(0.05 / 1.05)
    assert sophia.curvature_seconds_share == pytest.approx(0.05 / 1.05)
    assert sophia.seconds_per_step == pytest.approx(0.05 * 1.05)


def test_a_sound_study_has_no_serious_finding(results: Results) -> None:
    assert not [finding for finding in results.findings if finding.severity == "serious"]


def test_findings_are_ordered_by_weight(results: Results) -> None:
    missing = ("adamw", 3, 400)
    trials = [
        replace(one, run=None) if (one.arm, one.seed, one.horizon) == missing else one for one in results.study.trials
    ]
    study = replace(results.study, trials=trials, damaged=("a record",))
    found = [(finding.weight, finding.guard) for finding in analyse(study).findings]
    assert found == sorted(found, key=lambda one: -one[0])
    assert {"records", "seeds"} <= {guard for _, guard in found}


def test_json_is_strict_and_names_the_runs_behind_each_number(results: Results, tmp_path: Path) -> None:
    write_json(results, tmp_path / "report.json")

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert {one["word"]["steps"] for one in content["verdicts"]} == {"faster", "slower"}
    assert {one["paper_claim"] for one in content["verdicts"]} == {"not tested"}
    runs = [run for one in content["final_losses"] for run in one["runs"]]
    assert runs
    assert {*runs} <= {trial.origin.name for trial in results.study.trials}


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
