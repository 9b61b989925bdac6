"""The loop against a plain one: the same batches, rates, estimates, clip and seeds have the same weights in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sophia
from data.batches import Batches
from data.dataset import TokenDataset
from models import GPT2
from training.checkpoints import newest_valid
from training.config import RunConfig
from training.corpus import open_corpus
from training.distributed import Distributed
from training.loop import Reporter
from training.records import RunRecord
from training.run import model_shape

Train = Callable[..., RunRecord]
#: Of 12 steps with a warm-up of four, as shares of the peak: linear, then half a cosine from 1 to 0.05.
FACTORS = [
    *(0.25, 0.5, 0.75, 1.0),
    *(0.05 + 0.95 * (1 + math.cos(math.pi * eighths / 8)) / 2 for eighths in range(1, 8)),
    0.05,
]
SCHEDULE = ["train.steps=12", "schedule=cosine", "schedule.warmup_steps=4", "schedule.final_ratio=0.05"]


def config_of(record: RunRecord) -> RunConfig:
    return RunConfig.model_validate(record.config)


def final_weights(record: RunRecord) -> dict[str, Tensor]:
    checkpoint, _ = newest_valid(record.directory / "checkpoints")
    assert checkpoint is not None
    names = [name for name in checkpoint.names() if name.startswith("model.")]
    return {name.removeprefix("model."): checkpoint.tensor(name) for name in names}


def plain_adamw(parameters: list[Tensor], keys: Any) -> torch.optim.Optimizer:
    # Without groups: the cases have no weight decay.
    return torch.optim.AdamW(parameters, keys.lr, betas=keys.betas, eps=keys.eps, weight_decay=0.0, foreach=False)


def plain_sophia(parameters: list[Tensor], keys: Any) -> torch.optim.Optimizer:
    return sophia.Sophia(
        parameters,
        lr=keys.lr,
        betas=keys.betas,
        gamma=keys.gamma,
        eps=keys.eps,
        weight_decay=0.0,
        hessian_interval=keys.hessian_interval,
        compile=False,
    )


def plain_loop(config: RunConfig, construct: Callable[..., Any], sequences: int) -> tuple[list[float], GPT2]:
    """What README's plain loop makes of a configuration, its estimates from the first `sequences` of each batch."""
    directory, manifest = open_corpus(config, Distributed(0, 0, 1, torch.device("cpu")))
    keys: Any = config.optimizer
    batches = Batches(
        TokenDataset(directory, "train"),
        config.seeds.data,
        config.train.global_batch_size,
        config.train.sequence_length,
    )
    model = GPT2(model_shape(config, manifest))
    model.initialize(config.seeds.model)
    parameters = list(model.parameters())
    optimizer = construct(parameters, keys)
    losses = []
    for t, factor in enumerate(FACTORS, start=1):
        batch = batches.at(t)
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        optimizer.param_groups[0]["lr"] = keys.lr * factor
        if isinstance(optimizer, sophia.Sophia) and optimizer.hessian_due:
            refresh(
                optimizer, model, keys.estimator, tokens[:sequences], targets[:sequences], config.seeds.curvature, t
            )
        loss = mean_loss(model, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def mean_loss(model: GPT2, tokens: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten())


def refresh(
    optimizer: sophia.Sophia, model: GPT2, estimator: str, tokens: Tensor, targets: Tensor, seed: int, step: int
) -> None:
    if estimator == "gnb":
        optimizer.update_hessian(sophia.gauss_newton_bartlett(lambda: model.logits(tokens), seed=seed, step=step))
        optimizer.zero_grad()
        return
    names, parameters = zip(*model.named_parameters(), strict=True)
    with model.maths_attention():
        estimates = sophia.hutchinson(
            lambda: mean_loss(model, tokens, targets), parameters, seed=seed, step=step, names=names
        )
    optimizer.update_hessian(estimates=estimates)


# Seeds that are all different; a clip that acts, and updates that are not the same at any scale of the gradient.
SEEDS = ["seeds.model=1", "seeds.data=2", "seeds.curvature=3"]
CASES = {
    "adamw": (plain_adamw, ["optimizer=adamw", "optimizer.lr=1e-2", "optimizer.eps=1e-2", "train.grad_clip=0.2"], 0),
    "every step": (
        plain_sophia,
        ["optimizer=sophiag", "optimizer.hessian_interval=1", "optimizer.batch_fraction=0.19", "optimizer.gamma=0.5"],
        2,
    ),
    "one forward for both": (
        plain_sophia,
        [
            "optimizer=sophiag",
            "optimizer.hessian_interval=3",
            "optimizer.batch_fraction=0.7",
            "train.micro_batch_size=2",
        ],
        6,
    ),
    "own forward": (
        plain_sophia,
        [
            *("optimizer=sophiag", "optimizer.hessian_interval=3", "optimizer.batch_fraction=0.01"),
            "train.shared_forward=false",
        ],
        1,
    ),
    "hutchinson": (
        plain_sophia,
        ["optimizer=sophiah", "optimizer.hessian_interval=5", "optimizer.batch_fraction=0.5", "optimizer.eps=1e-3"],
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_losses_and_weights_of_a_plain_loop(train: Train, case: str) -> None:
    construct, overrides, sequences = CASES[case]
    record = train("run", *SCHEDULE, *SEEDS, "optimizer.weight_decay=0", *overrides)
    losses, model = plain_loop(config_of(record), construct, sequences)
    assert [line["loss"] for line in record.metrics("train")] == pytest.approx(losses, abs=2e-5)
    start = GPT2(model.config)
    start.initialize(1)
    got = final_weights(record)
    moved = torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start.parameters(), strict=True)])
    apart = torch.cat([(p - got[name]).flatten() for name, p in model.named_parameters()])
    assert apart.norm() < 1e-3 * moved.norm()


class Spy:
    """The weights before the first step and after each, of the run that is reported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: list[Tensor] = []
        original, constructed = Reporter.step, Reporter.__init__

        def init(reporter: Reporter, run: Any) -> None:
            constructed(reporter, run)
            self._see(reporter)

        def step(reporter: Reporter, *arguments: Any) -> None:
            original(reporter, *arguments)
            self._see(reporter)

        monkeypatch.setattr(Reporter, "__init__", init)
        monkeypatch.setattr(Reporter, "step", step)

    def _see(self, reporter: Reporter) -> None:
        parameters = reporter._run.strategy.parameters().values()
        self.weights.append(torch.cat([p.detach().flatten() for p in parameters]))

    def movements(self) -> list[float]:
        """How far each step has moved a coordinate at most."""
        return [float((b - a).abs().max()) for a, b in zip(self.weights, self.weights[1:], strict=False)]


# Each coordinate moves by the rate, whatever its gradient.
SIGN_DESCENT = ["optimizer=signum", "optimizer.betas=[0.0]", "optimizer.weight_decay=0", "optimizer.lr=1e-2"]


def test_update_t_moves_the_weights_by_the_rate_of_step_t(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    record = train("run", *SCHEDULE, *SIGN_DESCENT)
    expected = [1e-2 * factor for factor in FACTORS]
    assert spy.movements() == pytest.approx(expected, rel=1e-4)
    assert [line["lr"] for line in record.metrics("train")] == pytest.approx(expected, rel=1e-12)


def test_an_infinite_loss_of_another_rank_holds_the_step_back_here(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks' losses are summed before the step, which asks whether the sum is finite."""
    spy = Spy(monkeypatch)
    original, losses = Distributed.all_reduce, 0

    def all_reduce(self: Distributed, tensor: Tensor, *operation: Any) -> Tensor:
        nonlocal losses
        if tensor.dim() == 0 and tensor.dtype == torch.float64:
            losses += 1
            if losses == 3:
                tensor.fill_(math.inf)
        return original(self, tensor, *operation)

    monkeypatch.setattr(Distributed, "all_reduce", all_reduce)
    record = train("run", "train.steps=5", *SIGN_DESCENT)
    assert losses == 5
    assert [line.get("skipped", False) for line in record.metrics("train")] == [False, False, True, False, False]
    assert [movement == 0 for movement in spy.movements()] == [False, False, True, False, False]
