"""Parameter groups by rule, and the clip that is fused into the step."""

import lion_pytorch
import pytest
import torch

from models import GPT2, GPT2Config
from sophia import Lion
from sophia.elementwise import ElementwiseOptimizer
from training.compose import compose
from training.optimizers import build_optimizers
from training.strategies.gradients import clip_and_step

SHAPE = GPT2Config(vocab_size=61, n_layer=2, n_head=2, n_embd=16, block_size=12, bias=True)
ARMS = ["adamw", "lion", "sophiag", "muon", "signum", "adahessian"]


def gradients_of(model: GPT2, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def stepped(arm: str, scale: float, max_norm: float | None) -> tuple[GPT2, torch.Tensor]:
    model = GPT2(SHAPE)
    parameters = dict(model.named_parameters())
    config = compose([f"optimizer={arm}"]).optimizer
    optimizers = build_optimizers(config, compile_step=False)(parameters)
    for _ in range(2):
        gradients_of(model, scale)
        statistics = clip_and_step(optimizers, max_norm)
    return model, statistics.grad_norm


def test_decaying_embeddings_leave_the_name_of_a_run_as_it_was_without_the_key() -> None:
    plain, without = compose(["optimizer=sophiag"]), compose(["optimizer=sophiag", "optimizer.decay_embeddings=false"])
    assert "decay_embeddings" not in plain.identity()["optimizer"]
    assert plain.run_name != without.run_name


@pytest.mark.parametrize("arm", ["lion", "sophiag", "signum"])
def test_the_groups_of_a_model_decide_together_whether_a_step_is_compiled(arm: str) -> None:
    """A million parameters in all, in groups that are each too small alone."""
    parameters = {
        "token_embedding.weight": torch.nn.Parameter(torch.empty(700, 800)),
        "blocks.0.mlp.up.weight": torch.nn.Parameter(torch.empty(700, 800)),
    }
    config = compose([f"optimizer={arm}", "optimizer.embedding_lr_ratio=4"]).optimizer
    (optimizer,) = build_optimizers(config, compile_step=True)(parameters)
    assert isinstance(optimizer, ElementwiseOptimizer)
    assert len(optimizer.param_groups) == 2
    assert optimizer._form.compile is True


@pytest.mark.parametrize("arm", ["lion", "sophiag", "signum", "adahessian"])
def test_a_step_is_never_compiled_where_compiling_is_off(arm: str) -> None:
    parameters = dict(GPT2(SHAPE).named_parameters())
    for compile_step, form in ((True, None), (False, False)):  # None: where it is worth it
        (optimizer,) = build_optimizers(compose([f"optimizer={arm}"]).optimizer, compile_step=compile_step)(parameters)
        assert isinstance(optimizer, ElementwiseOptimizer)
        assert optimizer._form.compile is form


def test_the_schedule_scales_each_groups_own_peak() -> None:
    from training.strategies.ddp import DDP

    config = compose(["optimizer=muon", "optimizer.lr=2e-3", "optimizer.embedding_lr_ratio=0.25"]).optimizer
    strategy = object.__new__(DDP)
    strategy.optimizers = build_optimizers(config, compile_step=False)(dict(GPT2(SHAPE).named_parameters()))
    strategy.set_learning_rate(0.5)
    rates = {name: group["lr"] for o in strategy.optimizers for group in o.param_groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if "embedding" in name} == {0.25e-3}
    assert {rate for name, rate in rates.items() if "embedding" not in name} == {1e-3}


@pytest.mark.parametrize("arm", ARMS)
def test_the_fused_clip_equals_clipping_first(arm: str) -> None:
    fused, norm = stepped(arm, scale=3.0, max_norm=0.5)
    first, _ = stepped(arm, scale=3.0 * 0.5 / float(norm), max_norm=None)
    for got, expected in zip(fused.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_a_norm_below_the_limit_is_left_alone(arm: str) -> None:
    clipped, _ = stepped(arm, scale=1e-3, max_norm=1.0)
    free, _ = stepped(arm, scale=1e-3, max_norm=None)
    assert all(torch.equal(a, b) for a, b in zip(clipped.parameters(), free.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("bad", ["gradient", "loss"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_non_finite_gradient_or_loss_changes_neither_weights_nor_state(arm: str, bad: str, value: float) -> None:
    model = GPT2(SHAPE)
    parameters = dict(model.named_parameters())
    optimizers = build_optimizers(compose([f"optimizer={arm}"]).optimizer, compile_step=False)(parameters)
    gradients_of(model)
    clip_and_step(optimizers, 1.0)
    weights = [p.detach().clone() for p in parameters.values()]
    states = [
        {key: value.clone() for key, value in o.state[p].items() if isinstance(value, torch.Tensor)}
        for o in optimizers
        for p in parameters.values()
        if p in o.state
    ]
    gradients_of(model)
    if bad == "gradient":
        parameters["blocks.1.mlp.up.weight"].grad[0, 0] = value
    statistics = clip_and_step(optimizers, 1.0, torch.tensor(value if bad == "loss" else 1.0))
    assert statistics.skipped == 1
    assert all(torch.equal(w, p) for w, p in zip(weights, parameters.values(), strict=True))
    after = [o.state[p] for o in optimizers for p in parameters.values() if p in o.state]
    for before, now in zip(states, after, strict=True):
        assert all(torch.equal(value, now[key]) for key, value in before.items())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("betas", [(0.95, 0.98), (0.0, 0.5)])
def test_lion_equals_lion_pytorch_step_by_step(betas: tuple[float, float], foreach: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GPT2(SHAPE).double(), GPT2(SHAPE).double()
    theirs.load_state_dict(ours.state_dict())
    ours_step = Lion(ours.parameters(), 0.01, betas, 0.3, foreach=foreach, compile=False).step
    theirs_step = lion_pytorch.Lion(theirs.parameters(), 0.01, betas, 0.3).step
    for _ in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        ours_step()
        theirs_step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)
