"""Planned memory: against calculations by hand, against real optimizers, and larger or smaller as expected."""

import functools

import pytest
import torch

from models import GPT2, GPT2Config
from planning.memory import Memory, Phase, planned_memory
from training.compose import compose
from training.config import RunConfig
from training.optimizers import build_optimizers
from training.strategies.gradients import update_hessian

BASE = ("model=gpt2_nano", "train.sequence_length=64", "train.global_batch_size=16", "train.micro_batch_size=4")


@functools.cache
def config(*overrides: str) -> RunConfig:
    return compose([*BASE, "train.precision=bf16", "train.compile=false", *overrides])


def shape(n_layer: int = 2, **others: bool) -> GPT2Config:
    return GPT2Config(vocab_size=512, n_layer=n_layer, n_head=2, n_embd=64, block_size=256, **others)


#: Embeddings of 512 tokens and 256 positions; blocks of 12 d² and two norms; a final norm.
PARAMETERS = (512 + 256) * 64 + 2 * (12 * 64 * 64 + 2 * 64) + 64


def memory(
    *overrides: str, ranks: int = 1, phase: Phase = "training", model: GPT2Config | None = None, device: str = "cpu"
) -> Memory:
    return planned_memory(config(*overrides), model or shape(), ranks, device)[phase]  # type: ignore[arg-type]


def total(*overrides: str, ranks: int = 1, phase: Phase = "training", model: GPT2Config | None = None) -> int:
    return sum(memory(*overrides, ranks=ranks, phase=phase, model=model).values())


def test_weights_gradients_and_state_are_four_bytes_a_number() -> None:
    update = memory("optimizer=adamw", phase="update")
    expected = {"weights": 1, "gradients": 1, "optimizer": 2, "curvature": 0, "activations": 0, "head": 0}
    assert update == {kind: 4 * PARAMETERS * n for kind, n in expected.items()} | {"engine": 0, "workspace": 0}
    sophia = memory("optimizer=sophiag", phase="update")
    assert (sophia["optimizer"], sophia["curvature"]) == (4 * PARAMETERS, 4 * PARAMETERS)


@pytest.mark.parametrize("name", ["adamw", "lion", "signum", "sophiag", "sophiah", "adahessian", "muon"])
@pytest.mark.parametrize("bias", [False, True])
def test_planned_state_is_what_the_optimizer_really_keeps(name: str, bias: bool) -> None:
    run, model = config(f"optimizer={name}"), GPT2(shape(bias=bias))
    parameters = dict(model.named_parameters())
    optimizers = build_optimizers(run.optimizer, compile_step=False)(parameters)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    if hasattr(run.optimizer, "estimator"):
        estimates = [torch.zeros_like(parameter) for parameter in parameters.values()]
        update_hessian(optimizers, parameters.values(), None, estimates)
    for optimizer in optimizers:
        optimizer.step()
    kept = [state.items() for optimizer in optimizers for state in optimizer.state.values()]
    sizes = [(key, t.nbytes) for items in kept for key, t in items if isinstance(t, torch.Tensor) and t.dim() > 0]
    update = planned_memory(run, shape(bias=bias), 1, "cpu")["update"]
    assert update["curvature"] == sum(size for key, size in sizes if key == "hessian")
    assert update["optimizer"] == sum(size for key, size in sizes if key != "hessian")


@pytest.mark.parametrize(
    ("precision", "compiled", "bytes_of_d"),
    [("fp32", "false", 64), ("bf16", "false", 36), ("fp32", "true", 40), ("bf16", "true", 26)],
)
def test_a_layer_keeps_so_many_bytes_of_the_width_for_each_token(
    precision: str, compiled: str, bytes_of_d: int
) -> None:
    setting = (f"train.precision={precision}", f"train.compile={compiled}", "optimizer=adamw")
    three, two = (memory(*setting, model=shape(n)) for n in (3, 2))
    of_token = bytes_of_d * 64 + 4 * 2 + (16 if compiled == "false" else 0)  # attention's normalizer; norms' statistics
    assert three["activations"] - two["activations"] == 4 * 64 * of_token
    copies = 2 * (12 * 64 * 64 + 2 * 64) if precision == "bf16" else 0
    assert three["engine"] - two["engine"] == copies


def test_the_head_holds_a_chunk_of_logits_and_both_gradients() -> None:
    head = memory("train.precision=fp32", "optimizer=adamw")["head"]
    tokens = 4 * 64  # one chunk: no gradient yet where slices of logits are widened, and those are the smaller part
    gradients, logits, of_rows = 4 * (tokens + 512) * 64, 4 * tokens * 512, 2 * 4 * tokens * 64
    assert head == gradients + logits + max(of_rows, 2 * 4 * 256 * 512 - 4 * 512 * 64)


def test_fsdp_divides_weights_and_state_by_the_ranks() -> None:
    one, four = (memory("strategy=fsdp", "optimizer=sophiag", ranks=ranks) for ranks in (1, 4))
    for kind in ("weights", "optimizer", "curvature"):
        assert four[kind] == one[kind] // 4  # type: ignore[literal-required]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_more_at_each_stage(stage: int) -> None:
    update = memory("strategy=deepspeed", f"strategy.zero_stage={stage}", "optimizer=sophiag", ranks=4, phase="update")
    shard = PARAMETERS  # a quarter of float32
    forward = {1: 4 * PARAMETERS, 2: 2 * PARAMETERS, 3: PARAMETERS // 2}[stage]
    assert update["weights"] == shard + forward
    assert update["optimizer"] == update["curvature"] == shard
    assert update["gradients"] == (4 * PARAMETERS if stage == 1 else shard) + shard


def test_offloaded_state_is_not_on_the_device() -> None:
    zero = ("strategy=deepspeed", "strategy.zero_stage=2", "optimizer=sophiag")
    offloaded = memory(*zero, "strategy.offload_optimizer=true", ranks=4)
    assert offloaded["optimizer"] == offloaded["curvature"] == 0


def test_recomputation_and_smaller_micro_batches_need_less() -> None:
    deep = shape(12)
    plain = total("strategy=fsdp", ranks=4, model=deep)
    assert total("strategy=fsdp", "strategy.activation_checkpointing=true", ranks=4, model=deep) < plain
    assert total("strategy=fsdp", "train.micro_batch_size=1", ranks=4, model=deep) < plain


def test_ddp_holds_earlier_gradients_beside_its_buckets() -> None:
    whole, accumulated = (memory(f"train.micro_batch_size={size}", ranks=4) for size in (4, 2))
    assert (whole["gradients"], accumulated["gradients"]) == (4 * PARAMETERS, 8 * PARAMETERS)


def test_a_refresh_of_several_micro_batches_holds_the_gradients_of_both_losses() -> None:
    refresh = memory("optimizer=sophiag", "train.micro_batch_size=2", phase="curvature")
    assert refresh["gradients"] >= 8 * PARAMETERS


def test_exact_hutchinson_needs_more_than_training_and_central_differences_do_not() -> None:
    hutchinson = ("optimizer=sophiah", "optimizer.batch_fraction=0.5")
    assert total(*hutchinson, phase="curvature") > 1.5 * total(*hutchinson)
    differences = (*hutchinson, "optimizer.estimator=hutchinson_differences", "train.precision=fp32")
    assert total(*differences, phase="curvature") < 1.5 * total(*differences)


def test_an_uncompiled_update_on_a_gpu_holds_five_numbers_for_each_parameter() -> None:
    update = memory("optimizer=sophiag", phase="update", device="cuda")
    assert update["workspace"] == 5 * 4 * PARAMETERS
    assert memory("optimizer=adamw", phase="update", device="cuda")["workspace"] == 0
