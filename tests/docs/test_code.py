"""The Python code of docs/sophia.md: its loop trains, and its refresh gives one h however a batch is divided."""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 11


def code(containing: str) -> str:
    """The one Python block of the page that contains this text."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "sophia.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (one for one in found if containing in one)
    return str(block)


class Replica(nn.Sequential):
    """A language model with DistributedDataParallel's `no_sync`, which counts its uses."""

    unsynchronized = 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.unsynchronized += 1
        yield


class Captured:
    """In place of an optimizer: what a rank has computed when it updates h."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def update_hessian(self, num_predictions: int) -> None:
        self.num_predictions = num_predictions
        self.grads = [parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad()


@pytest.fixture
def model() -> Replica:
    torch.manual_seed(0)
    return Replica(nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16), nn.Linear(16, VOCABULARY)).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))


def refreshed(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """h after the page's refresh with these micro-batches, from h = 0."""
    names: dict[str, Any] = {}
    exec(code("def refresh("), names)
    optimizer = SophiaG(model.parameters(), lr=1e-3, betas=(0.9, 0.9))
    names["refresh"](model, optimizer, inputs, step=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    return [optimizer.state[parameter]["hessian"] for parameter in model.parameters()]


def test_the_loop_of_the_page_trains_and_decays_no_norm_or_bias(model: Replica, tokens: Tensor) -> None:
    model.float()
    before = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item()
    names: dict[str, Any] = {"model": model, "batches": [(tokens, tokens)] * 30}
    exec(code("for step, (x, y)"), names)
    assert F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item() < before - 0.05
    decay = {id(p): group["weight_decay"] for group in names["optimizer"].param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.2,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.2,
        "2.bias": 0.0,
    }
    assert all(names["optimizer"].state[parameter]["hessian"].any() for parameter in model.parameters())


def test_micro_batches_give_the_h_of_the_whole_batch(model: Replica, tokens: Tensor) -> None:
    whole = refreshed(model, [tokens])
    assert all(h.any() for h in whole)
    torch.testing.assert_close(refreshed(model, list(tokens.split(2))), whole)
    torch.testing.assert_close(refreshed(model, list(tokens.split([1, 3]))), whole)
    assert model.unsynchronized == 0, "one process has nothing to synchronize"


def test_ranks_with_micro_batches_give_the_h_of_the_whole_batch(model: Replica, tokens: Tensor) -> None:
    whole = refreshed(model, [tokens])
    names: dict[str, Any] = {}
    exec(code("def refresh("), names)
    ranks = [Captured(copy.deepcopy(model)) for _ in range(2)]
    for rank, (one, share) in enumerate(zip(ranks, tokens.chunk(2), strict=True)):
        names["refresh"](one.model, one, list(share.split(1)), 1, rank, len(ranks))
        assert one.num_predictions == tokens.numel()
        assert one.model.unsynchronized == 1, "all micro-batches but the last"
    averaged = [(a + b) / 2 for a, b in zip(*(one.grads for one in ranks), strict=True)]  # as DDP does
    torch.testing.assert_close([0.1 * tokens.numel() * grad.square() for grad in averaged], [h.double() for h in whole])
