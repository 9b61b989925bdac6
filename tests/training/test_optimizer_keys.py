"""Every key of every optimizer, from the command line to the weights: against the formulas, written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import sophia
from data.batches import Batch
from models import GPT2, GPT2Config
from training.compose import compose
from training.config import OptimizerConfig, RunConfig
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.optimizers import build_optimizers
from training.strategies.ddp import DDP
from training.strategies.gradients import clip_and_step, update_hessian

SHAPE = GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16, block_size=12, bias=True)
STEPS = 5

#: A value of each key under which all of them count, and another one.
COMMON = {
    "lr": (0.05, 0.02),
    "weight_decay": (0.1, 0.4),
    "embedding_lr_ratio": (1.0, 0.25),
    "decay_embeddings": (True, False),
}
ADAM: dict[str, tuple[Any, Any]] = {"betas": ([0.9, 0.95], [0.8, 0.7]), "eps": (0.1, 1.0)}
KEYS: dict[str, dict[str, tuple[Any, Any]]] = {
    "adamw": COMMON | ADAM,
    "lion": COMMON | {"betas": ([0.95, 0.98], [0.5, 0.7])},
    "signum": COMMON | {"betas": ([0.96], [0.5])},
    "muon": COMMON | ADAM | {"momentum": (0.95, 0.5)},
    "sophiag": COMMON
    | {
        "betas": ([0.96, 0.99], [0.8, 0.7]),
        "gamma": (0.05, 0.5),
        "eps": (0.02, 0.1),
        "hessian_interval": (2, 3),
        "clip": (True, False),
        "hessian_power": (1.0, 0.5),
        "hessian_scale": (1.0, 3.0),
    },
    "adahessian": COMMON
    | {
        "betas": ([0.9, 0.999], [0.8, 0.7]),
        "eps": (10.0, 50.0),
        "hessian_interval": (2, 3),
    },
}
ROWS = [(arm, key) for arm, keys in KEYS.items() for key in keys]
#: Keys of the estimate, not of the step, tested below.
OF_THE_ESTIMATE = {"estimator", "batch_fraction"}

State = dict[str, Any]


def averaged(state: State, key: str, value: Tensor, beta: float) -> Tensor:
    state[key] = beta * state.get(key, 0.0) + (1 - beta) * value
    return state[key]


def adamw(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    beta1, beta2 = keys["betas"]
    m, v = averaged(state, "m", g, beta1), averaged(state, "v", g * g, beta2)
    return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + keys["eps"])


def lion(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    beta1, beta2 = keys["betas"]
    update = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    averaged(state, "m", g, beta2)
    return update.sign()


def signum(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    return averaged(state, "m", g, keys["betas"][0]).sign()


def muon(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    """torch's, of one matrix of zeros at a rate of 1, which moves by the update alone."""
    if not state:
        matrix = state["matrix"] = torch.zeros_like(g, dtype=torch.float32)
        state["muon"] = torch.optim.Muon(
            [matrix], 1.0, weight_decay=0.0, momentum=keys["momentum"], adjust_lr_fn="match_rms_adamw"
        )
    state["matrix"].grad = g.float()
    state["muon"].step()
    update = -state["matrix"].double()
    state["matrix"].zero_()
    return update


def sophiag(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    beta1, beta2 = keys["betas"]
    if estimate is not None:
        averaged(state, "h", estimate, beta2)
    curvature = keys["gamma"] * keys["hessian_scale"] * state["h"].clamp(min=0) ** keys["hessian_power"]
    update = averaged(state, "m", g, beta1) / curvature.clamp(min=keys["eps"])
    return update.clamp(-1, 1) if keys["clip"] else update


def adahessian(keys: Mapping[str, Any], state: State, t: int, g: Tensor, estimate: Tensor | None) -> Tensor:
    beta1, beta2 = keys["betas"]
    if estimate is not None:
        averaged(state, "v", estimate**2, beta2)
        state["n"] = state.get("n", 0) + 1
    m = averaged(state, "m", g, beta1)
    return (m / (1 - beta1**t)) / ((state["v"] / (1 - beta2 ** state["n"])).sqrt() + keys["eps"])


RULES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (adamw, lion, signum, muon, sophiag, adahessian)}


def given(t: int, scale: float) -> Iterator[tuple[str, Tensor]]:
    """A gradient or an estimate for each parameter."""
    generator = torch.Generator().manual_seed(1000 * t + int(scale))
    for name, p in GPT2(SHAPE).named_parameters():
        yield name, scale * torch.randn(p.shape, generator=generator)


def by_formula(arm: str, keys: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {name: p.detach().double() for name, p in GPT2(SHAPE).named_parameters()}
    states: dict[str, State] = {name: {} for name in weights}
    for t in range(1, STEPS + 1):
        due = (t - 1) % keys.get("hessian_interval", 1) == 0
        for (name, g), (_, estimate) in zip(given(t, 1.0), given(t, 100.0), strict=True):
            weight, embeds = weights[name], "embedding" in name
            rule = adamw if arm == "muon" and (embeds or weight.dim() < 2) else RULES[arm]
            rate = keys["lr"] * (keys["embedding_lr_ratio"] if embeds else 1.0)
            decays = weight.dim() == 2 and (keys["decay_embeddings"] or not embeds)
            update = rule(keys, states[name], t, g.double(), estimate.double() if due else None)
            weights[name] = weight - rate * (keys["weight_decay"] * weight if decays else 0.0) - rate * update
    return weights


def configured(arm: str, keys: Mapping[str, Any]) -> RunConfig:
    """The configuration of the command line that sets these keys."""
    words = {key: str(value).replace(" ", "") for key, value in keys.items()}
    return compose([f"optimizer={arm}", *(f"optimizer.{key}={word}" for key, word in words.items())])


def by_command_line(arm: str, keys: Mapping[str, Any]) -> dict[str, Tensor]:
    config = configured(arm, keys)
    parameters = dict(GPT2(SHAPE).named_parameters())
    optimizers = build_optimizers(config.optimizer, compile_step=False)(parameters)
    curvature = CurvaturePass.of(config.optimizer, 0, 8, 8)
    for t in range(1, STEPS + 1):
        if curvature is not None:
            (optimizer,) = optimizers
            assert curvature.due(t) == optimizer.hessian_due  # type: ignore[attr-defined]
            if curvature.due(t):
                update_hessian(optimizers, parameters.values(), None, [e for _, e in given(t, 100.0)])
        for name, g in given(t, 1.0):
            parameters[name].grad = g
        clip_and_step(optimizers, None)
    return {name: p.detach().double() for name, p in parameters.items()}


def distance(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return max(float((some[name] - others[name]).abs().max()) for name in others)


@pytest.mark.parametrize(("arm", "key"), ROWS, ids=[f"{arm}.{key}" for arm, key in ROWS])
def test_a_key_of_an_optimizer_has_its_effect_on_the_weights(arm: str, key: str) -> None:
    settings = {name: value for name, (value, _) in KEYS[arm].items()}
    changed = settings | {key: KEYS[arm][key][1]}
    expected = by_formula(arm, changed)
    assert distance(by_command_line(arm, changed), expected) < 1e-5
    assert distance(by_formula(arm, settings), expected) > 1e-3


def test_no_key_of_an_optimizer_is_left_out() -> None:
    for section in get_args(get_args(OptimizerConfig)[0]):
        arm = get_args(section.model_fields["name"].annotation)[0]
        if arm == "external":  # test_external.py
            continue
        keys = set(section.model_fields) - {"name"} - OF_THE_ESTIMATE
        assert keys == KEYS[arm].keys(), f"optimizer={arm}: give each key its two values in KEYS"


SEED, STEP, BATCH = 3, 11, 8
ESTIMATES = {
    **{("sophiag", estimator): 0.2 for estimator in ("gnb", "empirical_fisher", "hutchinson")},
    ("sophiag", "hutchinson_differences"): 0.8,
    ("adahessian", "hutchinson"): 0.2,
    ("adahessian", "hutchinson_differences"): 0.8,
}


class SeededWeights:
    """GPT-2's initialisation of seed 0, scaled up so that the curvature is no rounding."""

    def apply(self, model: GPT2) -> None:
        model.initialize(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.dim() == 2 else 1)


@pytest.mark.parametrize(("arm", "estimator"), ESTIMATES)
def test_the_estimator_and_its_share_of_the_batch_have_their_effect_on_the_curvature(arm: str, estimator: str) -> None:
    fraction = ESTIMATES[arm, estimator]
    config = configured(arm, {"estimator": estimator, "batch_fraction": fraction}).optimizer
    made = DDP(Distributed(0, 0, 1, torch.device("cpu")), bf16=False, compile_model=False)
    with torch.device("meta"):
        model = GPT2(SHAPE)
    made.prepare(model, SeededWeights(), build_optimizers(config, compile_step=False))  # type: ignore[arg-type]
    rows = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (BATCH, SHAPE.block_size + 1))
    curvature = CurvaturePass.of(config, SEED, BATCH, BATCH)
    assert curvature is not None
    curvature.run(made, Batch(rows[:, :-1], rows[:, 1:], np.arange(BATCH)), STEP)

    tokens, targets = (torch.from_numpy(part[: round(fraction * BATCH)]) for part in (rows[:, :-1], rows[:, 1:]))
    reference = GPT2(SHAPE)
    SeededWeights().apply(reference)
    names, parameters = zip(*reference.named_parameters(), strict=True)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(reference.logits(tokens).flatten(0, 1), targets.flatten())

    match estimator:
        case "gnb":
            n = sophia.gauss_newton_bartlett(lambda: reference.logits(tokens), seed=SEED, step=STEP)
            expected = [n * p.grad.square() for p in parameters]
        case "empirical_fisher":
            loss().backward()
            expected = [targets.numel() * p.grad.square() for p in parameters]
        case _:
            with reference.maths_attention():
                expected = sophia.hutchinson(loss, parameters, seed=SEED, step=STEP, names=names)
    if arm == "adahessian":
        expected = [estimate.square() for estimate in expected]
    beta2 = config.betas[1]  # type: ignore[union-attr]
    got, wanted = (
        torch.cat([part.flatten() for part in parts])
        for parts in ([h for _, h, _ in made.curvature_state()], [(1 - beta2) * e for e in expected])
    )
    assert (got - wanted).norm() < 1e-2 * wanted.norm()
