"""The loop against a plain one: the same batches, rates, estimates, clip and seeds have the same weights in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sophia
import training.loop
from data.batches import Batches
from data.dataset import TokenDataset
from models import GPT2
from training.architectures import model_shape
from training.config import RunConfig
from training.corpus import open_corpus
from training.distributed import Distributed
from training.records import RunRecord
from training.reliability.checkpoints import newest_valid
from training.strategies.base import StepStatistics
from training.strategies.ddp import DDP

Train = Callable[..., RunRecord]
#: Of 12 steps with a warm-up of four, as shares of the peak: linear, then half a cosine from 1 to 0.05.
FACTORS = [
    *(0.25, 0.5, 0.75, 1.0),
    *(0.05 + 0.95 * (1 + math.cos(math.pi * eighths / 8)) / 2 for eighths in range(1, 8)),
    0.05,
]
SCHEDULE = ["train.steps=12", "schedule=cosine", "schedule.warmup_steps=4", "schedule.final_ratio=0.05"]


def final_weights(record: RunRecord) -> dict[str, Tensor]:
    checkpoint, _ = newest_valid(record.directory / "checkpoints")
    assert checkpoint is not None
    names = [name for name in checkpoint.names() if name.startswith("model.")]
    return {name.removeprefix("model."): checkpoint.tensor(name) for name in names}


def plain_optimizer(parameters: list[Tensor], keys: Any) -> torch.optim.Optimizer:
    """Without groups: the cases have no weight decay."""
    if keys.name == "adamw":
        return torch.optim.AdamW(parameters, keys.lr, betas=keys.betas, eps=keys.eps, weight_decay=0.0, foreach=False)
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


def plain_loop(config: RunConfig, sequences: int) -> tuple[list[float], list[float], GPT2]:
    """Losses, gradient norms and the model of README's plain loop, its estimates from the first `sequences` of a batch."""
    directory, manifest = open_corpus(config, Distributed(0, 0, 1, torch.device("cpu")))
    keys: Any = config.optimizer
    batches = Batches(
        TokenDataset(directory, "train"),
        config.seeds.data,
        config.train.global_batch_size,
        config.train.sequence_length,
    )
    model = GPT2(model_shape(config.model, manifest.vocab_size))
    model.initialize(config.seeds.model)
    parameters = list(model.parameters())
    optimizer = plain_optimizer(parameters, keys)
    losses, norms = [], []
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
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, model


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


SEEDS = ["seeds.model=1", "seeds.data=2", "seeds.curvature=3"]
#: The run's own overrides, and how many sequences its estimates are made of. The clip acts on the first steps, and no
#: update is the same at every scale of the gradient.
CASES = {
    "adamw": ("optimizer=adamw optimizer.lr=1e-2 optimizer.eps=1e-2 train.grad_clip=0.2", 0),
    "every_step": (
        "optimizer=sophiag optimizer.hessian_interval=1 optimizer.batch_fraction=0.19 optimizer.gamma=0.5",
        2,
    ),
    "shared_forward": (
        "optimizer=sophiag optimizer.hessian_interval=3 optimizer.batch_fraction=0.7 train.micro_batch_size=2",
        6,
    ),
    "own_forward": (
        "optimizer=sophiag optimizer.hessian_interval=3 optimizer.batch_fraction=0.01 train.shared_forward=false",
        1,
    ),
    "hutchinson": (
        "optimizer=sophiah optimizer.hessian_interval=5 optimizer.batch_fraction=0.5 optimizer.eps=1e-3",
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_losses_and_weights_of_a_plain_loop(train: Train, case: str) -> None:
    overrides, sequences = CASES[case]
    record = train("run", *SCHEDULE, *SEEDS, "optimizer.weight_decay=0", *overrides.split())
    config = RunConfig.model_validate(record.config)
    losses, norms, model = plain_loop(config, sequences)
    lines = list(record.metrics("train"))
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=2e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    assert [line["clipped_norm"] for line in lines] == [norm > (config.train.grad_clip or math.inf) for norm in norms]
    start = GPT2(model.config)
    start.initialize(1)
    got = final_weights(record)
    moved = torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start.parameters(), strict=True)])
    apart = torch.cat([(p - got[name]).flatten() for name, p in model.named_parameters()])
    assert apart.norm() < 1e-3 * moved.norm()


def movements(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far each step of the following run moves a coordinate at most."""
    seen: list[float] = []
    original = DDP.step

    def step(self: DDP, *arguments: Any) -> StepStatistics:
        before = [weight.clone() for weight in self.weights()]
        statistics = original(self, *arguments)
        seen.append(max(float((a - b).abs().max()) for a, b in zip(self.weights(), before, strict=True)))
        return statistics

    monkeypatch.setattr(DDP, "step", step)
    return seen


# Each coordinate moves by the rate, whatever its gradient.
SIGN_DESCENT = ["optimizer=signum", "optimizer.betas=[0.0]", "optimizer.weight_decay=0", "optimizer.lr=1e-2"]


def test_update_t_moves_the_weights_by_the_rate_of_step_t(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = movements(monkeypatch)
    record = train("run", *SCHEDULE, *SIGN_DESCENT)
    expected = [1e-2 * factor for factor in FACTORS]
    assert moved == pytest.approx(expected, rel=1e-4)
    assert [line["lr"] for line in record.metrics("train")] == pytest.approx(expected, rel=1e-12)


def test_an_infinite_loss_of_another_rank_holds_the_step_back_here(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks' losses are summed before the step, which asks whether the sum is finite."""
    moved = movements(monkeypatch)
    forward_backward, all_reduce = training.loop.forward_backward, Distributed.all_reduce
    shares: list[Tensor] = []

    def noted(*arguments: Any) -> Tensor:
        shares.append(forward_backward(*arguments))
        return shares[-1]

    def summed(self: Distributed, tensor: Tensor, *operation: Any) -> Tensor:
        if len(shares) == 3 and tensor.numel() == 1 and tensor.item() == shares[-1].item():
            tensor.fill_(math.inf)
        return all_reduce(self, tensor, *operation)

    monkeypatch.setattr(training.loop, "forward_backward", noted)
    monkeypatch.setattr(Distributed, "all_reduce", summed)
    record = train("run", "train.steps=5", *SIGN_DESCENT)
    assert [line.get("skipped", False) for line in record.metrics("train")] == [False, False, True, False, False]
    assert [distance == 0 for distance in moved] == [False, False, True, False, False]
