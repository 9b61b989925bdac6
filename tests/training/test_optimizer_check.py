"""`check_optimizer` passes what is sound and names the fault of what is not."""

from __future__ import annotations

import json
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import parameter_kind
from scripts.check_optimizer import main, table_of
from tests.training.broken import Descent
from training import optimizer_check
from training.config import ConfigurationError
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


class TrustRatio(Descent):
    """A trust ratio, as in LAMB: it does not change if the coordinates of a tensor change places."""

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        return p.grad * (p.norm() / p.grad.norm())


class OwnClip(Descent):
    """It clips the norm of all gradients, of which a rank of fsdp or deepspeed has a part."""

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        grads = [one.grad for every in self.param_groups for one in every["params"]]
        return p.grad / torch.stack([grad.norm() for grad in grads]).norm()  # type: ignore[operator]


class SmallOwnClip(OwnClip):
    """Its steps are far below its rate, as the first ones of Prodigy."""

    def rate(self, group: dict[str, Any]) -> float:
        return 1e-4 * float(group["lr"])


class CenteredEmbeddings(Descent):
    """It takes the mean of each column from the gradients of embeddings alone."""

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        (name,) = (n for n, one in zip(group["names"], group["params"], strict=True) if one is p)
        return p.grad - p.grad.mean(0) if parameter_kind(name) == "embedding" else p.grad


class Lookahead(Descent):
    """The weights go back to an average of their own every k steps (Zhang et al. 2019), counted beside the state."""

    count = 0

    def __init__(self, params: Any, k: int = 10, **others: Any) -> None:
        super().__init__(params, **others)
        self.k = k

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.clone())
            if self.count % self.k == 0:
                p.copy_(slow.lerp_(p, 0.5))


class NeedsClosure(Descent):
    """Its rate depends on the loss."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        super().step()
        return loss


class Failing(Descent):
    """It cannot make a step, or cannot be built on one rank."""

    def __init__(self, params: Any, rank: int | None = None, **others: Any) -> None:
        super().__init__(params, **others)
        if rank is not None and rank == torch.distributed.get_rank():
            raise KeyError("no such block")

    def step(self, closure: Any = None) -> None:
        raise KeyError("no such block")


class Queue(Descent):
    """Its state is of a type that a checkpoint cannot store."""

    def buffer(self, p: Tensor) -> Tensor:
        queue: deque[Tensor] = self.state[p].setdefault("momenta", deque([torch.zeros_like(p)]))
        return queue[0]


class CommonCount(Descent):
    """Its steps depend on a count of the class, which all optimizers of a process share."""

    count = 0

    def rate(self, group: dict[str, Any]) -> float:
        CommonCount.count += 1
        return group["lr"] / CommonCount.count  # type: ignore[no-any-return]


class CautiousDecay(Descent):
    """Decoupled decay where the step shrinks the weight too (Chen et al. 2025)."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        buffer = self.buffer(p).mul_(group["momentum"]).add_(grad)
        shrinks = (buffer * p > 0).float()
        p.sub_(group["lr"] * (group["weight_decay"] * shrinks * p + buffer))


def mine(kind: type, *overrides: str) -> list[str]:
    """Return the overrides that choose a class of this file."""
    return ["optimizer=external", f"optimizer.factory={__name__}:{kind.__qualname__}", "optimizer.lr=0.1", *overrides]


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
    assert found["host waits"].result == "pass"


@pytest.mark.parametrize("arm", ["nadamw", "ademamix", "soap", "schedulefree"])
def test_the_packaged_arms_compose_and_learn(arm: str) -> None:
    losses = curve(configured([f"optimizer={arm}", "optimizer.lr=5e-3"]), 12)
    assert losses[-1] < losses[0] - 0.1


def test_the_challenges_example_passes_and_is_adamw_without_its_blend() -> None:
    mine = ["optimizer=external", "optimizer.factory=examples.my_optimizer:SignedAdam", "optimizer.lr=6e-4"]
    assert failed([*mine, "optimizer.arguments.blend=0.0"], reference="adamw") == {}
    assert failed([*mine, "optimizer.arguments.blend=1.0"], reference="adamw").keys() == {"like adamw"}


@pytest.mark.parametrize("kind", [TrustRatio, OwnClip, SmallOwnClip, CenteredEmbeddings])
def test_a_step_that_depends_on_other_coordinates_is_not_elementwise(kind: type) -> None:
    found = optimizer_check._elementwise(configured(mine(kind)))
    assert found.result == "note"
    assert found.detail.startswith("no, ")
    assert found.detail.endswith(": strategies single, ddp")


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.factory=examples.suspects:SophiaWithoutStaleRows", *CURVATURE],  # norms of rows
        ["optimizer.factory=pytorch_optimizer:Prodigy", "optimizer.lr=1"],  # a rate from sums over all parameters
    ],
)
def test_known_rules_of_several_coordinates_are_not_elementwise(overrides: list[str]) -> None:
    found = optimizer_check._elementwise(configured(["optimizer=external", *overrides]))
    assert found.detail.startswith("no, ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw", "optimizer.embedding_lr_ratio=2"],
        ["optimizer=lion"],
        ["optimizer=sophiag"],
        ["optimizer=sophiah", "optimizer.estimator=hutchinson_differences"],
        ["optimizer=signum"],
        ["optimizer=adahessian", "optimizer.estimator=hutchinson_differences"],
        ["optimizer=nadamw"],
        mine(Descent),
        mine(Lookahead),
        mine(Descent, "optimizer.groups=flat"),
    ],
    ids=lambda overrides: overrides[1] if "external" in overrides[0] else overrides[0],
)
def test_steps_of_single_coordinates_are_elementwise(overrides: list[str]) -> None:
    found = optimizer_check._elementwise(configured(overrides))
    assert found == Check("elementwise", "pass", "yes: strategies single, ddp, fsdp, deepspeed")


def test_a_step_of_matrices_is_not_elementwise() -> None:
    found = optimizer_check._elementwise(configured(["optimizer=muon"]))
    assert found.detail == "no, it needs whole matrices: strategies single, ddp, fsdp"


def test_state_made_at_construction_is_not_offered_deepspeed() -> None:
    """Whose partitions come after it."""
    adagrad = ["optimizer=external", "optimizer.factory=torch.optim:Adagrad"]
    assert optimizer_check._elementwise(configured(adagrad)).detail == "yes: strategies single, ddp, fsdp"


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 10])
def test_a_count_beside_the_state_is_lost(k: int) -> None:
    found = optimizer_check._state_dict(configured(mine(Lookahead, f"optimizer.arguments.k={k}")))
    assert found.result == "fail"
    assert "Lookahead.count" in found.detail


def test_a_run_with_a_count_beside_the_state_resumes_with_other_weights() -> None:
    assert optimizer_check._checkpoint(configured(mine(Lookahead))).result == "fail"


def test_a_count_beside_the_state_that_has_not_changed_a_step_yet_is_named() -> None:
    found = optimizer_check._state_dict(configured(mine(Lookahead, "optimizer.arguments.k=1000")))
    assert found.result == "note"
    assert "Lookahead.count" in found.detail


@pytest.mark.parametrize("arm", ["adamw", "signum", "sophiag", "adahessian"])
def test_what_torch_and_our_optimizers_count_beside_their_state_is_no_loss(arm: str) -> None:
    interval = ["optimizer.hessian_interval=100"] if arm == "sophiag" else []
    assert optimizer_check._state_dict(configured([f"optimizer={arm}", *interval])).result == "pass"


def test_an_optimizer_that_raises_fails_every_check_with_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*mine(Failing), "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert found.pop()["check"] == "speed"
    assert [one["found"] for one in found] == ["KeyError: 'no such block'"] * 12
    assert "Traceback" not in "".join(capsys.readouterr())


def test_a_step_that_needs_a_closure_is_told_so() -> None:
    found = failed(mine(NeedsClosure))
    assert found["loss falls"] == found["state"]
    assert found["state"].startswith("its step needs a closure")


def test_what_one_of_two_ranks_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other does not wait for it."""
    fork = partial(torch.multiprocessing.start_processes, start_method="fork")  # to import nothing twice
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork)
    with pytest.raises(ConfigurationError, match=r"^optimizer.factory=.*: KeyError: 'no such block'"):
        TWO_RANKS(mine(Failing, "optimizer.arguments.rank=1"))


def test_state_that_cannot_be_saved_fails_the_checkpoint_and_not_the_rest(tmp_path: Path) -> None:
    assert main([*mine(Queue), "--json", str(tmp_path / "found.json")]) == 1
    found = {one["check"]: one for one in json.loads((tmp_path / "found.json").read_text())["checks"]}
    assert found["checkpoint"]["result"] == "fail"
    assert found["checkpoint"]["found"].startswith("Queue: state['momenta'] cannot be saved: it is of type deque")
    assert found["state_dict"]["result"] == "pass"


def test_a_count_of_the_class_is_not_called_random() -> None:
    found = optimizer_check._randomness(configured(mine(CommonCount)))
    assert found.result == "fail"
    assert "outside of its state" in found.detail
    assert "generator" not in found.detail


def test_decay_of_some_coordinates_is_decoupled() -> None:
    found = optimizer_check._weight_decay(configured(mine(CautiousDecay)))
    assert found.result == "pass"
    assert found.detail.startswith("decoupled and masked")


def test_the_table_names_no_strategies_of_an_optimizer_that_raises() -> None:
    checks = [Check("state", "fail", "KeyError: 1"), Check("elementwise", "fail", "KeyError: 1")]
    assert table_of({"mine": checks}).splitlines()[2] == "| mine | 0 of 1 |  |  |"


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
