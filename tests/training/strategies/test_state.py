"""Optimizer state other than tensors is saved and restored with its type, or refused before a run starts."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import training.optimizers as optimizers
from tests.training.reliability.test_resume import kill_before_recording
from tests.training.runs import curve, run, run_in_child, tiny
from tests.training.strategies import ranks
from tests.training.strategies.conftest import Launch
from tests.training.toys import Counting, Keeping
from training.compose import compose
from training.config import ConfigurationError
from training.optimizers import build_optimizers
from training.reliability.checkpoints import newest_valid
from training.strategies.base import Strategy
from training.strategies.state import load_state, refuse_unsavable_state, saved_state


class Stand(Strategy):
    """The attributes of a strategy that are read before `prepare`."""

    def __init__(self, *, sharded: bool = False, in_parts: bool = False) -> None:
        self.device = torch.device("cpu")
        self.shards_optimizer_state = sharded
        self.steps_in_parts = in_parts


Stand.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def building(make: Any, **options: Any) -> Any:
    def build(parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        return [Keeping([{"params": [p], "names": [name]} for name, p in parameters.items()], make, **options)]

    return build


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: {1, 2}, {}, r"Keeping: state\['kept'\] cannot be saved: it is of type set"),
        (lambda p: [1, [object()]], {}, r"state\['kept'\] cannot be saved: it is of type object"),
        (lambda p: {3: 1}, {}, r"state\[3\] cannot be saved: its key is of type int"),
        (lambda p: "text", {}, r"of type str"),
        (lambda p: object(), {}, r"of type object"),
        (lambda p: 1.0, {"key": 3}, r"state\[3\] cannot be saved: its key is of type int"),
        (lambda p: torch.ones(2, dtype=torch.complex64), {}, r"tensor of torch.complex64"),
        (lambda p: torch.ones(2, 2).to_sparse(), {}, r"of torch.sparse_coo"),
        (lambda p: 1.0, {"where": "optimizer"}, r"state\['kept'\] cannot be saved: it belongs to no parameter"),
        (
            lambda p: torch.ones(1),
            {"where": "group"},
            r"param_groups\[…\]\['kept'\] changes in a step and is of type Tensor",
        ),
        (lambda p: [1], {"where": "group"}, r"param_groups\[…\]\['kept'\] changes in a step and is of type list"),
    ],
)
def test_state_that_cannot_be_saved_is_refused_with_class_and_key(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        refuse_unsavable_state(building(make, **options), Stand())
    assert "\n" not in str(caught.value)


def test_state_of_another_shape_than_its_parameter_is_refused_for_shards() -> None:
    rows = building(lambda p: torch.ones(p.shape[0] + 1))
    refuse_unsavable_state(rows, Stand())
    with pytest.raises(ConfigurationError, match=r"state\['kept'\] cannot be saved under this strategy"):
        refuse_unsavable_state(rows, Stand(sharded=True))
    with pytest.raises(ConfigurationError, match=r"state\['kept'\] .* of type list; choose strategy=ddp"):
        refuse_unsavable_state(building(lambda p: [torch.ones_like(p)]), Stand(sharded=True))
    in_groups = building(lambda p: 1, where="group")
    refuse_unsavable_state(in_groups, Stand(sharded=True))
    with pytest.raises(ConfigurationError, match="strategy=deepspeed; choose ddp or fsdp"):
        refuse_unsavable_state(in_groups, Stand(sharded=True, in_parts=True))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophiag", "sophiah", "muon", "signum", "adahessian"])
def test_the_projects_own_optimizers_are_never_refused(optimizer: str) -> None:
    build = build_optimizers(compose([f"optimizer={optimizer}"]).optimizer, compile_step=False)
    for strategy in (Stand(), Stand(sharded=True, in_parts=True)):
        refuse_unsavable_state(build, strategy)


def test_an_optimizer_that_cannot_step_stand_ins_is_not_refused() -> None:
    def fails(parameter: Tensor) -> float:
        raise RuntimeError("expected a matrix of 64 rows")

    refuse_unsavable_state(building(fails), Stand())


def test_an_optimizer_for_parameters_that_the_stand_ins_lack_is_not_refused() -> None:
    """examples.suspects:SophiaOnKind with kind=attention was."""

    def build(parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        if "position_embedding.weight" not in parameters:
            raise ConfigurationError("optimizer.factory=mine:Mine: calling it fails: ValueError: no such parameter")
        return [torch.optim.SGD(parameters.values())]

    refuse_unsavable_state(build, Stand())


def test_state_that_appears_later_is_refused_when_it_is_saved() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Keeping([parameter], lambda p: {1})
    optimizer.step()
    with pytest.raises(ConfigurationError, match=r"Keeping: state\['kept'\]"):
        list(saved_state({"w": parameter}, [optimizer]))


class Saved:
    """A checkpoint in memory."""

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        saved = dict(saved_state(parameters, [optimizer]))
        self.tensors = {name: value.clone() for name, value in saved.items() if isinstance(value, Tensor)}
        self._numbers = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}

    def numbers(self) -> Mapping[str, Any]:
        return self._numbers

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()


KEPT = {
    "GG": [torch.arange(6.0).reshape(2, 3), []],
    "Q": (torch.arange(6.0).reshape(2, 3).t(), None, [torch.zeros(0), (1, True)]),
    "deep": {"list": {"x.y/=z": torch.tensor(2.0)}, "": []},
    "odd/key.%2F": 3,
    "list": [1.5],
    "halves": torch.ones(2, dtype=torch.bfloat16),
    "nothing": {},
}


def test_lists_tuples_and_dictionaries_of_state_survive_a_checkpoint_with_types_and_strides() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(2)), "w.b": torch.nn.Parameter(torch.ones(3))}
    optimizer, other = (Keeping([*parameters.values()], lambda p: 0) for _ in range(2))
    optimizer.state[parameters["w.b"]].update(KEPT)
    load_state(parameters, [other], Saved(parameters, optimizer))
    assert not other.state[parameters["w"]]
    state = other.state[parameters["w.b"]]
    assert repr(sorted(state.items(), key=lambda one: one[0])) == repr(sorted(KEPT.items(), key=lambda one: one[0]))
    assert state["Q"][0].stride() == (1, 3)


def use_counting() -> None:
    optimizers._adamw = lambda groups, lr, *_: Counting(groups, lr)  # type: ignore[assignment]


def use_counting_and_kill(step: int) -> None:
    use_counting()
    kill_before_recording(step)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_adamw", optimizers._adamw)
    use_counting()


def test_a_run_of_an_optimizer_that_counts_in_numbers_resumes_bit_for_bit(
    corpus: list[str], tmp_path: Path, counting: None
) -> None:
    overrides = ["optimizer=adamw", "optimizer.lr=0.05"]
    assert run(tiny(corpus, tmp_path, *overrides, name="undisturbed")) == 0
    killed = tiny(corpus, tmp_path, *overrides)
    assert run_in_child(killed, use_counting_and_kill, 16) == -signal.SIGKILL
    checkpoint, _ = newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    numbers = checkpoint.numbers()
    found = {key.removeprefix("optimizer.token_embedding.weight."): value for key, value in numbers.items()}
    assert (found["step"], found["limit"], found["warm"]) == (10, None, True)
    assert type(found["step"]) is int
    assert type(found["ema"]) is float
    assert numbers["group.token_embedding.weight.total"] > 0
    assert run(killed) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")


def test_a_run_whose_optimizer_cannot_be_saved_is_refused_before_anything_is_written(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "_adamw", lambda groups, lr, *_: Keeping(groups, lambda p: {1}))
    assert run(tiny(corpus, tmp_path, "optimizer=adamw")) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: Keeping: state['kept'] cannot be saved")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_optimizer_later_keeps_unsavable_state_ends_with_one_line(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(10**6))
    later = lambda p: set() if next(calls) > 100 else 0  # noqa: E731
    monkeypatch.setattr(optimizers, "_adamw", lambda groups, lr, *_: Keeping(groups, later))
    assert run(tiny(corpus, tmp_path, "optimizer=adamw")) == 1
    said = capfd.readouterr().err
    assert "could not be written: Keeping: state['kept'] cannot be saved" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ranks.LOOKED_AT["numbers_in_state"])
def test_numbers_in_the_state_survive_a_checkpoint_under_every_strategy(two_ranks: Launch, kind: str) -> None:
    seen = two_ranks.look("numbers_in_state", kind)
    assert seen["same_weights"]
    expected = two_ranks.look("numbers_in_state", "ddp")["numbers"]
    assert seen["numbers"] == expected
    assert {value for key, value in expected.items() if key.endswith(".step")} == {3}


@pytest.mark.parametrize("kind", ranks.LOOKED_AT["numbers_in_state"])
def test_gradients_are_clipped_under_every_strategy_for_optimizers_without_the_amp_protocol(
    two_ranks: Launch, kind: str
) -> None:
    moved = two_ranks.look("numbers_in_state", kind)["moved"]
    assert moved == pytest.approx(two_ranks.look("numbers_in_state", "ddp")["moved"], rel=1e-4)
    assert 0 < moved < 5e-5
