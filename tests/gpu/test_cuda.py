"""What depends on the device, on CUDA: `make test-gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia import Lion, Sophia, random
from tests.training.runs import prepare_corpus
from training import loop
from training.curvature import CurvaturePass
from training.launching.command import main
from training.records import RunRecord
from training.strategies.ddp import DDP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

TINY = ["model=gpt2_nano", "train.sequence_length=64", "eval.tokens=2000", "tracker=none"]
TINY += ["train.steps=22", "train.global_batch_size=8", "eval.interval=11", "checkpoint.interval=11"]

Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: list[str]) -> Train:
    def train(name: str, *overrides: str) -> list[float]:
        assert main([*TINY, *corpus, f"output_dir={tmp_path}", f"name={name}", *overrides]) == 0
        return losses(tmp_path / name)

    return train


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in RunRecord.open(directory).metrics("train")]


def test_random_numbers_are_those_of_the_cpu() -> None:
    positions = torch.arange(10_000)
    assert torch.equal(random.uniforms(3, 5, positions), random.uniforms(3, 5, positions.cuda()).cpu())
    on_gpu = random.normals(3, 5, "w", 7, 5000, "cuda").cpu()
    torch.testing.assert_close(on_gpu, random.normals(3, 5, "w", 7, 5000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["adamw", "lion", "sophiag", "sophiah", "muon", "signum"])
def test_every_optimizer_has_the_curve_of_the_cpu(run: Train, arm: str) -> None:
    common = [f"optimizer={arm}", "train.precision=fp32", "train.compile=false"]
    on_gpu = run("gpu", *common, "train.device=cuda")
    on_cpu = run("cpu", *common, "train.device=cpu")
    assert on_gpu == pytest.approx(on_cpu, abs=2e-3)


@pytest.mark.parametrize("arm", ["adamw", "sophiag"])
def test_compiled_bf16_stays_near_fp32(run: Train, arm: str) -> None:
    fast = run("fast", f"optimizer={arm}", "train.precision=bf16", "train.compile=true")
    plain = run("plain", f"optimizer={arm}", "train.precision=fp32", "train.compile=false")
    assert fast == pytest.approx(plain, abs=5e-2)


def test_a_resumed_run_has_the_same_bits_when_deterministic(run: Train, tmp_path: Path) -> None:
    common = ["optimizer=sophiag", "train.deterministic=true", "train.compile=false"]
    whole = run("whole", *common)
    first = tmp_path / "whole" / "checkpoints" / "step-00000011"
    assert first.is_dir()
    assert run("again", *common, f"resume={first}") == whole[11:]


@pytest.mark.parametrize("arm", ["adamw", "lion", "sophiag", "sophiah"])
def test_no_step_and_no_curvature_pass_of_a_run_waits_for_the_device(
    run: Train, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tests/gpu/test_fake_cuda.py finds without a GPU; here torch itself raises."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **named: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments, **named)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return checked

    parts = [(loop, "forward_backward"), (loop, "forward_backward_refresh"), (loop.Reporter, "refresh")]
    for owner, name in [*parts, (DDP, "step"), (CurvaturePass, "run")]:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    assert len(run("run", f"optimizer={arm}", "train.compile=false", "train.device=cuda")) == 22


@pytest.mark.parametrize("build", [lambda p: Sophia(p, hessian_interval=None), Lion])
def test_the_step_never_waits_for_the_device(build) -> None:
    parameters = [torch.nn.Parameter(torch.randn(2048, 1024, device="cuda")) for _ in range(3)]
    optimizer = build(parameters)
    for _ in range(2):  # the first step creates state and compiles
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        torch.cuda.set_sync_debug_mode("error" if optimizer.state else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
