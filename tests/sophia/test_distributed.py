"""Two processes under FSDP2 and DDP compute the same as one, including shards and checkpoints."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sophia import (
    SophiaG,
    SophiaH,
    curvature_sums,
    gauss_newton_bartlett,
    hutchinson,
    hutchinson_differences,
)
from sophia.random import normals, normals_like

WORLD, ROWS, STEPS = 2, 8, 7


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    # 5 rows over 2 ranks: shards of different sizes; the bias of 1 leaves the second rank empty.
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=generator), torch.randint(4, (ROWS,), generator=generator)


def train(
    model: nn.Module, optimizer: SophiaG, rank: int, world: int, first: int = 1, last: int = STEPS
) -> list[float]:
    """Row i goes to rank i mod W; the gradient is the mean over ranks."""
    fractions = []
    for step in range(first, last + 1):
        x, y = (t[rank::world] for t in batch(step))
        if optimizer.hessian_due:
            n = gauss_newton_bartlett(
                lambda x=x: model(x),
                seed=0,
                step=step,
                positions=torch.arange(rank, ROWS, world),
            )
            optimizer.update_hessian(num_predictions=n * world)
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        count = torch.stack([optimizer.unclipped_count.double(), torch.tensor(optimizer.numel).double()])
        if any(isinstance(p, DTensor) for p in model.parameters()):
            dist.all_reduce(count)
        fractions.append(float(count[0] / count[1]))
    return fractions


def make_optimizer(model: nn.Module) -> SophiaG:
    return SophiaG(model.parameters(), lr=0.02, gamma=2.0, betas=(0.9, 0.9), hessian_interval=3)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    params = list(model.parameters())
    return {
        "weights": [whole(p) for p in params],
        **{key: [whole(optimizer.state[p][key]) for p in params] for key in ("exp_avg", "hessian", "step")},
    }


def sum_of_state(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.stack([curvature_sums(s["hessian"], s["exp_avg"]) for s in optimizer.state.values()]).sum(dim=0)


def differences(model: nn.Module) -> list[Tensor]:
    x, y = batch(1)
    return hutchinson_differences(lambda: F.cross_entropy(model(x), y), model.parameters(), seed=3, step=5)


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}

    ddp = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    optimizer = make_optimizer(ddp)
    results["ddp fractions"] = train(ddp, optimizer, rank, WORLD)
    results["ddp"] = snapshot(ddp, optimizer)
    results["ddp differences"] = differences(ddp)
    x, y = batch(2)
    F.cross_entropy(ddp(x), y).backward()  # .grad is a view of a bucket, which the estimate's gradients go through too
    before = [p.grad.clone() for p in ddp.parameters()]
    differences(ddp)
    results["ddp gradients"] = [before, [p.grad for p in ddp.parameters()]]

    sharded = make_model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(sharded)
    optimizer = make_optimizer(sharded)
    results["fsdp fractions"] = train(sharded, optimizer, rank, WORLD)
    results["fsdp"] = snapshot(sharded, optimizer)

    sums = sum_of_state(optimizer)
    dist.all_reduce(sums)
    results["sums"] = sums

    estimates = differences(sharded)
    results["fsdp differences"] = [whole(estimate) for estimate in estimates]
    results["noise"] = [whole(normals_like(p, 1, 2, "name")) for p in sharded.parameters()]

    second = SophiaH(sharded.parameters())
    second.update_hessian(estimates=estimates)
    results["taken in"] = [whole(second.state[p]["hessian"]) for p in sharded.parameters()]
    try:
        second.update_hessian(estimates=[e.full_tensor() for e in estimates])
    except TypeError as error:
        results["plain estimates"] = str(error)

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    full = get_optimizer_state_dict(sharded, optimizer, options=options)
    again = make_optimizer(sharded)
    set_optimizer_state_dict(sharded, again, full, options=options)
    results["restored"] = snapshot(sharded, again)
    if rank == 0:
        torch.save(results, f"{directory}/results")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold tensors: an interpreter that ends meanwhile would abort


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"FSDP2 of torch {torch.__version__} needs an accelerator")
    directory = tmp_path_factory.mktemp("gloo")
    mp.start_processes(worker, (str(directory),), nprocs=WORLD, start_method="forkserver")
    found: dict[str, Any] = torch.load(Path(directory) / "results", weights_only=True)
    return found


@pytest.fixture(scope="module")
def single() -> tuple[nn.Module, SophiaG, list[float]]:
    model = make_model()
    optimizer = make_optimizer(model)
    return model, optimizer, train(model, optimizer, 0, 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(distributed: dict, single: tuple, strategy: str) -> None:
    model, optimizer, fractions = single
    torch.testing.assert_close(distributed[strategy], snapshot(model, optimizer), rtol=1e-4, atol=1e-6)
    assert distributed[f"{strategy} fractions"] == fractions
    assert any(0 < fraction < 1 for fraction in fractions)


def test_the_sums_over_shards_are_those_of_the_whole(distributed: dict, single: tuple) -> None:
    torch.testing.assert_close(distributed["sums"], sum_of_state(single[1]), rtol=1e-4, atol=0)


def test_noise_of_shards_is_the_slice_of_the_whole(distributed: dict) -> None:
    for p, noise in zip(make_model().parameters(), distributed["noise"], strict=True):
        assert torch.equal(noise, normals(1, 2, "name", 0, p.numel()).view(p.shape))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_central_differences_of_several_processes_are_those_of_one(distributed: dict, engine: str) -> None:
    model = make_model()
    with torch.no_grad():
        for p, weight in zip(model.parameters(), distributed[engine]["weights"], strict=True):
            p.copy_(weight)
    x, y = batch(1)
    exact = hutchinson(lambda: F.cross_entropy(model(x), y), model.parameters(), seed=3, step=5)
    flat, exact_flat = (torch.cat([t.flatten() for t in ts]) for ts in (distributed[f"{engine} differences"], exact))
    assert (flat - exact_flat).norm() < 1e-3 * exact_flat.norm()


def test_central_differences_under_ddp_leave_gradients_as_they_were(distributed: dict) -> None:
    before, after = distributed["ddp gradients"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_sharded_estimates_are_taken_in_and_plain_ones_refused(distributed: dict) -> None:
    for estimate, h in zip(distributed["fsdp differences"], distributed["taken in"], strict=True):
        torch.testing.assert_close(h, 0.01 * estimate, rtol=1e-5, atol=1e-9)
    assert "the estimate for parameter 0 is a Tensor, expected a DTensor" in distributed["plain estimates"]


def test_sharded_state_round_trips_through_a_full_state_dict(distributed: dict) -> None:
    torch.testing.assert_close(distributed["restored"], distributed["fsdp"], rtol=0, atol=0)
