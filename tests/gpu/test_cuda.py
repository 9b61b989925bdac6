"""What depends on the device, on CUDA: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from sophia import Lion, Sophia, random
from training.launching.command import main
from training.records import RunRecord

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

TINY = ["model=gpt2_nano", "tokenizer=bpe", "tokenizer.vocab_size=512", "train.sequence_length=64", "eval.tokens=2000"]
TINY += ["train.steps=22", "train.global_batch_size=8", "eval.interval=11", "checkpoint.interval=11"]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in RunRecord.open(directory).metrics("train")]


def run(tmp_path: Path, name: str, *overrides: str) -> list[float]:
    arguments = [*TINY, f"output_dir={tmp_path}", f"data.directory={tmp_path}/tokens", f"name={name}", *overrides]
    assert main(arguments) == 0
    return losses(tmp_path / name)


def test_random_numbers_are_those_of_the_cpu() -> None:
    positions = torch.arange(10_000)
    assert torch.equal(random.uniforms(3, 5, positions), random.uniforms(3, 5, positions.cuda()).cpu())
    on_gpu = random.normals(3, 5, "w", 7, 5000, "cuda").cpu()
    torch.testing.assert_close(on_gpu, random.normals(3, 5, "w", 7, 5000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["adamw", "lion", "sophiag", "sophiah", "muon", "signum"])
def test_every_optimizer_has_the_curve_of_the_cpu(tmp_path: Path, arm: str) -> None:
    common = [f"optimizer={arm}", "train.precision=fp32", "train.compile=false"]
    on_gpu = run(tmp_path, "gpu", *common, "train.device=cuda")
    on_cpu = run(tmp_path, "cpu", *common, "train.device=cpu")
    assert on_gpu == pytest.approx(on_cpu, abs=2e-3)


@pytest.mark.parametrize("arm", ["adamw", "sophiag"])
def test_compiled_bf16_stays_near_fp32(tmp_path: Path, arm: str) -> None:
    fast = run(tmp_path, "fast", f"optimizer={arm}", "train.precision=bf16", "train.compile=true")
    plain = run(tmp_path, "plain", f"optimizer={arm}", "train.precision=fp32", "train.compile=false")
    assert fast == pytest.approx(plain, abs=5e-2)


def test_a_resumed_run_has_the_same_bits_when_deterministic(tmp_path: Path) -> None:
    common = ["optimizer=sophiag", "train.deterministic=true", "train.compile=false"]
    whole = run(tmp_path, "whole", *common)
    first = tmp_path / "whole" / "checkpoints" / "step-00000011"
    assert first.is_dir()
    assert run(tmp_path, "again", *common, f"resume={first}") == whole[11:]


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
