"""`check_optimizer` passes what is sound and names the fault of what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.check_optimizer import main, table_of
from training import optimizer_check
from training.optimizer_check import Check, check, configured, curve, strategies_of

CURVATURE = ["optimizer.estimator=gnb", "optimizer.lr=6e-4"]
#: The broken classes of broken.py: overrides, the check that fails, and a word of what it says.
FAULTS = {
    "SignMomentum": (CURVATURE, "curvature is used", "momentum-sign"),
    "SquaredTrainingGradient": (CURVATURE, "curvature is kept", "square the training gradient"),
    "IgnoredSchedule": ([], "learning rate", "ignores a schedule"),
    "LostState": ([], "checkpoint", "resumed from a checkpoint"),
    "CoupledDecay": ([], "weight decay", "coupled"),
    "SharedNoise": ([], "randomness", "global generator"),
    "Waiting": ([], "host waits", "waits for the device"),
}


TWO_RANKS, SPEED = optimizer_check._on_two_ranks, optimizer_check._speed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes and a timing take most of the time; one test has them."""
    monkeypatch.setattr(optimizer_check, "_on_two_ranks", lambda overrides: curve(configured(overrides), 2))
    monkeypatch.setattr(optimizer_check, "_speed", lambda config: Check("speed", "note", "not measured"))


def failed(overrides: list[str], reference: str | None = None) -> dict[str, str]:
    return {one.name: one.detail for one in check(overrides, reference) if one.result == "fail"}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_of_a_broken_optimizer_is_named(name: str) -> None:
    overrides, where, said = FAULTS[name]
    factory = ["optimizer=external", f"optimizer.factory=tests.training.broken:{name}", "optimizer.lr=0.1"]
    found = failed([*factory, *overrides])
    assert where in found
    assert said in found[where]


@pytest.mark.parametrize("arm", ["lion", "sophiag", "muon", "adahessian"])
def test_the_projects_own_optimizers_pass(arm: str) -> None:
    found = {one.name: one for one in check([f"optimizer={arm}"], arm if arm != "adahessian" else None)}
    assert not [one for one in found.values() if one.result == "fail"]
    assert found["elementwise"].result == ("note" if arm == "muon" else "pass")


@pytest.mark.parametrize("arm", ["nadamw", "ademamix", "soap", "schedulefree"])
def test_the_packaged_arms_compose_and_learn(arm: str) -> None:
    losses = curve(configured([f"optimizer={arm}", "optimizer.lr=5e-3"]), 12)
    assert losses[-1] < losses[0] - 0.1


def test_the_challenges_example_passes_and_is_adamw_without_its_blend() -> None:
    mine = ["optimizer=external", "optimizer.factory=examples.my_optimizer:SignedAdam", "optimizer.lr=6e-4"]
    assert failed([*mine, "optimizer.arguments.blend=0.0"], reference="adamw") == {}
    assert failed([*mine, "optimizer.arguments.blend=1.0"], reference="adamw").keys() == {"like adamw"}


def test_the_table_of_all_optimizers_names_what_did_not_pass() -> None:
    checks = [
        Check("weight decay", "fail", "it is coupled"),
        Check("state", "pass", "8.0 bytes per parameter, float32 (m, v)"),
        Check("elementwise", "pass", "yes: strategies single, ddp, fsdp, deepspeed"),
        Check("speed", "note", "a step takes 3.75 times that of fused AdamW (2.1M parameters)"),
    ]
    _, _, row, _, remark = table_of({"mine": checks}).splitlines()
    assert row == "| mine | 1 of 2 | 8.0 | single, ddp, fsdp, deepspeed |"
    assert remark == "- mine, weight decay (fail): it is coupled"


@pytest.mark.parametrize(
    ("overrides", "elementwise", "strategies"),
    [
        (["optimizer=sophiag"], True, "single, ddp, fsdp, deepspeed"),
        (["optimizer=sophiah"], True, "single, ddp, deepspeed (ZeRO 1, 2)"),
        (["optimizer=sophiah", "optimizer.estimator=hutchinson_differences"], True, "single, ddp, fsdp, deepspeed"),
        (["optimizer=muon"], False, "single, ddp, fsdp"),
        (["optimizer=soap"], False, "single, ddp"),
        (["optimizer=external", "optimizer.factory=torch.optim:NAdam"], True, "single, ddp, fsdp, deepspeed"),
    ],
)
def test_the_strategies_are_those_that_a_configuration_may_choose(
    overrides: list[str], elementwise: bool, strategies: str
) -> None:
    assert strategies_of(configured(overrides), elementwise=elementwise) == strategies


def test_an_optimizer_that_counts_in_its_groups_is_not_offered_deepspeed() -> None:
    found = {one.name: one for one in check(["optimizer=schedulefree"])}
    assert found["elementwise"].detail == "yes: strategies single, ddp, fsdp"


def test_a_sound_class_from_outside_passes() -> None:
    factory = ["optimizer=external", "optimizer.factory=tests.training.broken:Descent", "optimizer.lr=0.1"]
    assert failed(factory) == {}


def test_an_optimizer_that_takes_predictions_alone_passes() -> None:
    """Its estimator needs no more."""
    factory = ["optimizer=external", "optimizer.factory=tests.training.broken:PredictionsAlone"]
    assert failed([*factory, *CURVATURE]) == {}


def test_a_wrong_copy_parts_from_the_reference_at_a_named_step_and_tensor() -> None:
    found = failed(["optimizer=signum", "optimizer.lr=6e-4", "optimizer.weight_decay=0.2"], reference="lion")
    assert found["like lion"].startswith("it parts from lion at step 2 in token_embedding.weight, by ")


def test_the_command_writes_the_table_as_json_and_fails_with_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # with two ranks and the timing
        patch.setattr(optimizer_check, "_on_two_ranks", TWO_RANKS)
        patch.setattr(optimizer_check, "_speed", SPEED)
        patch.setattr(optimizer_check, "ROUNDS", 2)
        assert main(["optimizer=adamw", "--json", str(tmp_path / "found.json")]) == 0
    found = {one["check"]: one for one in json.loads((tmp_path / "found.json").read_text())["checks"]}
    assert found["ranks"]["result"] == "pass"
    assert "times that of fused AdamW" in found["speed"]["found"]
    assert "two processes: losses equal" in capsys.readouterr().out
    assert main(["optimizer=adamw", "optimizer.lr=1e9"]) == 1
    assert main(["optimizer=nonsense"]) == 2
