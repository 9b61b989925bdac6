"""State: round trips, calling patterns of other libraries, and when an estimate is due."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sophia import AdaHessian, Lion, ReferenceSophiaG, Sophia, SophiaG, SophiaH

OPTIMIZERS: list[tuple[type, dict[str, Any]]] = [
    (SophiaG, {}),
    (SophiaH, {}),
    (Lion, {}),
    (AdaHessian, {}),
    (ReferenceSophiaG, {"estimator_clip": 0.5}),
]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).to(dtype)


def train(m: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for p in m.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if isinstance(optimizer, AdaHessian):
            if optimizer.hessian_due:
                optimizer.update_hessian(estimates=[p.grad for p in m.parameters()])
        elif isinstance(optimizer, ReferenceSophiaG):
            if optimizer.hessian_due:
                optimizer.update_hessian()
        elif isinstance(optimizer, Sophia) and optimizer.hessian_due:
            optimizer.update_hessian(num_predictions=5)
        optimizer.step()


def states_of(m: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for p in m.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("way", ["state_dict", "dcp", "deepcopy", "pickle"])
def test_training_continues_identically_after_a_state_round_trip(
    way: str, cls: type, options: dict[str, Any], dtype: torch.dtype
) -> None:
    a = model(dtype)
    first = cls(a.parameters(), **options)
    train(a, first, 1, 13)
    if way == "deepcopy":
        b, second = copy.deepcopy((a, first))
    elif way == "pickle":
        b, second = pickle.loads(pickle.dumps((a, first)))
    else:
        b = copy.deepcopy(a)
        second = cls(b.parameters(), **options)
        if way == "state_dict":
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        else:  # makes the missing state by a step with lr = 0 and zero gradients
            set_optimizer_state_dict(b, second, copy.deepcopy(get_optimizer_state_dict(a, first)))
    for state in states_of(b, second):
        assert all(value.dtype == torch.float32 for value in state.values())
    train(a, first, 14, 25)
    train(b, second, 14, 25)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    torch.testing.assert_close(states_of(a, first), states_of(b, second), rtol=0, atol=0)


def test_a_state_that_was_saved_in_half_precision_is_float32_again_once_it_is_loaded() -> None:
    a = model(torch.bfloat16)
    optimizer = SophiaG(a.parameters())
    train(a, optimizer, 1, 3)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"], state["hessian"] = state["exp_avg"].bfloat16(), state["hessian"].bfloat16()
    optimizer.load_state_dict(saved)
    for index, state in enumerate(states_of(a, optimizer)):
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert torch.equal(state["hessian"], saved["state"][index]["hessian"].float())


def test_an_optimizer_whose_state_was_loaded_elsewhere_counts_its_own_steps() -> None:
    a, b = model(), model()
    first, second = SophiaG(a.parameters()), SophiaG(b.parameters())
    train(a, first, 1, 3)
    second.load_state_dict(first.state_dict())
    train(b, second, 4, 5)
    assert {float(state["step"]) for state in states_of(a, first)} == {3.0}
    assert {float(state["step"]) for state in states_of(b, second)} == {5.0}


@pytest.mark.parametrize("form", [{"foreach": True}, {"compile": False}])
def test_a_copy_steps_in_the_form_of_the_original(form: dict[str, bool]) -> None:
    optimizer = SophiaG(model().parameters(), **form)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied._form == optimizer._form


def test_the_state_has_the_names_of_the_contract() -> None:
    m = model()
    optimizer = SophiaG(m.parameters())
    train(m, optimizer, 1, 1)
    for p in m.parameters():
        state = optimizer.state[p]
        assert set(state) == {"exp_avg", "hessian", "step"}
        assert state["exp_avg"].shape == state["hessian"].shape == p.shape
        assert state["step"].shape == ()
        assert state["step"].dtype == torch.float32


@given(k=st.integers(1, 12), steps=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_an_estimate_is_due_before_the_steps_with_t_minus_1_mod_k_equal_to_0(k: int, steps: int) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = SophiaG([p], hessian_interval=k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(1, steps + 1):
            assert optimizer.hessian_due == ((t - 1) % k == 0)
            p.grad = torch.ones(2)
            optimizer.step()
    restored = SophiaG([p], hessian_interval=k)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.hessian_due == (steps % k == 0)


def test_an_estimate_is_due_by_the_parameter_that_has_made_most_steps() -> None:
    first, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    for order in ([first, late], [late, first]):
        optimizer = SophiaG(order, hessian_interval=3)
        due = []
        for t in range(1, 8):
            due.append(optimizer.hessian_due)
            if due[-1]:
                optimizer.update_hessian(estimates=[torch.ones(2)] * 2)
            first.grad, late.grad = torch.ones(2), torch.ones(2) if t > 2 else None
            optimizer.step()
        assert due == [True, False, False, True, False, False, True]


def test_a_parameter_that_appears_again_begins_a_step_also_behind_a_new_one() -> None:
    new, again = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = SophiaG([new, again], gamma=1.0, hessian_interval=10)
    optimizer.update_hessian(estimates=[torch.full((2,), 1e6), torch.full((3,), 1e6)])
    again.grad = torch.ones(3)
    optimizer.step()
    assert (int(optimizer.unclipped_count), optimizer.numel) == (3, 3)
    new.grad = torch.ones(2)
    optimizer.step()
    assert (int(optimizer.unclipped_count), optimizer.numel) == (5, 5)


def test_steps_by_group_as_deepspeed_makes_them_equal_one_step() -> None:
    """A call of step per group, the other groups' lists empty: counts add up, and no counter runs ahead."""
    results = []
    for split in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(7))]
        optimizer = SophiaG([{"params": [p]} for p in params], hessian_interval=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(9):
                for p in params:
                    p.grad = torch.randn(p.shape)
                groups = [list(group["params"]) for group in optimizer.param_groups]
                due = optimizer.hessian_due
                for turn in range(2) if split else [None]:
                    for group, members, index in zip(optimizer.param_groups, groups, range(2), strict=True):
                        group["params"] = members if turn in (None, index) else []
                    if due:
                        optimizer.update_hessian(num_predictions=100)
                for turn in range(2) if split else [None]:
                    for group, members, index in zip(optimizer.param_groups, groups, range(2), strict=True):
                        group["params"] = members if turn in (None, index) else []
                    optimizer.step()
                for group, members in zip(optimizer.param_groups, groups, strict=True):
                    group["params"] = members
        assert optimizer.numel == 12
        results.append((params, int(optimizer.unclipped_count)))
    (a, *counts), (b, *split_counts) = results
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert counts == split_counts


def test_parameters_without_a_gradient_and_empty_shards_are_left_out() -> None:
    p, unused, empty = (torch.nn.Parameter(torch.ones(shape)) for shape in (3, 4, 0))
    p.grad, empty.grad = torch.ones(3), torch.ones(0)
    optimizer = SophiaG([p, unused, empty])
    optimizer.step()
    assert bool((p != 1).all())
    assert bool((unused == 1).all())
    assert not optimizer.state[unused]
    assert optimizer.numel == 3


def test_a_rank_whose_shards_are_all_empty_counts_zero_on_the_device_of_the_parameters() -> None:
    p = torch.nn.Parameter(torch.ones(0, 4, device="meta"))
    p.grad = torch.ones_like(p)
    optimizer = SophiaG([{"params": []}, {"params": [p]}])
    for _ in range(2):
        assert optimizer.unclipped_count.is_meta
        assert optimizer.unclipped_count.dtype == torch.int64
        optimizer.step()


def test_a_zero_gradient_only_decays() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.5)
    optimizer.update_hessian(num_predictions=10)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))
    assert optimizer.unclipped_count == 0


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    for optimizer in (SophiaG([p]), Lion([p])):

        def closure() -> Tensor:
            p.grad = None
            loss = p.square().sum()
            loss.backward()
            return loss

        before = p.detach().clone()
        assert optimizer.step(closure) == before.square().sum()
        assert not torch.equal(p, before)


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (SophiaG, ("lr", "betas", "gamma", "eps", "weight_decay", "clip")),
        (SophiaG, ("lr", "gamma", "eps", "hessian_power", "hessian_scale")),
        (SophiaH, ("lr", "betas", "gamma", "eps", "weight_decay", "clip")),
        (Lion, ("lr", "betas", "weight_decay")),
        (AdaHessian, ("lr", "betas", "eps", "weight_decay")),
    ],
)
def test_groups_have_their_own_hyperparameters(cls: type, keys: tuple[str, ...]) -> None:
    """Two groups of one optimizer train as two optimizers whose constructors were given the same."""
    given = {"lr": (0.1, 0.2), "betas": ((0.9, 0.8), (0.5, 0.6)), "gamma": (0.7, 5.0), "eps": (0.1, 0.9)}
    given |= {"weight_decay": (0.0, 0.5), "clip": (True, False)}
    given |= {"hessian_power": (1.0, 0.5), "hessian_scale": (1.0, 0.3)}
    hyper = [{key: given[key][number] for key in keys} for number in (0, 1)]
    a, b = model(), model()
    of_a, of_b = ([list(layer.parameters()) for layer in (m[0], m[2])] for m in (a, b))
    together = cls([{"params": params, **values} for params, values in zip(of_a, hyper, strict=True)])
    apart = [cls(params, **values) for params, values in zip(of_b, hyper, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for params, twins, optimizer in zip(of_a, of_b, apart, strict=True):
            for p, q in zip(params, twins, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
            if cls is not Lion:
                optimizer.update_hessian(estimates=[q.grad for q in twins])
            optimizer.step()
        if cls is not Lion:
            together.update_hessian(estimates=[p.grad for params in of_a for p in params])
        together.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_named_parameters_are_taken() -> None:
    m = model()
    optimizer = SophiaG(m.named_parameters())
    train(m, optimizer, 1, 3)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_what_a_pre_hook_makes_of_a_state_is_loaded_before_the_post_hooks_see_it() -> None:
    """torch's way to match parameters by name."""
    saved = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (2, 3)]
    optimizer = SophiaG(saved)
    optimizer.update_hessian(estimates=[torch.ones(2), torch.ones(3)])
    for p in saved:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved[1].grad = None
    optimizer.step()
    loading = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (3, 2)]
    other, seen = SophiaG(loading), []
    other.register_load_state_dict_pre_hook(
        lambda _, old: old | {"state": dict(enumerate([old["state"][1], old["state"][0]]))}
    )
    other.register_load_state_dict_post_hook(lambda one: seen.extend(one.state[p]["hessian"].dtype for p in loading))
    other.load_state_dict(optimizer.state_dict())
    assert [tuple(other.state[p]["hessian"].shape) for p in loading] == [(3,), (2,)]
    assert [float(other.state[p]["step"]) for p in loading] == [1, 2]
    assert seen == [torch.float32, torch.float32]


def test_a_count_that_was_saved_as_a_number_is_loaded() -> None:
    optimizer = SophiaG(model().parameters())
    train(model(), optimizer, 1, 0)
    state = {"step": 7, "exp_avg": torch.zeros(4, 3), "hessian": torch.ones(4, 3)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert torch.equal(next(iter(optimizer.state.values()))["step"], torch.tensor(7.0))


@pytest.mark.parametrize("cls", [SophiaG, AdaHessian])
def test_a_state_that_is_read_before_the_first_step_leaves_the_first_refresh_due(cls: type) -> None:
    """torch.distributed.checkpoint makes a step to have a state that it can read."""
    m = model()
    optimizer = cls(m.parameters(), hessian_interval=3)
    get_optimizer_state_dict(m, optimizer)
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    assert optimizer.hessian_due
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="expected one before the first step"):
        optimizer.step()
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_a_warm_up_from_zero_does_not_hide_that_the_curvature_is_missing() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizer = SophiaG([p])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 5)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1  # a gradient counts, unlike the step of torch.distributed.checkpoint
    schedule.step()
    with pytest.warns(RuntimeWarning, match="2 steps without"):
        optimizer.step()


def test_the_warning_says_what_becomes_of_each_method() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="divide by eps alone. Call update_hessian.. when hessian_due is true.$"):
        AdaHessian([p], lr=1e-9).step()
    reference = ReferenceSophiaG([p], hessian_interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            reference.step()
            if reference.hessian_due:
                reference.update_hessian()


def test_the_authors_refresh_is_not_due_after_a_first_step_that_overflowed() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ReferenceSophiaG([p], hessian_interval=1)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert not optimizer.hessian_due


def test_counts_are_on_the_cpu_whatever_the_default_device() -> None:
    """A count on an accelerator would make the host wait for it in every step."""
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with torch.device("meta"):
        optimizer = SophiaG([p])
        optimizer.update_hessian(num_predictions=2)
        optimizer.step()
        assert not optimizer.hessian_due
    assert optimizer.state[p]["step"].device == torch.device("cpu")


class Real(float):
    """A number that torch.load refuses, as NumPy's are."""


def test_numbers_of_other_libraries_are_saved_as_pythons(tmp_path: Path) -> None:
    optimizer = SophiaG(model().parameters(), lr=Real(1e-3), betas=(Real(0.5), 0.99), gamma=Real(0.05))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    group = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert (group["lr"], group["betas"], group["gamma"]) == (1e-3, (0.5, 0.99), 0.05)


def test_a_model_that_becomes_float64_keeps_its_digits() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = SophiaG([p], lr=1e-12, weight_decay=0.0, hessian_interval=None)
    p.grad = torch.ones(1)
    optimizer.step()
    p.data = torch.tensor([1 / 3], dtype=torch.float64)
    p.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert abs(p.item() - 1 / 3) < 1e-11
