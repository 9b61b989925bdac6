"""Errors for wrong use of the library: what was given, what was expected, what to do."""

import math
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sophia import (
    AdaHessian,
    Bernoulli,
    Categorical,
    Gaussian,
    Lion,
    ReferenceSophiaG,
    Sophia,
    SophiaG,
    SophiaH,
    UnclippedAlarm,
    empirical_fisher,
    gauss_newton_bartlett,
    hutchinson,
    hutchinson_differences,
    kernels,
)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize("cls", [Sophia, SophiaG, SophiaH, Lion, AdaHessian])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "6e-4"),
        ("lr", True),
        ("lr", torch.ones(2)),
        ("betas", (1.0, 0.99)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("weight_decay", -0.1),
    ],
)
def test_a_wrong_hyperparameter_is_named_with_its_value(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*expected"):
        cls([parameter(2)], **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.0),
        ("gamma", -1.0),
        ("eps", 0.0),
        ("eps", 1e-46),  # float32 rounds it to 0
        ("eps", -1e-12),
        ("hessian_interval", 0),
        ("hessian_interval", 2.5),
        ("hessian_interval", True),
        ("clip", 1.0),
        ("hessian_power", 0.0),
        ("hessian_power", torch.ones(())),  # read in every step
        ("hessian_scale", -1.0),
    ],
)
def test_a_wrong_hyperparameter_of_sophia_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} = {re.escape(repr(value))}, expected"):
        Sophia([parameter(2)], **{name: value})


@pytest.mark.parametrize("form", [{"compile": False}, {"foreach": True}, {"compile": True}])
def test_integers_of_numpy_are_integers(form: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "_compiled", {})
    for cls in (SophiaG, AdaHessian):
        optimizer = cls([parameter(2)], hessian_interval=numpy.int64(5))
        assert type(optimizer.state_dict()["param_groups"][0]["hessian_interval"]) is int  # torch.load refuses numpy's
    hessians = []
    for n in (8, numpy.int64(8)):
        p = parameter(kernels.JOINED_BELOW)
        optimizer = SophiaG([p], **form)
        optimizer.update_hessian(num_predictions=n)
        hessians.append(optimizer.state[p]["hessian"])
    assert torch.equal(*hessians)
    with pytest.raises(ValueError, match="num_predictions"):
        SophiaG([parameter(2)]).update_hessian(num_predictions=numpy.int64(0))


def test_a_wrong_group_is_refused_and_leaves_the_optimizer_as_it_was() -> None:
    optimizer = SophiaG([parameter(2)])
    with pytest.raises(ValueError, match="gamma = -1"):
        optimizer.add_param_group({"params": [parameter(3)], "gamma": -1})
    with pytest.raises(ValueError, match="hessian_interval = 5 in one group and 10 in another"):
        optimizer.add_param_group({"params": [parameter(3)], "hessian_interval": 5})
    with pytest.raises(TypeError, match=r"dtype torch\.int64"):
        optimizer.add_param_group({"params": [torch.ones(3, dtype=torch.int64)]})
    assert len(optimizer.param_groups) == 1


def test_both_forms_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="foreach = True and compile = True"):
        SophiaG([parameter(2)], foreach=True, compile=True)


@pytest.mark.parametrize("cls", [SophiaG, Lion, AdaHessian])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused(cls: type, dtype: torch.dtype) -> None:
    p = torch.ones(2, dtype=dtype)
    with pytest.raises(TypeError, match=f"parameter 0 of shape \\(2,\\) has dtype {dtype}"):
        cls([p])


@pytest.mark.parametrize("cls", [SophiaG, Lion, AdaHessian])
def test_sparse_gradients_are_refused(cls: type) -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_coo, expected a dense one: build the embedding with"):
        cls(embedding.parameters()).step()


def test_a_forgotten_num_predictions_is_refused() -> None:
    with pytest.raises(
        TypeError, match="neither of num_predictions and estimates, expected exactly one: num_predictions=N"
    ):
        SophiaG([parameter(2)]).update_hessian()
    with pytest.raises(TypeError, match="both of num_predictions and estimates"):
        SophiaG([parameter(2)]).update_hessian(num_predictions=3, estimates=[torch.ones(2)])


@pytest.mark.parametrize("n", [0, -5, 2.0, True, "8", torch.ones(2), torch.tensor(True)])
def test_an_impossible_num_predictions_is_refused(n: Any) -> None:
    with pytest.raises(ValueError, match="num_predictions"):
        SophiaG([parameter(2)]).update_hessian(num_predictions=n)


def test_a_parameter_without_a_gradient_is_named() -> None:
    with_gradient, without = parameter(2), torch.nn.Parameter(torch.ones(3, 4))
    optimizer = SophiaG([with_gradient, without])
    with pytest.raises(RuntimeError, match=r"parameter 1 of shape \(3, 4\) has no gradient: run the backward"):
        optimizer.update_hessian(num_predictions=3)
    assert not optimizer.state[with_gradient]
    without.requires_grad_(False)
    optimizer.update_hessian(num_predictions=3)


def test_estimates_must_match_the_parameters() -> None:
    frozen = parameter(3)
    optimizer = SophiaH([parameter(2), frozen])
    with pytest.raises(ValueError, match="1 estimates for 2 parameters"):
        optimizer.update_hessian(estimates=[torch.ones(2)])
    with pytest.raises(ValueError, match=r"estimate for parameter 1 has shape \(2,\), expected \(3,\)"):
        optimizer.update_hessian(estimates=[torch.ones(2), torch.ones(2)])
    with pytest.raises(ValueError, match="estimate for parameter 0 of shape \\(2,\\) is None"):
        optimizer.update_hessian(estimates=[None, torch.ones(3)])
    with pytest.raises(ValueError, match=r"parameter 1 .* is on meta with layout .*expected a dense tensor on cpu"):
        optimizer.update_hessian(estimates=[torch.ones(2), torch.ones(3, device="meta")])
    with pytest.raises(ValueError, match=r"with layout torch\.sparse_coo, expected a dense tensor"):
        optimizer.update_hessian(estimates=[torch.ones(2), torch.ones(3).to_sparse()])
    frozen.requires_grad_(False)
    optimizer.update_hessian(estimates=iter([torch.ones(2), None]))
    assert not optimizer.state[frozen]


def test_curvature_for_an_optimizer_without_curvature_is_refused() -> None:
    with pytest.raises(RuntimeError, match="hessian_interval=None"):
        Sophia([parameter(2)], hessian_interval=None).update_hessian(num_predictions=1)
    with pytest.raises(ValueError, match="AdaHessian cannot step without curvature"):
        AdaHessian([parameter(2)], hessian_interval=None)  # type: ignore[arg-type]


def test_adahessian_refuses_squared_gradients() -> None:
    with pytest.raises(TypeError, match="expected estimates="):
        AdaHessian([parameter(2)]).update_hessian(num_predictions=3)


@pytest.mark.parametrize("cls", [SophiaG, AdaHessian])
def test_steps_without_curvature_warn_once_until_the_next_refresh(cls: type) -> None:
    def warned(optimizer: Any, steps: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                optimizer.step()
        assert all(one.filename == __file__ for one in caught)
        return [str(one.message).split(", expected")[0] for one in caught]

    p = parameter(2)
    optimizer = cls([p], hessian_interval=3)
    assert warned(optimizer, 8) == ["1 step without update_hessian()"]
    for _ in range(2):
        optimizer.update_hessian(estimates=[torch.ones(2)])
        assert warned(optimizer, 3) == []
        assert warned(optimizer, 9) == ["4 steps without update_hessian()"]
    resumed = cls([p], hessian_interval=3)
    resumed.load_state_dict(optimizer.state_dict())
    assert warned(resumed, 9) == ["4 steps without update_hessian()"]
    assert warned(cls([p], lr=0.0, hessian_interval=3), 1) == [], "torch.distributed.checkpoint initialises a state so"


def test_estimators_name_what_does_not_fit() -> None:
    logits, w = torch.zeros(4, 3, requires_grad=True), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"positions have shape \(3,\), expected \(4,\)"):
        gauss_newton_bartlett(lambda: logits, seed=0, step=1, positions=torch.arange(3))
    with pytest.raises(ValueError, match="nothing to predict"):
        gauss_newton_bartlett(lambda: logits, seed=0, step=1, positions=torch.full((4,), -1))
    with pytest.raises(ValueError, match="every target is ignore_index = -100"):
        empirical_fisher(lambda: logits, torch.full((4,), -100))
    with pytest.raises(ValueError, match=r"targets have shape \(3,\), expected \(4,\)"):
        empirical_fisher(lambda: logits, torch.zeros(3, dtype=torch.int64))
    for estimate in (hutchinson, hutchinson_differences):
        with pytest.raises(ValueError, match="none of the 1 parameters requires a gradient"):
            estimate(lambda: logits.sum(), [torch.ones(2)], seed=0, step=1)
    with pytest.raises(ValueError, match="1 different names for 2 parameters"):
        hutchinson(lambda: (w * logits.sum()).sum(), [w, logits], seed=0, step=1, names=["a", "a"])
    for total in (0, -5, math.nan):
        with pytest.raises(ValueError, match=f"total_predictions = {total}, expected a number > 0"):
            gauss_newton_bartlett(lambda: logits, seed=0, step=1, total_predictions=total)
        with pytest.raises(ValueError, match=f"total_predictions = {total}, expected a number > 0"):
            empirical_fisher(lambda: logits, torch.zeros(4, dtype=torch.int64), total_predictions=total)
    with pytest.raises(ValueError, match=r"relative_step = 0\.0, expected a number > 0"):
        hutchinson_differences(lambda: w.sum(), [w], seed=0, step=1, relative_step=0.0)
    for variance in (0, math.inf):
        with pytest.raises(ValueError, match=f"variance = {variance}"):
            Gaussian(variance=variance)
    with pytest.raises(ValueError, match="event_dims = 0"):
        Categorical(event_dims=0)
    assert Bernoulli().event_dims == 0


def test_a_part_of_an_estimate_without_its_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part would draw the labels of positions 0, 1, 2, …"""
    logits = torch.zeros(4, 3, requires_grad=True)

    def estimate(**arguments: Any) -> int:
        return gauss_newton_bartlett(lambda: logits, seed=0, step=1, **arguments)

    with pytest.raises(
        ValueError, match=r"positions = None with total_predictions = 8 and 4 predictions .*pass positions="
    ):
        estimate(total_predictions=8)
    assert logits.grad is None
    assert estimate(total_predictions=8, positions=torch.arange(4, 8)) == 4
    assert estimate(total_predictions=4) == 4
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"positions = None on 2 ranks, expected .*pass positions="):
        estimate()
    assert estimate(positions=torch.arange(4, 8)) == 4
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert estimate() == 4


SCALAR, LOGITS = torch.zeros((), requires_grad=True), torch.zeros(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ((LOGITS, None), "a tuple, expected a tensor: return its logits, as in lambda: model(x)[0]"),
        ([SCALAR, LOGITS], "a list, expected a tensor: return its logits, as in lambda: model(x)[1]"),
        (
            SimpleNamespace(logits=LOGITS),
            "a SimpleNamespace, expected a tensor: return its logits, as in lambda: model(x).logits",
        ),
        (
            {"h": LOGITS, "logits": LOGITS},
            "a dict, expected a tensor: return its logits, as in lambda: model(x)['logits']",
        ),
        (None, "a NoneType, expected a tensor: return logits as a tensor"),
    ],
)
def test_the_error_for_a_model_that_returns_more_than_logits_shows_how_to_extract_them(
    returned: object, said: str
) -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    for estimate in (
        lambda: gauss_newton_bartlett(lambda: returned, seed=0, step=1),
        lambda: empirical_fisher(lambda: returned, targets),
    ):
        with pytest.raises(TypeError, match=f"outputs_fn .*{re.escape(said)}$"):
            estimate()


@pytest.mark.parametrize("estimate", [hutchinson, hutchinson_differences])
@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda: (LOGITS, LOGITS.sum()), "a tuple, expected a tensor: return its loss, as in lambda: model(x)[1]"),
        (
            lambda: SimpleNamespace(loss=SCALAR),
            "a SimpleNamespace, expected a tensor: return its loss, as in lambda: model(x).loss",
        ),
        (lambda: 0.5, "a float, expected a tensor: return loss as a tensor"),
        (lambda: LOGITS * 2, "returned a tensor of shape (2, 3), expected a scalar: return its .mean()"),
        (SCALAR, "is a Tensor, expected a function: wrap it in lambda: ..."),
    ],
)
def test_a_loss_function_that_returns_no_loss_is_refused(estimate: Any, loss_fn: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"loss_fn .*{re.escape(said)}$"):
        estimate(loss_fn, [LOGITS], seed=0, step=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_central_differences_refuse_half_precision(dtype: torch.dtype) -> None:
    w = parameter(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"parameter 0 has dtype {dtype}, expected torch.float32"):
        hutchinson_differences(lambda: w.float().square().sum(), [w], seed=0, step=1)
    v = parameter(3)
    w.requires_grad_(False)  # as below adapters
    nothing, estimate = hutchinson_differences(lambda: (w.float() * v).square().sum(), [w, v], seed=0, step=1)
    assert (nothing, estimate.shape) == (None, v.shape)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="autocast is on for cpu, expected float32"),
    ):
        hutchinson_differences(lambda: v.square().sum(), [v], seed=0, step=1)


def test_alarm_and_reference_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="hessian_interval = 0"):
        UnclippedAlarm(0)
    with pytest.raises(ValueError, match="bs = 0"):
        ReferenceSophiaG([parameter(2)], bs=0)
    with pytest.raises(ValueError, match="rho = 'x', expected a number"):
        ReferenceSophiaG([parameter(2)], rho="x")
    with pytest.raises(ValueError, match=r"hessian_interval = None.*without curvature"):
        UnclippedAlarm(None)
    with pytest.raises(TypeError, match="takes no argument"):
        ReferenceSophiaG([parameter(2)]).update_hessian(num_predictions=4)
