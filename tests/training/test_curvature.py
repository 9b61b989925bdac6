"""The curvature pass of the loop: equal to the library's estimator, whatever the split; padding weighs nothing."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sophia
from data.batches import Batch
from models import GPT2, GPT2Config, ModelOutput
from training.config import SophiaConfig
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.loop import forward_backward_refresh
from training.optimizers import build_optimizers
from training.recording.ledger import Ledger
from training.strategies.ddp import DDP

SHAPE = GPT2Config(vocab_size=61, n_layer=2, n_head=2, n_embd=16, block_size=12)
BATCH, LENGTH, SEED, STEP = 8, 12, 3, 11
CONFIG = SophiaConfig(name="sophiag", lr=1e-3, gamma=0.05, estimator="gnb", batch_fraction=0.5, betas=(0.96, 0.0))


class SeededWeights:
    """Stands in for InitialWeights: GPT-2's initialisation of seed 0, scaled up so that the curvature is no rounding."""

    def apply(self, model: GPT2) -> None:
        model.initialize(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)


def strategy(rank: int = 0, world_size: int = 1, config: SophiaConfig = CONFIG, shape: GPT2Config = SHAPE) -> DDP:
    made = DDP(Distributed(rank, rank, 1, torch.device("cpu")), bf16=False, compile_model=False)
    with torch.device("meta"):
        model = GPT2(shape)
    made.prepare(model, SeededWeights(), build_optimizers(config, compile_step=False))
    made.distributed = Distributed(rank, rank, world_size, torch.device("cpu"))
    return made


def batch(rank: int = 0, world_size: int = 1) -> Batch:
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (BATCH, LENGTH + 1))
    mine = np.arange(rank, BATCH, world_size)
    return Batch(tokens[mine, :-1], tokens[mine, 1:], mine)


def hessians(made: DDP) -> list[Tensor]:
    return [h for _, h, _ in made.curvature_state()]


def run(config: SophiaConfig = CONFIG, micro_batch_size: int = BATCH) -> list[Tensor]:
    made = strategy(config=config)
    CurvaturePass(config, SEED, BATCH, micro_batch_size).run(made, batch(), STEP)
    assert all(p.grad is None for p in made.model.parameters())
    return hessians(made)


def assert_close(got: list[Tensor], expected: list[Tensor], rtol: float = 1e-4) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=rtol, atol=rtol * float(e.abs().max()) * 1e-2)


@pytest.mark.parametrize(
    ("estimator", "passes"), [("gnb", 1), ("empirical_fisher", 1), ("hutchinson", 1), ("hutchinson_differences", 2)]
)
def test_a_pass_reports_progress_before_each_micro_batch(estimator: str, passes: int) -> None:
    config = CONFIG.model_copy(update={"estimator": estimator})
    done: list[str] = []
    CurvaturePass(config, SEED, BATCH, 2, progress=done.append).run(strategy(config=config), batch(), STEP)
    assert done == [f"in the curvature pass, micro-batch {number} of 2" for number in (1, 2)] * passes


def test_a_pass_within_training_reports_progress_before_each_micro_batch() -> None:
    done: list[str] = []
    made = CurvaturePass(CONFIG, SEED, BATCH, 2, shared_forward=True, progress=done.append)
    made.run_within_training(strategy(), batch(), STEP, BATCH * LENGTH, Ledger(torch.device("cpu")))
    assert done == [f"in the curvature pass, micro-batch {number} of 2" for number in (1, 2)]


def test_gnb_equals_the_librarys_estimator_on_the_same_seeds() -> None:
    model = strategy().model
    tokens = torch.from_numpy(batch().tokens[: BATCH // 2])
    n = sophia.gauss_newton_bartlett(lambda: model.logits(tokens), seed=SEED, step=STEP)
    assert n == BATCH // 2 * LENGTH
    expected = [n * p.grad.square() for p in model.parameters()]
    assert_close(run(), expected)


@pytest.mark.parametrize(("micro_batch_size", "fraction"), [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (3, 1.0)])
@pytest.mark.parametrize("estimator", ["gnb", "empirical_fisher", "hutchinson"])
def test_the_estimate_does_not_depend_on_the_micro_batch(
    estimator: str, micro_batch_size: int, fraction: float
) -> None:
    """Of all eight sequences the last of three micro-batches has one of padding, which weighs nothing."""
    config = CONFIG.model_copy(update={"estimator": estimator, "batch_fraction": fraction})
    assert_close(run(config, micro_batch_size), run(config))


def test_central_differences_agree_with_the_exact_product() -> None:
    exact = run(CONFIG.model_copy(update={"estimator": "hutchinson"}))
    differences = run(CONFIG.model_copy(update={"estimator": "hutchinson_differences"}))
    error = torch.cat([(d - e).flatten() for d, e in zip(differences, exact, strict=True)]).norm()
    assert error < 5e-3 * torch.cat([e.flatten() for e in exact]).norm()


def with_dropout(estimator: str, micro_batch_size: int, *, recomputed: bool = False) -> tuple[list[Tensor], Tensor]:
    """h of a refresh of a model with dropout 0.1, and what the generator draws next."""
    config = CONFIG.model_copy(update={"estimator": estimator})
    made = strategy(config=config, shape=replace(SHAPE, dropout=0.1))
    if recomputed:
        for block in made.model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    torch.manual_seed(5)
    CurvaturePass(config, SEED, BATCH, micro_batch_size).run(made, batch(), STEP)
    return hessians(made), torch.rand(3)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("micro_batch_size", [2, BATCH])
def test_central_differences_with_dropout_are_the_exact_product_under_the_same_masks(
    micro_batch_size: int, recomputed: bool
) -> None:
    """In float32, whose rounding over 2δ leaves the bound; masks that differ would be wrong fifty times over."""
    exact, _ = with_dropout("hutchinson", micro_batch_size)
    differences, _ = with_dropout("hutchinson_differences", micro_batch_size, recomputed=recomputed)
    error = torch.cat([(d - e).flatten() for d, e in zip(differences, exact, strict=True)]).norm()
    assert error < 5e-3 * torch.cat([e.flatten() for e in exact]).norm()


@pytest.mark.parametrize("estimator", ["gnb", "empirical_fisher", "hutchinson", "hutchinson_differences"])
def test_training_draws_the_dropout_masks_that_it_would_have_drawn_without_the_pass(estimator: str) -> None:
    _, following = with_dropout(estimator, 2)
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(3))


def test_weights_are_bit_for_bit_what_they_were_after_central_differences() -> None:
    made = strategy(config=CONFIG.model_copy(update={"estimator": "hutchinson_differences"}))
    before = [p.detach().clone() for p in made.model.parameters()]
    config = CONFIG.model_copy(update={"estimator": "hutchinson_differences"})
    CurvaturePass(config, SEED, BATCH, 2).run(made, batch(), STEP)
    assert all(torch.equal(b, p) for b, p in zip(before, made.model.parameters(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_central_differences_move_the_weights_a_thousandth_of_their_norm_along_the_noise_in_float32(bf16: bool) -> None:
    config = CONFIG.model_copy(update={"estimator": "hutchinson_differences"})
    made = strategy(config=config)
    made.bf16 = bf16

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()

    here, noise = flat(made.weights()), flat(made.normals(SEED, STEP))
    seen: list[Tensor] = []
    original = made.forward

    def forward(*arguments: Any) -> ModelOutput:
        seen.append(flat(made.weights()) - here)
        return original(*arguments)

    made.forward = forward  # type: ignore[method-assign]
    CurvaturePass(config, SEED, BATCH, BATCH).run(made, batch(), STEP)
    step = 1e-3 * here.norm() / noise.norm()
    assert len(seen) == 2
    for moved, expected in zip(seen, (step * noise, -step * noise), strict=True):
        assert (moved - expected).norm() < 1e-3 * expected.norm()
    assert_close(hessians(made), run(config), rtol=0)


def test_the_difference_of_a_model_of_zeros_is_finite() -> None:
    config = CONFIG.model_copy(update={"estimator": "hutchinson_differences"})
    made = strategy(config=config)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    assert not CurvaturePass(config, SEED, BATCH, 2).run(made, batch(), STEP)
    assert all(bool(h.isfinite().all()) for h in hessians(made))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_cover_the_slice_once_with_the_labels_of_their_global_position(world_size: int) -> None:
    config = CONFIG.model_copy(update={"batch_fraction": 0.375})  # 3 of 8 sequences: some ranks have none
    whole = CurvaturePass(config, SEED, BATCH, BATCH)
    positions: list[int] = []
    shapes = set()
    for rank in range(world_size):
        for part in whole.slices(strategy(rank, world_size), batch(rank, world_size)):
            shapes.add(tuple(part.tokens.shape))
            assert torch.equal(part.targets >= 0, part.positions >= 0)
            positions += part.positions[part.positions >= 0].tolist()
    assert sorted(positions) == list(range(3 * LENGTH))
    assert len(shapes) == 1


class Captured(NamedTuple):
    """What a rank hands to the optimizer for its part of an estimate."""

    local_count: int  # predictions of this rank
    num_predictions: int
    gradients: list[Tensor]  # what the sum over the ranks is made of
    sequences: int | None  # done within training


def part_of_rank(
    rank: int, world_size: int, config: SophiaConfig, *, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> Captured:
    """The pass of one rank alone: what the others would add to N is added, nothing to the gradients."""
    made = strategy(rank, world_size, config)
    counts: list[int] = []
    taken: list[tuple[int, list[Tensor]]] = []

    def all_reduce(self: Distributed, tensor: Tensor, *operation: object) -> Tensor:
        if tensor.dtype == torch.int64:
            counts.append(int(tensor))
            tensor.fill_(3 * LENGTH)
        return tensor

    def update_hessian(*, num_predictions: Tensor, estimates: object = None) -> Tensor:
        # An engine that averages has its gradients multiplied beforehand; `reduce_gradients` has divided them.
        scale = 1 if shared else world_size
        taken.append((int(num_predictions), [p.grad / scale for p in made.model.parameters() if p.grad is not None]))
        return torch.zeros(())

    curvature = CurvaturePass(config, SEED, BATCH, 2, shared_forward=shared)
    done = None
    with monkeypatch.context() as patch:
        patch.setattr(Distributed, "all_reduce", all_reduce)
        patch.setattr(made, "update_hessian", update_hessian)
        if shared:
            ledger = Ledger(torch.device("cpu"))
            _, done, _ = curvature.run_within_training(made, batch(rank, world_size), STEP, BATCH * LENGTH, ledger)
        else:
            curvature.run(made, batch(rank, world_size), STEP)
    ((num_predictions, gradients),) = taken
    (count,) = counts
    return Captured(count, num_predictions, gradients, done)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize(("estimator", "shared"), [("gnb", False), ("gnb", True), ("empirical_fisher", False)])
def test_the_parts_of_the_ranks_add_up_to_the_estimate_of_one(
    estimator: str, shared: bool, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of eight sequences: ranks have one more than others, or none, and what fills up their micro-batches weighs
    nothing."""
    config = CONFIG.model_copy(update={"estimator": estimator, "batch_fraction": 0.375})
    whole = part_of_rank(0, 1, config, shared=False, monkeypatch=monkeypatch)
    assert whole.local_count == whole.num_predictions == 3 * LENGTH
    parts = [part_of_rank(r, world_size, config, shared=shared, monkeypatch=monkeypatch) for r in range(world_size)]
    assert [part.local_count for part in parts] == [LENGTH * len(range(r, 3, world_size)) for r in range(world_size)]
    assert {part.num_predictions for part in parts} == {3 * LENGTH}
    if shared:
        assert [part.sequences for part in parts] == [len(range(r, 3, world_size)) for r in range(world_size)]
    assert_close(
        [torch.stack(same).sum(0) for same in zip(*[p.gradients for p in parts], strict=True)], whole.gradients
    )


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), (2, [1, 3, 5, 7, 9, 11]), (10, [1, 11])]
)
def test_refreshes_come_before_the_first_step_and_every_k_steps(interval: int, expected: list[int]) -> None:
    curvature = CurvaturePass(CONFIG.model_copy(update={"hessian_interval": interval}), SEED, BATCH, BATCH)
    assert [step for step in range(1, 12) if curvature.due(step)] == expected


@pytest.mark.parametrize(
    ("fraction", "of", "sequences"), [(1 / 15, 480, 32), (0.19, 8, 2), (0.7, 8, 6), (0.05, 8, 1), (1.0, 8, 8)]
)
def test_the_share_of_the_batch_is_rounded_to_whole_sequences_and_is_at_least_one(
    fraction: float, of: int, sequences: int
) -> None:
    config = CONFIG.model_copy(update={"batch_fraction": fraction})
    assert CurvaturePass(config, SEED, of, of).sequences == sequences


@pytest.mark.parametrize("micro_batch_size", [1, BATCH])
@pytest.mark.parametrize("shared_forward", [False, True])
def test_a_non_finite_estimate_never_enters_h(shared_forward: bool, micro_batch_size: int) -> None:
    made = strategy()
    curvature = CurvaturePass(CONFIG, SEED, BATCH, micro_batch_size, shared_forward=shared_forward)
    curvature.run(made, batch(), 1)
    before = [h.clone() for h in hessians(made)]
    with torch.no_grad():
        made.model.final_norm.weight[0] = float("nan")
    if shared_forward:
        assert curvature.shares_forward(made)
        ledger = Ledger(torch.device("cpu"))
        *_, held_back = curvature.run_within_training(made, batch(), STEP, BATCH * LENGTH, ledger)
    else:
        held_back = curvature.run(made, batch(), STEP)
    assert held_back == 1
    assert all(torch.equal(b, h) for b, h in zip(before, hessians(made), strict=True))


@pytest.mark.parametrize(("num_predictions", "held_back"), [(1, 0), (10, 1)])
def test_an_estimate_that_only_its_square_makes_infinite_never_enters_h(num_predictions: int, held_back: int) -> None:
    made = strategy()
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.model.final_norm.weight.grad[0] = 1e19  # its square is finite in float32, and ten times its square is not
    assert made.update_hessian(num_predictions=num_predictions) == held_back
    assert all(h.isfinite().all() for h in hessians(made))
    assert max(float(h.max()) for h in hessians(made)) == (0.0 if held_back else pytest.approx(1e38, rel=1e-5))


def one_forward(
    micro_batch_size: int, config: SophiaConfig, rank: int = 0, world_size: int = 1
) -> tuple[list[Tensor], list[Tensor], float]:
    """h, the training gradient and the training loss of a step whose refresh has no forward of its own."""
    made = strategy(rank, world_size, config)
    curvature = CurvaturePass(config, SEED, BATCH, micro_batch_size, shared_forward=True)
    assert curvature.shares_forward(made)
    train = SimpleNamespace(global_batch_size=BATCH, sequence_length=LENGTH)
    run: Any = SimpleNamespace(
        strategy=made,
        config=SimpleNamespace(train=train),
        micro_batch_size=micro_batch_size,
        ledger=Ledger(torch.device("cpu")),
        flops=SHAPE.flops(LENGTH),
        state=SimpleNamespace(step=STEP - 1),
        progress=lambda doing: None,
    )
    share, held_back = forward_backward_refresh(run, curvature, made, batch(rank, world_size), STEP)
    assert not held_back
    return hessians(made), [p.grad for p in made.model.parameters() if p.grad is not None], float(share)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8])
@pytest.mark.parametrize("batch_fraction", [0.125, 0.5, 1.0])
def test_labels_drawn_in_the_training_forward_give_the_same_curvature_and_training_gradient(
    micro_batch_size: int, batch_fraction: float
) -> None:
    config = CONFIG.model_copy(update={"batch_fraction": batch_fraction})
    h, gradients, loss = one_forward(micro_batch_size, config)
    assert_close(h, run(config))
    model = strategy().model
    expected = model.loss(torch.from_numpy(batch().tokens), torch.from_numpy(batch().targets))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients, [p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_rank_with_less_to_estimate_from_than_others_trains_on_all_of_its_batch(
    micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 has three of its four sequences in the slice of seven; rank 0 has all of its own in it."""
    monkeypatch.setattr(Distributed, "all_reduce", lambda self, tensor, *operation: tensor)
    config = CONFIG.model_copy(update={"batch_fraction": 0.875})
    _, gradients, loss = one_forward(micro_batch_size, config, rank=1, world_size=2)
    model, mine = strategy().model, batch(1, 2)
    expected = model.loss(torch.from_numpy(mine.tokens), torch.from_numpy(mine.targets)) / 2
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients, [p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("estimator", ["empirical_fisher", "hutchinson"])
def test_a_forward_is_shared_only_where_labels_are_all_that_is_needed(estimator: str) -> None:
    config = CONFIG.model_copy(update={"estimator": estimator})
    curvature = CurvaturePass(config, SEED, BATCH, BATCH, shared_forward=True)
    assert not curvature.shares_forward(strategy(config=config))
    assert not CurvaturePass(CONFIG, SEED, BATCH, BATCH, shared_forward=False).shares_forward(strategy())


def test_a_shared_forward_is_billed_a_backward_through_the_trunk() -> None:
    curvature = CurvaturePass(CONFIG, SEED, BATCH, BATCH, shared_forward=True)
    own = curvature.flops(SHAPE.flops(LENGTH), LENGTH)
    shared = curvature.flops(SHAPE.flops(LENGTH), LENGTH, shared_forward=True)
    head = 2 * SHAPE.padded_vocab_size * SHAPE.n_embd * curvature.sequences * LENGTH
    assert shared == (own / 3 - head) * 2
