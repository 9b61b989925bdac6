"""The loop on a CUDA device that is not there: what a GPU would refuse, or would make wait, is found without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import Batch
from models import head
from sophia import SophiaG
from tests.gpu.fake_cuda import DEVICE, Fault, fake_cuda, watched
from training.architectures import build_model
from training.compose import compose
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.loop import Run, TrainingState, train
from training.optimizers import build_optimizers
from training.recording.ledger import Ledger
from training.strategies import build_strategy
from training.strategies.ddp import DDP
from training.weights import InitialWeights

#: Every place where the host waits for the device, and what the fake device has it read there.
WAITS = {
    # The numbers of a step or a refresh, one step late: by then the next step is queued.
    "training/loop.py Reporter._write_next": 0.0,
    "training/loop.py Reporter._write_step": 0.0,
    "training/loop.py Reporter._write_refresh": 0.0,
    "training/recording/diagnostics.py describe_curvature": 1.0,
    "sophia/diagnostics.py curvature_summary": 1.0,
    # The validation loss, once per evaluation.
    "training/evaluation.py validation_loss": 1.0,
}
#: An optimizer without torch's AMP protocol (Muon, optimizers from elsewhere) cannot skip a step on the device.
WAITS_WITHOUT_PROTOCOL = WAITS | {"training/strategies/gradients.py clip_and_step": 0.0}

SETTINGS = ["name=fake", "model=gpt2_nano", "model.n_layer=1", "train.global_batch_size=8", "train.sequence_length=16"]
SETTINGS += ["train.micro_batch_size=4", "train.steps=2", "train.compile=false", "eval.interval=2", "tracker=none"]
SETTINGS += ["train.precision=bf16", "model.attention_layer_scaling=true", "model.dropout=0.1"]
SETTINGS += ["checkpoint.interval=null", "guards.weights_interval=null"]
REFRESH = ["optimizer.hessian_interval=2", "optimizer.batch_fraction=0.4"]

HOST = np.zeros(8, np.float32)
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

ARMS = {
    "AdamW": ["optimizer=adamw"],
    "Lion": ["optimizer=lion"],
    "Muon": ["optimizer=muon"],
    "AdaHessian": ["optimizer=adahessian", *REFRESH],
    "GNB within the training forward": ["optimizer=sophiag", *REFRESH],
    "GNB with its own forward": ["optimizer=sophiag", "train.shared_forward=false", *REFRESH],
    "Hutchinson": ["optimizer=sophiah", *REFRESH],
    "central differences": ["optimizer=sophiah", "optimizer.estimator=hutchinson_differences", *REFRESH],
}


class Tokens:
    """Stands in for batches and validation windows: eight sequences of token 0, padded in validation."""

    def __init__(self, padding: int = 0) -> None:
        tokens = np.zeros((8, 16), np.int64)
        targets = tokens.copy()
        targets[len(targets) - padding :] = -100
        self._batch = Batch(tokens, targets, np.arange(8))

    def prefetch(self, first: int, last: int) -> nullcontext[Iterator[Batch]]:
        return nullcontext(iter([self._batch] * (last - first + 1)))

    def forwards(self, size: int) -> int:
        return 2

    def batches(self, size: int) -> Iterator[Batch]:
        return iter([self._batch] * 2)


def run(*overrides: str, waits: dict[str, float] = WAITS, evaluated: bool = False) -> tuple[list[str], set[str]]:
    """Train for two steps. Returns the kinds of the record's lines but events, and where the host waited."""
    config = compose([*SETTINGS, *overrides])
    distributed = Distributed(0, 0, 1, DEVICE)
    kinds: list[str] = []
    model = build_model(config.model, 61)
    weights = InitialWeights(config.model, model, config.seeds.model)
    with fake_cuda():
        strategy = build_strategy(config, distributed)
        strategy.prepare(model, weights, build_optimizers(config.optimizer, compile_step=False))
        tokens: Any = Tokens()
        windows: Any = Tokens(padding=3)
        run = Run(
            config=config,
            strategy=strategy,
            batches=tokens,
            validation=windows,
            curvature=CurvaturePass.of(config.optimizer, 0, 8, 4, shared_forward=config.train.shared_forward),
            ledger=Ledger(DEVICE),
            micro_batch_size=4,
            eval_micro_batch_size=8,
            parameters=0,
            flops=model.flops(config.train.sequence_length),
            write=lambda line: kinds.append(line["kind"]),
            message=lambda line: None,
            save=lambda state: None,
            stop_requested=lambda: False,
            state=TrainingState(evaluated_step=0 if evaluated else -1),
        )
        with watched(waits) as watch:
            assert train(run) == "completed"
    return [kind for kind in kinds if kind != "event"], watch.waited


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_on_cuda_waits_for_the_device_only_where_it_is_listed(arm: str) -> None:
    waits = WAITS_WITHOUT_PROTOCOL if arm == "Muon" else WAITS
    kinds, waited = run(*ARMS[arm], waits=waits)
    refreshes = "optimizer.hessian_interval=2" in ARMS[arm]
    refreshed = ["hessian"] if refreshes else []
    assert kinds == ["eval", *refreshed, "train", "train", "eval"]
    without = {place for place in waits if not refreshes and ("refresh" in place or "curvature" in place)}
    assert waited == waits.keys() - without


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_optimizer_of_parameters_on_the_cpu_waits_for_what_the_device_computes() -> None:
    """Offloaded optimizers: N, the scale and the flag of an overflow come from the device."""
    waits = {"sophia/kernels.py scalar_on": 0.0}
    with fake_cuda():
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        optimizer: Any = SophiaG([parameter], compile=False)
        one = torch.ones((), device=DEVICE)
        with watched(waits) as watch:
            optimizer.found_inf = one
            optimizer.update_hessian(num_predictions=one.long())
            optimizer.grad_scale = one
            optimizer.step()
    assert watch.waited == waits.keys()


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_run_uses_no_operator_that_torch_refuses() -> None:
    kinds, _ = run(*ARMS["GNB within the training forward"])
    assert "hessian" in kinds


@pytest.mark.usefixtures("deterministic")
def test_a_planted_operator_without_a_deterministic_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "running_sum", lambda values: values.cumsum(dim=-1))
    with pytest.raises(Fault, match="no deterministic kernel"):
        run(*ARMS["GNB within the training forward"], evaluated=True)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda loss: loss.item(), "waits for the device"),
        (lambda loss: bool(loss > 0), "waits for the device"),
        (lambda loss: loss.cpu(), "waits for the device"),
        (lambda loss: torch.tensor(1.0, device=loss.device), "waits for the device"),
        (lambda loss: loss.expand(3).nonzero(), "waits for the device"),
        (lambda loss: torch.equal(loss, loss), "waits for the device"),
        (lambda loss: torch.from_numpy(HOST).to(loss.device, non_blocking=True), "waits for the device"),
        (lambda loss: loss.to("cpu", non_blocking=True), "before it has arrived"),
        (lambda loss: loss + torch.from_numpy(HOST), "on the same device"),
        (lambda loss: torch.zeros(8) + 1, "computes on the CPU"),
        (lambda loss: loss.expand(1000).double(), "float64"),
        (lambda loss: CPU_ATTENTION(*[loss.expand(1, 1, 8, 8)] * 3), "no CUDA kernel"),
    ],
    ids=[
        "item",
        "bool",
        "cpu",
        "tensor",
        "nonzero",
        "equal",
        "pageable",
        "early",
        "mixed",
        "on the CPU",
        "float64",
        "CPU kernel",
    ],
)
def test_a_planted_fault_is_found(plant: Callable[[Tensor], Any], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = DDP.backward

    def planted(self: DDP, loss: Tensor, **named: bool) -> None:
        plant(loss.detach())
        backward(self, loss, **named)

    monkeypatch.setattr(DDP, "backward", planted)
    with pytest.raises((Fault, RuntimeError), match=found):
        run("optimizer=adamw", evaluated=True)
