"""Expansion: trials in order, within budget, a pure function of the record, equal for all arms."""

import math
from collections import Counter
from collections.abc import Callable

import pytest

from studies.expansion import Expansion, Outcome, Trial, expand, expected_trials, value_overrides
from studies.spec import StudySpec, validate_spec
from tests.studies.small import small
from training.compose import compose


def loss_of(trial: Trial) -> float:
    """A made-up loss with an optimum at 2e-3 and β1 = 0.9."""
    rate = math.log(float(trial.values["optimizer.lr"]) / 2e-3)
    return 4.0 + rate**2 + 10 * (float(trial.values["optimizer.betas[0]"]) - 0.9) ** 2 + 1 / trial.horizon


def to_the_end(
    spec: StudySpec, *, at_once: int = 1, loss: Callable[[Trial], float] = loss_of
) -> tuple[Expansion, dict[str, Outcome]]:
    outcomes: dict[str, Outcome] = {}
    for _ in range(500):
        current = expand(spec, outcomes)
        missing = current.missing(outcomes)
        if current.finished:
            assert not missing
            return current, outcomes
        assert missing, "a plan that is not finished has something to run"
        for trial in missing[:at_once]:
            outcomes[trial.name] = Outcome("completed", loss(trial))
    raise AssertionError("the study does not end")


@pytest.fixture(scope="module")
def spec() -> StudySpec:
    return validate_spec(small(), "small.yaml")


@pytest.fixture(scope="module")
def finished(spec: StudySpec) -> Expansion:
    return to_the_end(spec)[0]


def test_at_first_only_the_searches_can_start(spec: StudySpec) -> None:
    first = expand(spec, {})
    assert {trial.phase for trial in first.trials} == {"tuning"}
    assert {trial.model for trial in first.trials} == {"gpt2_nano"}
    assert {trial.horizon for trial in first.trials} == {50}
    assert not first.finished


def test_models_follow_one_another_on_each_short_horizons_come_first_and_ablations_are_last(
    finished: Expansion,
) -> None:
    places = []
    for trial in finished.trials:
        search = trial.phase == "tuning" and trial.horizon == 50
        arm = "any" if search or trial.arm.startswith("sophiag_") else trial.arm
        place = (trial.model, trial.arm.startswith("sophiag_"), trial.horizon, arm, trial.phase)
        if place not in places:
            places.append(place)
    nano, micro = "gpt2_nano", "gpt2_micro"
    assert places == [
        (nano, False, 50, "any", "tuning"),
        (nano, False, 25, "adamw", "tuning"),
        (nano, False, 25, "adamw", "reporting"),
        (nano, False, 50, "adamw", "reporting"),
        (nano, False, 50, "sophiag", "reporting"),
        (nano, False, 100, "adamw", "tuning"),
        (nano, False, 100, "adamw", "reporting"),
        (nano, False, 100, "sophiag", "tuning"),
        (nano, False, 100, "sophiag", "reporting"),
        (micro, False, 50, "any", "tuning"),
        (micro, False, 50, "adamw", "reporting"),
        (micro, False, 50, "sophiag", "reporting"),
        (nano, True, 50, "any", "reporting"),
    ]


def test_every_arm_spends_the_budget_that_the_study_grants(spec: StudySpec, finished: Expansion) -> None:
    tuned = Counter((t.arm, t.model, t.horizon) for t in finished.trials if t.phase == "tuning")
    assert tuned["adamw", "gpt2_nano", 50] == tuned["sophiag", "gpt2_nano", 50] == 6
    assert tuned["adamw", "gpt2_nano", 100] == tuned["sophiag", "gpt2_nano", 100] == 3
    assert tuned["adamw", "gpt2_micro", 50] == tuned["sophiag", "gpt2_micro", 50] == 3
    for cell, count in tuned.items():
        assert count <= finished.budgets[cell]


def test_reported_runs_use_the_best_that_was_found_at_seeds_of_their_own(finished: Expansion) -> None:
    reported = [t for t in finished.trials if t.phase == "reporting" and t.arm == "adamw" and t.model == "gpt2_nano"]
    assert {(t.horizon, t.seed) for t in reported} == {(h, s) for h in (25, 50, 100) for s in (1, 2, 3)}
    assert {t.values["optimizer.lr"] for t in reported} == {2e-3}
    assert {t.seed for t in finished.trials if t.phase == "tuning"} == {100}


def test_a_model_like_another_starts_from_its_best_point(finished: Expansion) -> None:
    first = next(t for t in finished.trials if t.model == "gpt2_micro" and t.arm == "sophiag")
    assert first.values["optimizer.lr"] == 2e-3
    assert all(t.values["optimizer.betas[0]"] == 0.9 for t in finished.trials if t.model == "gpt2_micro")


def test_ablations_inherit_the_arms_values_and_change_what_they_say(finished: Expansion) -> None:
    ablations = [trial for trial in finished.trials if trial.arm == "sophiag_k1"]
    assert [trial.seed for trial in ablations] == [1, 2]
    config = compose([*ablations[0].overrides, "name=x"])
    assert config.optimizer.hessian_interval == 1  # type: ignore[union-attr]
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.betas == (0.9, 0.99)  # type: ignore[union-attr]


def test_the_whole_study_has_as_many_trials_as_were_expected(spec: StudySpec, finished: Expansion) -> None:
    counted = Counter((t.arm, t.model, t.horizon, t.phase) for t in finished.trials)
    expected = expected_trials(spec)
    assert set(counted) == set(expected)
    assert all(counted[cell] <= expected[cell] for cell in counted)


def test_names_are_unique_and_tell_arm_model_horizon_and_seed(finished: Expansion) -> None:
    names = [trial.name for trial in finished.trials]
    assert len(names) == len(set(names))
    assert all(name.endswith(f"-s{trial.seed}") for name, trial in zip(names, finished.trials, strict=True))
    assert names[0].startswith("adamw-gpt2_nano-50-")


def test_parallel_and_sequential_trials_give_the_same_study(spec: StudySpec, finished: Expansion) -> None:
    parallel, _ = to_the_end(spec, at_once=8)
    assert [trial.name for trial in parallel.trials] == [trial.name for trial in finished.trials]


def test_a_plan_depends_on_the_record_alone(spec: StudySpec) -> None:
    """Whatever was forgotten by a kill is asked again, and nothing else."""
    _, outcomes = to_the_end(spec)
    lost = next(iter(outcomes))
    remaining = {name: outcome for name, outcome in outcomes.items() if name != lost}
    assert expand(spec, remaining).missing(remaining)[0].name == lost


def test_a_search_waits_until_all_tuning_seeds_have_answered() -> None:
    values = small()
    values["tuning"] |= {"seeds": [100, 101], "trials": 10, "retune": {"keys": ["optimizer.lr"], "trials": 6}}
    spec = validate_spec(values, "small.yaml")
    first = [trial for trial in expand(spec, {}).trials if trial.arm == "adamw"]
    assert [trial.seed for trial in first] == [100, 101]
    assert len([t for t in expand(spec, {first[0].name: Outcome("completed", 4.0)}).trials if t.arm == "adamw"]) == 2
    both = {trial.name: Outcome("completed", 4.0) for trial in first}
    assert len([trial for trial in expand(spec, both).trials if trial.arm == "adamw"]) > 2


def with_finalists(**options: bool) -> StudySpec:
    values = small()
    values["tuning"]["finalists"] = {"settings": 4, "seeds": [101, 102], **options}
    return validate_spec(values, "small.yaml")


def test_finalists_on_further_seeds_overrule_a_lucky_one() -> None:
    def loss(trial: Trial) -> float:
        """On seed 100, a rate that is worse on all others is the best; one diverges on seed 102 alone."""
        rate = float(trial.values["optimizer.lr"])
        if trial.seed == 102 and rate == 1e-3:
            return math.inf
        return loss_of(trial) - (1.0 if trial.seed == 100 and rate >= 4e-3 else 0.0)

    finished, outcomes = to_the_end(with_finalists(), loss=loss)
    search = [t for t in finished.trials if (t.arm, t.horizon, t.phase) == ("adamw", 50, "tuning")]
    search = [trial for trial in search if trial.model == "gpt2_nano"]
    assert min(search, key=lambda t: outcomes[t.name].loss).values["optimizer.lr"] == 4e-3
    assert {t.values["optimizer.lr"] for t in finished.trials if t.phase == "reporting"} == {2e-3}
    first = [trial for trial in search if trial.seed == 100]
    ranked = sorted(first, key=lambda t: outcomes[t.name].loss)
    assert [t.values for t in search if t.seed == 101] == [t.values for t in ranked[:4]], "the best four, each once"
    lost = {t.name for t in search if t.seed == 102}
    remaining = {name: outcome for name, outcome in outcomes.items() if name not in lost}
    assert {t.name for t in expand(with_finalists(), remaining).missing(remaining)} == lost


@pytest.mark.parametrize("retune", [True, False])
def test_finalists_count_in_the_budget_and_are_as_many_for_every_arm(retune: bool) -> None:
    spec = with_finalists(retune=retune)
    finished, _ = to_the_end(spec)
    tuned = Counter((t.arm, t.model, t.horizon) for t in finished.trials if t.phase == "tuning")
    retuning = 3 + (3 * 2 if retune else 0)  # three settings
    assert {(cell[1:], count) for cell, count in tuned.items()} == {
        (("gpt2_nano", 50), 6 + 4 * 2),
        (("gpt2_nano", 25), retuning),
        (("gpt2_nano", 100), retuning),
        (("gpt2_micro", 50), retuning),
    }
    assert tuned == finished.budgets
    assert {cell[:3]: n for cell, n in expected_trials(spec).items() if cell[3] == "tuning"} == tuned


def test_a_setting_that_diverged_in_the_search_is_no_finalist() -> None:
    def loss(trial: Trial) -> float:
        return math.inf if trial.seed == 100 and trial.values["optimizer.lr"] != 2e-3 else loss_of(trial)

    finished, _ = to_the_end(with_finalists(), loss=loss)
    assert {t.values["optimizer.lr"] for t in finished.trials if t.seed == 101} == {2e-3}


def test_a_search_over_ranges_is_retuned_from_its_best_point() -> None:
    values = small()
    values["tuning"] |= {"method": "halton"}
    for arm in values["arms"].values():
        arm["search"] = {
            "optimizer.lr": {"low": 5e-4, "high": 8e-3, "start": 5e-4},
            "optimizer.betas[0]": {"low": 0.8, "high": 0.98, "scale": "linear"},
        }
    finished, _ = to_the_end(validate_spec(values, "small.yaml"))
    first, *_ = (t for t in finished.trials if t.arm == "adamw")
    assert first.values == {"optimizer.lr": 5e-4, "optimizer.betas[0]": 0.89}, "the start comes first"
    best = next(t.values for t in finished.trials if (t.arm, t.phase, t.horizon) == ("adamw", "reporting", 50))
    tuned = [t for t in finished.trials if (t.arm, t.phase, t.horizon) == ("adamw", "tuning", 100)]
    rate = float(best["optimizer.lr"])
    assert [float(t.values["optimizer.lr"]) for t in tuned] == pytest.approx([rate, rate / 2, rate * 2], rel=1e-3)
    assert {t.values["optimizer.betas[0]"] for t in tuned} == {best["optimizer.betas[0]"]}


def test_an_arm_without_a_search_is_reported_at_once() -> None:
    values = small()
    values["arms"]["adamw"]["search"] = {}
    current = expand(validate_spec(values, "small.yaml"), {})
    assert sum(trial.arm == "adamw" and trial.phase == "reporting" for trial in current.trials) == 9 + 2


def test_elements_of_lists_are_put_into_the_default_list() -> None:
    defaults = {"optimizer": {"betas": [0.9, 0.95], "lr": 1e-3}}
    written = value_overrides(
        {"optimizer.lr": 2e-3, "optimizer.betas[1]": 0.99, "schedule.warmup_share": 0.2}, lambda: defaults
    )
    assert written == ["optimizer.lr=0.002", "schedule.warmup_share=0.2", "optimizer.betas=[0.9,0.99]"]
    assert value_overrides({"optimizer.clip": False}, dict) == ["optimizer.clip=false"]


def test_an_ablation_replaces_tuned_values() -> None:
    values = small()
    grid = {"of": "sophiag", "values": {"optimizer.betas[1]": 0.8}, "model": "gpt2_nano", "horizons": [50], "seeds": 1}
    values["ablations"] = {"grid": grid}
    changed = validate_spec(values, "small.yaml")
    finished, _ = to_the_end(changed)
    (cell,) = [trial for trial in finished.trials if trial.arm == "grid"]
    arm = next(t for t in finished.trials if (t.arm, t.phase, t.horizon) == ("sophiag", "reporting", 50))
    assert cell.values == {**arm.values, "optimizer.betas[1]": 0.8}
    assert f"optimizer.betas=[{arm.values['optimizer.betas[0]']:g},0.8]" in cell.overrides
