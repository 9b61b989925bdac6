"""What a refresh records about h and m is what they hold, over all shards, by kind of parameter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import LanguageModel
from training.recording.diagnostics import curvature_sums_by_kind, describe_curvature

STATE = {  # name -> h, m
    "token_embedding.weight": (torch.tensor([[3e-14, 2e-12], [0.0, -5.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])),
    "blocks.0.attention.qkv.weight": (torch.tensor([1.0, 9.99, 1e-1]), torch.zeros(3)),
    "blocks.0.mlp.up.bias": (torch.tensor([20.0, -20.0]), torch.tensor([0.5, 0.0])),
    "blocks.1.mlp_norm.weight": (torch.tensor([9e3, 2e4, 1e30]), torch.ones(3)),
    "blocks.1.mlp.down.weight": (torch.tensor([30.0]), torch.tensor([-2.0])),
}


class Strategy:
    """A strategy that holds STATE; another rank holds the same, as its shards or as its copy."""

    device = torch.device("cpu")
    model = LanguageModel(vocab_size=2, block_size=2)

    def __init__(self, *, shards_optimizer_state: bool) -> None:
        self.shards_optimizer_state = shards_optimizer_state
        self.distributed = SimpleNamespace(all_reduce=lambda sums: sums.mul_(2))

    def curvature_state(self) -> list[tuple[str, Tensor, Tensor]]:
        return [(name, h, m) for name, (h, m) in STATE.items()]


def described(*, sharded: bool) -> dict[str, Any]:
    strategy: Any = Strategy(shards_optimizer_state=sharded)
    return describe_curvature(curvature_sums_by_kind(strategy), strategy.model.kinds)


def test_norms_and_shares_are_those_of_the_kinds_and_of_all() -> None:
    found = described(sharded=False)
    kinds = found["by_kind"]
    assert found["decades"] == list(range(-12, 5))
    assert list(kinds) == ["embedding", "attention", "mlp", "norm"]
    assert kinds["embedding"]["positive_fraction"] == 0.5
    assert kinds["embedding"]["hessian_norm"] == pytest.approx(5)
    assert kinds["embedding"]["momentum_norm"] == pytest.approx(14**0.5)
    assert kinds["attention"]["momentum_norm"] == 0
    assert kinds["mlp"]["positive_fraction"] == pytest.approx(2 / 3)
    assert kinds["mlp"]["hessian_norm"] == pytest.approx(1700**0.5)
    assert found["positive_fraction"] == pytest.approx(10 / 13)
    assert found["momentum_norm"] == pytest.approx((14 + 4.25 + 3) ** 0.5)
    assert sum(sum(kind["histogram"]) for kind in kinds.values()) == sum(found["histogram"]) == 10


def test_shards_add_up_and_copies_do_not() -> None:
    copy, shards = described(sharded=False), described(sharded=True)
    assert shards["histogram"] == [2 * count for count in copy["histogram"]]
    assert shards["hessian_norm"] == pytest.approx(2**0.5 * copy["hessian_norm"])
    assert shards["positive_fraction"] == copy["positive_fraction"]
