"""All forms of a step agree, small tensors are joined, a schedule does not recompile, and a missing compiler warns once."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from sophia import AdaHessian, Lion, ReferenceSophiaG, Sophia, SophiaG, adahessian, kernels
from sophia.kernels import updates
from sophia.sophia import sophia_update

SHAPES = [(70, 100), (7,), (3, 5), (2, 3, 4), (1,), (), (0, 3)]
CASES: list[tuple[type, dict[str, Any]]] = [
    (SophiaG, {}),
    (SophiaG, {"clip": False, "eps": 1e-3}),
    (SophiaG, {"hessian_power": 0.8, "hessian_scale": 0.3}),
    (Lion, {}),
    (AdaHessian, {"hessian_interval": 3}),
]


def run(
    cls: type,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    amp: bool = False,
    steps: int = 7,
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES),
    lr_dtype: torch.dtype | None = None,
    peak_lr: float = 3e-3,
) -> tuple[list[Tensor], list[dict[str, Tensor]], int]:
    """Parameters, states and the last unclipped count of a run with a schedule, refreshes and, with amp, a held
    step. The rate is a float, or a tensor of `lr_dtype`."""
    generator = torch.Generator().manual_seed(0)

    def random_like(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator).to(dtype)

    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = cls(params, lr=3e-3, **options)
    for t in range(steps):
        lr = peak_lr * (1 - t / 10)
        optimizer.param_groups[0]["lr"] = lr if lr_dtype is None else torch.tensor(lr, dtype=lr_dtype)
        if amp:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.7), torch.tensor(float(t == 4))
        if not isinstance(optimizer, Lion) and t % 3 == 0:
            for p in params:
                p.grad = random_like(p) * 0.1
            if isinstance(optimizer, AdaHessian):
                optimizer.update_hessian(estimates=[p.grad for p in params])
            else:
                optimizer.update_hessian(num_predictions=100)
        for p in params:
            p.grad = random_like(p)
        optimizer.step()
    count = int(optimizer.unclipped_count) if isinstance(optimizer, Sophia) else 0
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params], count


def assert_identical(a: tuple, b: tuple, rtol: float = 0.0) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(a[1], b[1], rtol=rtol, atol=rtol)
    assert a[2] == b[2]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_eager_and_foreach_forms_are_the_same_to_the_last_bit(
    cls: type, options: dict[str, Any], dtype: torch.dtype, amp: bool
) -> None:
    eager = run(cls, {**options, "foreach": False, "compile": False}, dtype, amp)
    assert_identical(eager, run(cls, {**options, "foreach": True}, dtype, amp))


@pytest.mark.parametrize("form", [{"compile": False, "foreach": False}, {"foreach": True}])
def test_parameters_of_several_dtypes_step_as_those_of_each_alone(form: dict[str, bool]) -> None:
    def weights() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        params = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16, torch.float32):
            params.append(torch.nn.Parameter(torch.randn(50, generator=generator).to(dtype)))
            params[-1].grad = torch.randn(50, generator=generator).to(dtype)
        return params

    together, apart = weights(), weights()
    optimizers = [SophiaG(together, lr=0.1, **form), *(SophiaG([p], lr=0.1, **form) for p in apart)]
    for optimizer in optimizers:
        optimizer.update_hessian(num_predictions=100)
        for _ in range(3):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))
    whole, *parts = (int(optimizer.unclipped_count) for optimizer in optimizers)
    assert whole == sum(parts) > max(parts)


@pytest.mark.slow
def test_compiled_form_is_the_same_to_the_last_bit_and_a_schedule_does_not_recompile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "JOINED_BELOW", 20)  # three tensors alone, the others joined
    eager = run(SophiaG, {"compile": False}, amp=True)
    torch._dynamo.utils.counters.clear()
    run(SophiaG, {"compile": True}, amp=True, steps=1)
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert first > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a compiler that fails would fall back to the eager form
        compiled = run(SophiaG, {"compile": True}, amp=True)
        small = run(SophiaG, {"compile": True}, amp=True, shapes=[(40, 2), (11, 11)])  # another model, same kernels
    assert_identical(eager, compiled)
    assert_identical(run(SophiaG, {"compile": False}, amp=True, shapes=[(40, 2), (11, 11)]), small)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first

    torch._dynamo.reset()  # as a second run in the same process does
    kernels.reset()
    torch._dynamo.utils.counters.clear()
    for shapes in ([(40, 2), (11, 11)], [(40, 2), (40, 2)], [(50, 2), (40, 2), (40, 2)]):
        run(SophiaG, {"compile": True}, amp=True, shapes=shapes, steps=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SophiaG, Lion])
def test_a_rate_in_a_float32_tensor_gives_the_same_numbers_in_every_form(
    cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "JOINED_BELOW", 20)
    eager, foreach, compiled = (
        run(cls, {**form, "weight_decay": 0.9}, steps=9, lr_dtype=torch.float32, peak_lr=0.7)
        for form in ({"compile": False, "foreach": False}, {"foreach": True}, {"compile": True})
    )
    assert_identical(eager, foreach)
    assert_identical(eager, compiled)


def test_a_row_without_a_common_layout_is_cut_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def rule(a: Tensor, b: Tensor) -> None:
        sizes.append(a.numel())
        a.add_(b)

    rule.updated = (0,)  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels, "LONGEST_ROW", 50)
    a, b = torch.zeros(12, 20), torch.ones(20, 12).t()
    kernels.apply(rule, [[a], [b]], [], kernels.Form(False, False))
    assert sum(sizes) == 240
    assert max(sizes) <= 50
    assert bool((a == 1).all())


@pytest.mark.slow
def test_the_unclipped_count_comes_out_of_the_pass_that_updates_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 1)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.9, 0.05, 1e-12, 0.1)]
    with torch.no_grad():
        _, (code,) = run_and_get_code(kernels._compile, sophia_update, [torch.rand(1)] * 4, scalars)
    assert code.count("for(int64_t x0") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SophiaG, AdaHessian])
def test_under_torch_compile_a_step_and_a_refresh_count_and_warn_as_without(cls: type) -> None:
    def train(compiled: Callable[[Callable], Callable], last_refresh: int) -> tuple[list[object], list[str]]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (3,))]
        optimizer = cls(params, lr=0.1, hessian_interval=2, compile=False)
        step, update_hessian, seen = compiled(optimizer.step), compiled(optimizer.update_hessian), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(1, 8):
                if optimizer.hessian_due and t <= last_refresh:
                    update_hessian(estimates=[100 * torch.rand(p.shape, generator=generator) for p in params])
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                step()
                seen += [optimizer.numel, int(optimizer.unclipped_count) if isinstance(optimizer, Sophia) else 0]
        seen += [p.tolist() for p in params]
        return seen, [str(one.message) for one in caught if "without update_hessian" in str(one.message)]

    for last_refresh in (7, 0):
        expected = train(lambda function: function, last_refresh)
        assert len(expected[1]) == (last_refresh == 0)
        assert train(partial(torch.compile, backend="eager"), last_refresh) == expected


def test_a_failing_compiler_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(kernels, "_compile", broken)
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(kernels, "_compiler_failed", False)
    monkeypatch.setattr(kernels, "JOINED_BELOW", 20)
    with pytest.warns(RuntimeWarning, match=r"several times slower.*no C\+\+ compiler found.*compile=False") as caught:
        fallen_back = run(SophiaG, {"compile": True})
    assert len(caught) == 1
    assert_identical(run(SophiaG, {"compile": False}), fallen_back)
    monkeypatch.setattr(kernels, "_compiler_failed", False)
    tensors = [torch.zeros(100), torch.zeros(200)]
    with pytest.warns(RuntimeWarning):  # the call that finds out counts as any other
        counts = kernels.apply(updates(0)(lambda t: torch.tensor(t.numel())), [tensors], [], kernels.Form(False, True))
    assert sum(map(int, counts)) == 300


@given(
    sizes=st.lists(st.integers(20, 3000), min_size=1, max_size=20),
    longest=st.integers(100, 4000),
)
@settings(deadline=None)
def test_rows_are_cut_into_a_multiple_of_what_a_call_takes(sizes: list[int], longest: int) -> None:
    rows = [[torch.zeros(size), torch.zeros(size)] for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LONGEST_ROW", longest)
        cut = kernels._cut(rows)
    assert len(cut) % kernels.ROWS == 0
    assert all(1 < row[0].numel() <= longest for row in cut)
    for row in cut:
        for t in row:
            t.add_(1)
    assert all(bool((t == 1).all()) for row in rows for t in row)


def test_small_tensors_are_joined_into_one_call_and_large_ones_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def rule(a: Tensor, b: Tensor) -> None:
        calls.append(a.numel())
        a.add_(b)

    rule.updated = (0,)  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels, "JOINED_BELOW", 10)
    monkeypatch.setattr(kernels, "EAGER_PIECE", 64)
    sizes = [3, 20, 4, 100, 0, 1]
    tensors = [torch.zeros(size) for size in sizes]
    kernels.apply(rule, [tensors, [torch.full((size,), float(size)) for size in sizes]], [], kernels.Form(False, False))
    assert sorted(calls) == [8, 20, 36, 64]
    assert all(bool((t == size).all()) for t, size in zip(tensors, sizes, strict=True))


def test_the_temporaries_of_the_foreach_form_are_those_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []

    def rule(a: kernels.TensorList, b: kernels.TensorList) -> None:
        sizes.append([t.numel() for t in a.tensors])
        a.add_(b)

    rule.updated = (0,)  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels, "FOREACH_PART", 10)
    tensors = [torch.zeros(size) for size in (3, 7, 1, 0, 40, 9)]
    kernels.apply(rule, [tensors, [torch.ones_like(t) for t in tensors]], [], kernels.Form(foreach=True))
    assert sizes == [[3, 7], [1], [40], [9]]
    assert all(bool((t == 1).all()) for t in tensors)


def test_parameters_of_adahessian_that_made_the_same_steps_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = kernels.apply
    monkeypatch.setattr(
        adahessian, "apply", lambda rule, tensors, *rest: calls.append(len(tensors[0])) or apply(rule, tensors, *rest)
    )
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = AdaHessian(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(3)
    for late in (params[1:], params):
        optimizer.update_hessian(estimates=[torch.ones(3)] * 5)
        params[0].grad = None if late is not params else torch.ones(3)
        optimizer.step()
    assert calls == [5, 4, 5, 1, 4]
    for p in params[:2]:  # the first has made one step, the second two
        alone = torch.nn.Parameter(torch.ones(3))
        other = AdaHessian([alone], lr=0.1)
        for step in range(2):
            other.update_hessian(estimates=[torch.ones(3)])
            alone.grad = torch.ones(3) if step or p is params[1] else None
            other.step()
        assert torch.equal(p, alone)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a compiler that fails would fall back to the eager form
@pytest.mark.parametrize("form", [{"compile": False, "foreach": False}, {"foreach": True}, {"compile": True}])
@pytest.mark.parametrize(
    "cls",
    [SophiaG, partial(SophiaG, clip=False), partial(ReferenceSophiaG, rho=0.05, bs=1)],
    ids=["", "no clip", "ref"],
)
def test_the_unclipped_count_is_that_of_all_rows_and_all_pieces(
    cls: Callable[..., Sophia], form: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors joined into a row of several pieces, large ones in pieces, more rows than a compiled call takes,
    one without a common layout."""
    monkeypatch.setattr(kernels, "JOINED_BELOW", 60)
    monkeypatch.setattr(kernels, "EAGER_PIECE", 32)
    monkeypatch.setattr(kernels, "LONGEST_ROW", 100)
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    generator = torch.Generator().manual_seed(0)
    for shapes in ([50, 40, 3, 70, 300, 1000, (15, 20)], [10, 45]):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = cls(params, weight_decay=0.0, **form)
        for p in params:
            p.grad = torch.randn(p.shape[::-1], generator=generator).permute(*range(p.dim())[::-1])
            curvature = torch.rand(p.shape, generator=generator)
            optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "hessian": curvature}
        optimizer.step()
        m, h = (torch.cat([optimizer.state[p][key].flatten() for p in params]) for key in ("exp_avg", "hessian"))
        expected = int((m.abs() < 0.05 * h).sum())
        assert 0 < expected < optimizer.numel
        assert int(optimizer.unclipped_count) == expected


@pytest.mark.parametrize("form", [{"compile": False, "foreach": False}, {"foreach": True}])
def test_a_coordinate_whose_ratio_is_exactly_1_counts_as_clipped(form: dict[str, bool]) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([p], gamma=0.5, betas=(0.0, 0.99), weight_decay=0.0, **form)
    p.grad = torch.ones(3)
    hessian = torch.tensor([1.99, 2.0, 2.01])  # γh around |m| = 1
    optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros(3), "hessian": hessian}
    optimizer.step()
    assert int(optimizer.unclipped_count) == 1


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:.*without update_hessian")
@pytest.mark.parametrize("form", [kernels.Form(False, False), kernels.Form(False, True)])
def test_counts_add_up_beyond_the_range_of_int32(form: kernels.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's count is an int32, and no row is longer than that holds."""
    assert torch.iinfo(torch.int32).max >= kernels.LONGEST_ROW
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    counted = torch.tensor(kernels.LONGEST_ROW, dtype=torch.int32)
    monkeypatch.setitem(Sophia._rules, True, updates(0, 2)(lambda *_: counted))
    params = [torch.nn.Parameter(torch.zeros(kernels.JOINED_BELOW)) for _ in range(4)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = SophiaG(params, foreach=form.foreach, compile=form.compile)
    optimizer.step()
    rows = kernels.ROWS if form.compile else 4
    assert int(optimizer.unclipped_count) == rows * kernels.LONGEST_ROW


def test_a_list_of_tensors_is_summed_in_int64() -> None:
    tensors = kernels.TensorList([torch.tensor([kernels.LONGEST_ROW]) for _ in range(4)])
    assert int(tensors.sum(dtype=torch.int32)) == 4 * kernels.LONGEST_ROW


def test_layout_of_the_parameters_does_not_matter() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    results = []
    for layout in ("contiguous", "channels_last", "mixed", "holes"):
        if layout == "holes":
            p = torch.nn.Parameter(torch.empty(8, 4, 3, 6)[..., ::2].copy_(weight))
        else:
            channels_last = layout != "contiguous"
            p = torch.nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight.clone())
        p.grad = grad.to(memory_format=torch.channels_last) if layout == "channels_last" else grad.clone()
        optimizer = SophiaG([p], lr=0.1)
        optimizer.update_hessian(num_predictions=7)
        optimizer.step()
        assert layout == "holes" or optimizer.state[p]["hessian"].stride() == p.stride()
        results.append(p.detach().contiguous())
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_automatic_choice_compiles_only_what_is_large() -> None:
    small, large = torch.zeros(10), torch.zeros(kernels.COMPILED_FROM)
    assert kernels._choose(kernels.AUTOMATIC, [(small,)]) == (False, False)
    assert kernels._choose(kernels.AUTOMATIC, [(large,)]) == (False, True)
    assert kernels._choose(kernels.Form(compile=False), [(large,)]) == (False, False)
    assert kernels._choose(kernels.Form(foreach=True), [(large,)]) == (True, False)
    assert kernels._choose(kernels.AUTOMATIC, [(torch.zeros(10, device="meta"),)]) == (True, False)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_a_group_may_span_two_devices_under_loss_scaling(cls: type, options: dict[str, Any]) -> None:
    """Fake tensors refuse operations between devices, like CUDA. The eager form copies, which needs a build with CUDA."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(3, 4, device=f"cuda:{index}")) for index in (0, 1)]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = cls(params, **options, foreach=True)
        optimizer.grad_scale, optimizer.found_inf = (torch.ones((), device="cuda:0") for _ in range(2))
        for _ in range(2):
            if isinstance(optimizer, AdaHessian):
                optimizer.update_hessian(estimates=[p.grad for p in params])
            elif not isinstance(optimizer, Lion):
                optimizer.update_hessian(num_predictions=3)
            optimizer.step()
        assert [optimizer.state[p]["exp_avg"].device for p in params] == [p.device for p in params]
        if isinstance(optimizer, Sophia):
            assert optimizer.unclipped_count.device == params[0].device


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_step_and_refresh_read_nothing_back_from_the_device(
    cls: type, options: dict[str, Any], foreach: bool, amp: bool
) -> None:
    """On the meta device there is nothing to read: a branch on a value, or .item(), raises."""
    p = torch.nn.Parameter(torch.ones(3, 4, device="meta"))
    p.grad = torch.ones_like(p)
    lr = torch.ones((), device="meta")
    optimizer = cls([p], lr=lr, **options, foreach=foreach, compile=False)
    if amp:
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="meta"), torch.ones((), device="meta")
    for _ in range(2):
        if isinstance(optimizer, AdaHessian):
            optimizer.update_hessian(estimates=[p.grad])
        elif not isinstance(optimizer, Lion):
            optimizer.update_hessian(num_predictions=torch.ones((), device="meta"))
        optimizer.step()
    if isinstance(optimizer, Sophia):
        assert optimizer.unclipped_count.is_meta
