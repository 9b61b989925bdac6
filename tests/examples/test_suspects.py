"""The optimizers of the suspects against Sophia and AdamW on the same gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from examples.suspects import SophiaOnKind, SophiaWithoutStaleRows
from models import GPT2, GPT2Config, parameter_kind
from sophia import Sophia
from training.optimizers import parameter_groups

SHAPE = GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=16, block_size=12)
SOPHIA: dict[str, Any] = {"betas": (0.9, 0.98), "gamma": 0.02, "eps": 1e-6, "hessian_interval": 2}
ADAMW: dict[str, Any] = {"adamw_lr": 3e-3, "adamw_betas": (0.8, 0.95), "adamw_weight_decay": 0.3}


def named(seed: int = 0) -> dict[str, Tensor]:
    model = GPT2(SHAPE)
    model.initialize(seed)
    return dict(model.named_parameters())


def on_kind(parameters: dict[str, Tensor], kind: str) -> SophiaOnKind:
    groups = parameter_groups(parameters, 0.2, 1e-3, embedding_lr_ratio=4.0)
    return SophiaOnKind(groups, 1e-3, 0.2, kind=kind, **SOPHIA, **ADAMW, adamw_embedding_lr_ratio=8.0)


def train(optimizer: Any, parameters: dict[str, Tensor], steps: range, *, curvature: bool = True) -> None:
    """Steps on gradients that are drawn, with a refresh before every second one."""
    for step in steps:
        for name, parameter in parameters.items():
            noise = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
            parameter.grad = torch.randn(parameter.shape, generator=noise) / 100
        if curvature and step % 2 == 0:
            optimizer.update_hessian(num_predictions=50)
        optimizer.step()


@pytest.mark.parametrize("kind", ["embedding", "attention", "mlp"])
def test_one_kind_has_sophias_curve_and_the_others_adamws(kind: str) -> None:
    mixed, of_sophia, of_adamw = named(), named(), named()
    train(on_kind(mixed, kind), mixed, range(6))
    sophia = Sophia(parameter_groups(of_sophia, 0.2, 1e-3, embedding_lr_ratio=4.0), **SOPHIA)
    train(sophia, of_sophia, range(6))
    groups = parameter_groups(of_adamw, ADAMW["adamw_weight_decay"], ADAMW["adamw_lr"], embedding_lr_ratio=8.0)
    train(AdamW(groups, betas=ADAMW["adamw_betas"]), of_adamw, range(6), curvature=False)
    for name, parameter in mixed.items():
        expected = (of_sophia if parameter_kind(name) == kind else of_adamw)[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_a_loaded_state_continues_both_curves() -> None:
    whole, halves = named(), named()
    train(on_kind(whole, "mlp"), whole, range(6))
    first = on_kind(halves, "mlp")
    train(first, halves, range(3))
    second = on_kind(halves, "mlp")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, halves, range(3, 6))
    for name, parameter in whole.items():
        assert torch.equal(parameter, halves[name]), name


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='head': no matrix has this kind; expected embedding, attention or mlp"):
        on_kind(named(), "head")


@pytest.mark.parametrize("clip", [None, 4.0])
def test_rows_whose_momentum_is_twice_their_gradient_only_decay(clip: float | None) -> None:
    rows, matrix = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [rows, matrix], "names": ["token_embedding.weight", "blocks.0.mlp.up.weight"]}]
    optimizer = SophiaWithoutStaleRows(groups, lr=0.1, betas=(0.9, 0.9), weight_decay=0.5, hessian_interval=None)
    optimizer.grad_scale = None if clip is None else torch.tensor(clip)
    scale = clip or 1.0
    rows.grad, matrix.grad = scale * torch.ones(3, 2), scale * torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(rows, torch.full((3, 2), -0.1))
    # Momentum is 0.1 now. A gradient of g makes it 0.09 + 0.1 g, which is more than 2 g below 0.0474.
    rows.grad = scale * torch.tensor([[1.0, 1.0], [0.048, 0.048], [0.047, 0.047]])
    matrix.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(rows, torch.tensor([[-0.195, -0.195], [-0.195, -0.195], [-0.095, -0.095]]))
    assert torch.allclose(matrix, torch.full((2, 2), -0.195))  # only embeddings have stale rows
