"""Two processes on the CPU: replicas (DDP) and shards (FSDP2) have a single process's gradients and weights."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import GPT2, GPT2Config
from training.distributed import destroy_process_groups

CONFIG = GPT2Config(300, 2, 2, 32, 16, bias=True, attention_layer_scaling=True)
WORLD_SIZE = 2


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(CONFIG.vocab_size, (4, 16), generator=generator) for _ in range(2))
    return tokens, targets, torch.rand(4, 16, generator=generator)


def local(rank: int) -> list[Tensor]:
    return [tensor[rank::WORLD_SIZE] for tensor in inputs()]


def sharded_model() -> GPT2:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    with torch.device("meta"):
        model = GPT2(CONFIG)
    model.compile(backend="aot_eager")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.initialize(0)
    return model


def check_shards(rank: int, expected: dict[str, list[Tensor]]) -> None:
    tokens, targets, uniforms = local(rank)
    whole = dict(GPT2(CONFIG).named_parameters())
    model = sharded_model()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), whole[name]), name
    for name, arguments in {"loss_sum": (targets, None), "sampled_loss_sum": (None, uniforms)}.items():
        model.zero_grad()
        (getattr(model(tokens, *arguments), name) * WORLD_SIZE).backward()
        for parameter, gradient in zip(model.parameters(), expected[name], strict=True):
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient, atol=1e-5, rtol=1e-4)


def worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    model = GPT2(CONFIG)
    output = model(*inputs())
    expected = {}
    for name in ("sampled_loss_sum", "loss_sum"):
        loss = getattr(output, name)
        expected[name] = list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    check_shards(rank, expected)
    destroy_process_groups()


def test_shards_of_a_compiled_model_have_the_gradients_of_a_single_process(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path / "rendezvous"),), nprocs=WORLD_SIZE, start_method="forkserver")
