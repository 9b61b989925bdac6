"""A study file is validated in one line before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from studies.expansion import expand, expected_trials
from studies.spec import STUDY_DIRECTORY, load_spec, validate_spec
from tests.studies.small import small
from training.compose import compose
from training.config import ConfigurationError


def change(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        values = values[parent]
    values[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("seeds", 3, "seeds=3: unknown key"),
        ("baseline", "adam", "baseline=adam: no such arm; choose one of adamw, sophiag"),
        ("models/gpt2_nano/seeds", [1, 1, 2], r"\[1\] is given more than once"),
        ("models/gpt2_nano/horizons", [50, 100, 100], r"\[100\] is given more than once"),
        ("models/gpt2_nano/tune_at", 60, r"tune_at=\[60\] is not among horizons"),
        ("models/gpt2_nano/seeds", [1, 100], r"\[100\] are also tuning seeds"),
        ("models/gpt2_micro/like", "gpt2_mini", "expected a model listed before it"),
        ("models/gpt2_micro/arms", ["sophiag"], "including the baseline"),
        (
            "models/gpt2_nano/arms",
            ["adamw"],
            "like=gpt2_nano: gpt2_nano has no search of sophiag to start from; add it to",
        ),
        ("tuning/seeds", [100, 101, 102, 103], "tuning: trials=6 is not a multiple of the 4 tuning seeds"),
        ("tuning/method", "halton", "needs low and high"),
        ("tuning/method", "grid", r"has 9 trials, more than tuning.trials=6"),
        (
            "tuning/retune/trials",
            2,
            r"retune.trials=2 is less than the 3 trials of one round of adamw: .* 2 neighbours of 1",
        ),
        ("tuning/finalists", {"settings": 2, "seeds": [100]}, r"finalists.seeds: \[100\] are also in seeds"),
        ("tuning/finalists", {"settings": 2, "seeds": [1, 101]}, r"gpt2_nano.seeds: \[1\] are also tuning seeds"),
        ("tuning/trials", 0, "tuning.trials=0: out of range; give a number above 0"),
        ("tuning/trials", 1.5, "tuning.trials=1.5: not a whole number"),
        ("arms/adamw/search/optimizer.lr", {"values": [1e-3], "widen": True}, "at least two values"),
        ("arms/adamw/search/optimizer.lr", {"values": [1e-3, 2e-3], "start": 3e-3}, "start=0.003 is not among"),
        ("arms/adamw/search/optimizer.lr", {"low": 1.0, "high": 0.5}, "low=1.0 is not below high=0.5"),
        ("arms/adamw/search/optimizer.lr", {"low": 1.0, "high": 2.0, "start": 3.0}, "start=3.0 is not between low=1.0"),
        ("arms/adamw/horizons", [50], r"arms.adamw.horizons=\[50\]: the baseline must run at all horizons"),
        ("arms/sophiag/horizons", [50, 265], r"no model of sophiag has horizon \[265\]; choose from \[50, 100\]"),
        ("arms/sophiag/horizons", [100], r"arms.sophiag.horizons=\[100\]: gpt2_micro has none of them"),
        ("ablations/sophiag_k1/of", "lion", "of=lion: no such arm"),
        (
            "ablations/same",
            {"of": "sophiag", "model": "gpt2_nano", "horizons": [50]},
            "neither overrides nor values",
        ),
        ("ablations/sophiag_k1/horizons", [25], r"sophiag has no runs of \[25\] steps"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_remedy(path: str, value: Any, words: str) -> None:
    values = small()
    change(values, path, value)
    with pytest.raises(ConfigurationError, match=words) as caught:
        validate_spec(values, "small.yaml")
    assert "\n" not in str(caught.value)


def test_a_coordinate_search_that_cannot_try_every_key_is_refused_unless_it_follows_at_once() -> None:
    values = small()
    values["tuning"]["trials"] = 4
    message = "tuning.trials=4 is less than the 5 trials of one round of adamw: the start and 4 neighbours of 2 keys"
    with pytest.raises(ConfigurationError, match=message):
        validate_spec(values, "small.yaml")
    values["tuning"]["follow"] = "at_once"
    validate_spec(values, "small.yaml")


def test_a_file_that_is_no_yaml_names_the_place(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ConfigurationError, match=r"broken\.yaml, line 1, column 8: "):
        load_spec(broken)


@pytest.mark.parametrize("study", sorted(path.stem for path in STUDY_DIRECTORY.glob("*.yaml")))
def test_every_study_in_the_repository_is_valid_and_so_is_each_first_trial(study: str) -> None:
    spec = load_spec(study)
    assert spec.name == study
    first = {(trial.arm, trial.model): trial for trial in expand(spec, {}).trials}
    assert first
    for trial in first.values():
        config = compose([*trial.overrides, f"name={trial.name}"])
        assert config.train.steps == trial.horizon
        assert config.model.name == trial.model


def test_every_searched_range_of_the_repositorys_studies_is_tried_on_both_halves() -> None:
    """Also the floor of the curvature: far above 1e-12, where it matters."""
    halves: dict[tuple[str, str, str], set[bool]] = {}
    for spec in map(load_spec, sorted(path.stem for path in STUDY_DIRECTORY.glob("*.yaml"))):
        if spec.tuning.method in ("random", "halton"):
            for trial in expand(spec, {}).trials:
                for key, value in trial.values.items():
                    middle = spec.arms[trial.arm].search[key].ladder.values[2]
                    halves.setdefault((spec.name, trial.arm, key), set()).add(value > middle)  # type: ignore[operator]
    assert halves
    assert [key for key, tried in halves.items() if tried != {False, True}] == []
    floors = [
        t.values.get("optimizer.eps", 0.0) for t in expand(load_spec("paper_125m"), {}).trials if "sophia" in t.arm
    ]
    assert sum(float(floor) >= 1e-8 for floor in floors) >= 2


@pytest.mark.parametrize(("study", "model"), [("paper_125m", "gpt2_small"), ("paper_355m", "gpt2_medium")])
def test_the_papers_studies_give_every_arm_the_same_searched_shared_keys_and_trials(study: str, model: str) -> None:
    spec = load_spec(study)
    shared = {
        "optimizer.lr",
        "optimizer.embedding_lr_ratio",
        "optimizer.betas[0]",
        "optimizer.betas[1]",
        "optimizer.weight_decay",
        "schedule.warmup_share",
    }
    own = {"optimizer.gamma", "optimizer.eps"}
    assert [{*arm.search} for arm in spec.arms.values()] == [shared, shared, shared | own, shared | own]
    counts = expected_trials(spec)
    assert len({counts[arm, model, 25000, "tuning"] for arm in spec.arms}) == 1
    final = {compose([*t.overrides, "name=x"]).schedule.final_ratio for t in expand(spec, {}).trials[::16]}
    assert final == {0.05}, "one schedule"


def test_an_arm_may_run_at_only_some_of_the_horizons() -> None:
    values = small()
    values["arms"]["sophiag"]["horizons"] = [50]
    spec = validate_spec(values, "small.yaml")
    assert spec.horizons("sophiag", "gpt2_nano") == (50,)
    assert spec.horizons("adamw", "gpt2_nano") == (25, 50, 100)
    trials = expected_trials(spec)
    assert trials == {
        key: count
        for key, count in expected_trials(validate_spec(small(), "")).items()
        if key[:3] != ("sophiag", "gpt2_nano", 100)
    }


def test_whole_floats_are_integers_where_the_key_is_an_integers() -> None:
    """Else a study that says 1e1 would name its trials otherwise than one that says 10."""
    whole, floats = small(), small()
    for values, interval, steps in ((whole, 10, 100), (floats, 1e1, 1e2)):
        change(values, "models/gpt2_nano/horizons", [25, 50, steps])
        change(values, "arms/sophiag/search/optimizer.hessian_interval", {"values": [5, interval], "start": interval})
        change(values, "ablations/sophiag_k1/values", {"optimizer.hessian_interval": interval})
    same = validate_spec(floats, "floats.yaml")
    assert repr(same) == repr(validate_spec(whole, "whole.yaml"))
    assert [t.name for t in expand(same, {}).trials] == [t.name for t in expand(validate_spec(whole, ""), {}).trials]


def test_a_study_survives_being_written_out(tmp_path: Path) -> None:
    spec = validate_spec(small(), "small.yaml")
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
    assert load_spec(path) == spec


def test_the_range_of_an_integers_key_has_integers() -> None:
    values = small()
    values["tuning"] |= {"method": "halton", "trials": 8}
    for arm in values["arms"].values():
        arm["search"] = {"optimizer.lr": {"low": 1e-4, "high": 1e-2}}
    values["arms"]["sophiag"]["search"] |= {"optimizer.hessian_interval": {"low": 1, "high": 100, "start": 10}}
    spec = validate_spec(values, "small.yaml")
    drawn = [one.values for one in expand(spec, {}).trials if one.arm == "sophiag"]
    intervals = [one["optimizer.hessian_interval"] for one in drawn]
    assert intervals[0] == 10
    assert len({*intervals}) > 4
    assert all(type(one) is int and 1 <= one <= 100 for one in intervals)
    assert all(type(one["optimizer.lr"]) is float for one in drawn)


def test_an_element_that_a_list_lacks_is_named() -> None:
    values = small()
    values["arms"]["adamw"]["search"] = {"optimizer.betas[2]": {"values": [0.8, 0.9]}}
    with pytest.raises(ConfigurationError, match=r"betas\[2\]: optimizer.betas has 2 elements, numbered from 0"):
        expand(validate_spec(values, "small.yaml"), {})
