"""A challenger runs the protocol of a study against its recorded arms, and nothing of the arms runs again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.trial_tables import TRIALS_FILE
from scripts.study import main
from studies.challenge import Challenger, challenger_of, prepare, with_challenger
from studies.expansion import expand, expected_trials
from studies.spec import StudySpec, load_spec
from studies.store import Places, outcomes
from training.compose import compose
from training.config import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
FACTORY = "examples.my_optimizer:SignedAdam"
SPACE: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "my_space.yaml").read_text())
MINE = Challenger(FACTORY, str(ROOT / "examples" / "my_space.yaml"))


@pytest.fixture(scope="module")
def challenge() -> StudySpec:
    return load_spec("challenge")


def test_the_challenger_has_the_budget_of_each_arm_and_the_arms_keep_their_trials(challenge: StudySpec) -> None:
    challenged = with_challenger(challenge, MINE)
    assert challenged.name == "challenge_signedadam"
    cells = expected_trials(challenged)
    for model, horizon, phase in {cell[1:] for cell in cells if cell[0] == "lion"}:
        assert cells["signedadam", model, horizon, phase] == cells["lion", model, horizon, phase]
    arms = {trial.name for trial in expand(challenge, {}).trials}
    assert {one.name for one in expand(challenged, {}).trials if one.arm != "signedadam"} == arms


def test_the_protocol_tests_the_papers_claim_and_searches_the_same_keys_in_all_arms(challenge: StudySpec) -> None:
    half = challenge.models["gpt2_nano"].arm_horizons[0]
    assert half >= 1000
    assert 2 * half in challenge.models["gpt2_nano"].horizons
    (shared,) = {frozenset(key for key in arm.search if key != "optimizer.momentum") for arm in challenge.arms.values()}
    assert len(shared) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.global_batch_size": {"low": 8, "high": 32}}, "train.global_batch_size: it is part of the protocol"),
        ({"optimizer.factory": {"low": 1, "high": 2}}, "optimizer.factory: it is part of the protocol"),
        ({"optimizer.lr": None}, "optimizer.lr: missing; every arm searches it"),
        ({"schedule.warmup_share": None}, "schedule.warmup_share: missing; every arm searches it"),
        ({"optimizer.arguments.betas[0]": {"low": 0.1, "high": 0.9}}, "optimizer.arguments.betas is no list"),
        ({"optimizer.arguments.blond": {"low": 0.1, "high": 1.0}}, "blond"),
    ],
)
def test_a_search_file_that_changes_the_protocol_or_lacks_a_shared_key_is_refused(
    challenge: StudySpec, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    space = {key: value for key, value in {**SPACE, **changes}.items() if value is not None}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    with pytest.raises(ConfigurationError) as refused:
        with_challenger(challenge, Challenger(FACTORY, str(path)))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["challenger.factory=torch.optim:NAdam"], "challenger.search: missing"),
        (["challenger.search=space.yaml"], "challenger.factory: missing"),
        (["challenger.serch=space.yaml"], "did you mean search?"),
    ],
)
def test_what_the_command_line_lacks_is_named(given: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words.replace("?", r"\?")):
        challenger_of(given)


def test_a_name_that_an_arm_has_and_a_class_that_does_not_exist_are_refused(challenge: StudySpec) -> None:
    with pytest.raises(ConfigurationError, match="challenge has an arm of this name"):
        with_challenger(challenge, Challenger(FACTORY, MINE.search, name="adamw"))
    with pytest.raises(ConfigurationError, match=r"challenger.search=nowhere.yaml: no such file"):
        with_challenger(challenge, Challenger(FACTORY, "nowhere.yaml"))
    with pytest.raises(ConfigurationError, match="did you mean SignedAdam"):
        with_challenger(challenge, Challenger("examples.my_optimizer:SignedAdan", MINE.search))


def test_an_optimizer_without_weight_decay_leaves_its_range_out(challenge: StudySpec, tmp_path: Path) -> None:
    kept = {key: value for key, value in SPACE.items() if key != "optimizer.weight_decay" and "arguments" not in key}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(kept))
    fixed = {"arguments": "{betas: [0.8, 0.9]}"}
    challenger = Challenger("torch.optim:NAdam", str(tmp_path / "space.yaml"), "mine", fixed)
    (first, *_) = (one for one in expand(with_challenger(challenge, challenger), {}).trials if one.arm == "mine")
    assert {"optimizer.weight_decay=0", "optimizer.arguments={betas: [0.8, 0.9]}"} <= {*first.overrides}


def test_a_method_of_second_order_names_its_estimator_and_may_search_its_interval(
    challenge: StudySpec, tmp_path: Path
) -> None:
    kept = {key: value for key, value in SPACE.items() if "arguments" not in key}
    interval = {"optimizer.hessian_interval": {"values": [5, 10, 20]}}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**kept, "optimizer.arguments.gamma": {"low": 0.01, "high": 0.1}}))
    given = ["challenger.factory=sophia:SophiaG", f"challenger.search={path}", "challenger.name=mine"]
    second_order = challenger_of([*given, "challenger.estimator=gnb", "challenger.batch_fraction=0.25"])
    (first, *_) = (one for one in expand(with_challenger(challenge, second_order), {}).trials if one.arm == "mine")
    curvature = compose(first.overrides).optimizer.curvature
    assert curvature is not None
    assert (curvature.estimator, curvature.batch_fraction) == ("gnb", 0.25)

    path.write_text(yaml.safe_dump({**kept, **interval}))
    with pytest.raises(ConfigurationError, match=r"searches optimizer\.hessian_interval; keep one of the two"):
        with_challenger(challenge, challenger_of([*given, "challenger.hessian_interval=3"]))


def test_the_committed_records_are_all_those_of_the_frozen_file(challenge: StudySpec) -> None:
    records = ROOT / "results" / "challenge"
    recorded = outcomes(Places(records / "no runs", records))
    assert expand(challenge, recorded).finished, "the file or the code's trial names changed: run the baselines again"


def test_baselines_without_complete_records_are_refused(tmp_path: Path, challenge: StudySpec) -> None:
    values = {**challenge.model_dump(mode="json", exclude_defaults=True), "name": "other", "builds_on": []}
    other = StudySpec.model_validate(values)
    with pytest.raises(ConfigurationError, match=r"no records of other .* study=other` first"):
        prepare(other, with_challenger(other, MINE), Places.of("other_signedadam", tmp_path, tmp_path), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TRIALS_FILE).write_text("trial,arm,phase,model,horizon,seed,status\n")
    with pytest.raises(ConfigurationError, match=r"and \d+ more are not on record"):
        prepare(other, with_challenger(other, MINE), Places.of("other_signedadam", tmp_path, tmp_path), tmp_path)


def tiny(directory: Path) -> Path:
    """AdamW alone, at two horizons on two seeds; a run takes a second."""
    study = yaml.safe_load((ROOT / "configs" / "study" / "challenge.yaml").read_text())
    kept = [one for one in study["base"] if not one.startswith("eval.")]
    study |= {"name": "tiny", "builds_on": []}
    study["base"] = [*kept, "eval.tokens=1024", "eval.interval=4", f"data.directory={directory / 'tokens'}"]
    study["models"]["gpt2_nano"] |= {"horizons": [4], "arm_horizons": [], "tune_at": 4, "seeds": [1, 2]}
    study["tuning"] = {"seeds": [1000], "method": "halton", "trials": 1}
    study["arms"] = {"adamw": study["arms"]["adamw"]}
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_challenge_runs_the_challenger_alone_and_reports_it_against_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    where = [f"--work={tmp_path / 'runs'}", f"--records={tmp_path / 'results'}"]
    run = ["run", f"study={tiny(tmp_path)}"]
    assert main([*run, *where]) == 0
    challenger = [f"challenger.factory={FACTORY}", f"challenger.search={MINE.search}", "challenger.name=mine"]
    assert main([*run, *challenger, *where]) == 0
    said = capsys.readouterr().err
    assert "it does: the final loss is 0 nats from its record" in said
    ran = {path.parent.name.partition("-")[0] for path in tmp_path.glob("runs/tiny_mine/*/summary.json")}
    assert ran == {"mine"}, "the baseline's trials are on record"
    trials = pd.read_csv(tmp_path / "results" / "tiny_mine" / "trials.csv")
    assert dict(trials[trials.phase == "reporting"].arm.value_counts()) == {"adamw": 2, "mine": 2}
    report = json.loads((tmp_path / "results" / "tiny_mine" / "report.json").read_text())
    assert [one["arm"] for one in report["verdicts"]] == ["mine"]
    assert main([*run, *challenger, *where]) == 0
    assert "0 trials finished" in capsys.readouterr().err
