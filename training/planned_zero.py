"""What DeepSpeed's ZeRO makes of a model's weights, gradients and state, in bytes on each rank.

The engine itself cannot run on fake tensors. Its layout (DeepSpeed 0.19, runtime/zero) is simple enough to add up:

    stage                    1                       2                        3
    weights of the forward   whole                   whole                    shard, and what is gathered of it
    float32 partitions       shard                   shard                    shard
    gradients                whole, float32          shard, float32           shard, float32
    optimizer state          shard                   shard                    shard
    reduction bucket         from the first          in backward passes       always
                             backward to the update

The bucket has 5e8 elements whatever the model's size: 1 GB in bf16, 2 GB in float32.
"""

import torch
from torch import nn

from models import GPT2, GPT2Config
from models.flops import parameter_count
from training.config import DeepSpeedConfig, RunConfig
from training.memory_trace import Kind, Memory
from training.strategies.communication import BFLOAT16, FLOAT32
from training.strategies.precision import keep_norms_float32, keep_residual_float32

#: DeepSpeed's defaults, in elements: reduce_bucket_size, and how many gathered weights stay because they are needed
#: again so soon (stage3_max_reuse_distance, stage3_max_live_parameters).
REDUCTION_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000


def has_bf16_weights(config: RunConfig) -> bool:
    """Whether the forward's weights are bf16, beside float32 partitions (training/strategies/deepspeed.py)."""
    zero = config.strategy
    exact = getattr(config.optimizer, "estimator", None) == "hutchinson_differences"
    return isinstance(zero, DeepSpeedConfig) and config.train.precision == "bf16" and zero.zero_stage > 1 and not exact


def narrow(model: GPT2) -> None:
    """The model as the engine has it with bf16 weights."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16)))
    keep_norms_float32(model)
    keep_residual_float32(model)


def reduction_bucket_bytes(config: RunConfig, stage: int) -> int:
    """At stage 2 in the precision of the weights, else float32."""
    return REDUCTION_BUCKET * (BFLOAT16 if stage == 2 and has_bf16_weights(config) else FLOAT32)


def engine_memory(
    config: RunConfig,
    zero: DeepSpeedConfig,
    shape: GPT2Config,
    world_size: int,
    state: Memory,  # optimizer and curvature state of the whole model, float32
    part: str,  # of the step: "training", "training backward", "curvature fold", "update", …
    traced: Memory,  # its peak, of a whole model
) -> Memory:
    """A part's peak with the engine's own in the place of the traced model's weights and state."""
    size = parameter_count(shape)
    stage, weight_bytes = zero.zero_stage, BFLOAT16 if has_bf16_weights(config) else FLOAT32
    shard = -(-FLOAT32 * size // world_size)
    on_device = 0 if zero.offload_optimizer else 1
    own: dict[Kind, int] = {
        "weights": (weight_bytes * size // (world_size if stage == 3 else 1)) + on_device * shard,
        "gradients": FLOAT32 * size if stage == 1 else shard,
        "optimizer": on_device * state["optimizer"] // world_size,
        "curvature": on_device * state["curvature"] // world_size,
    }
    gathered = weight_bytes * min(size, LIVE_WEIGHTS) if stage == 3 else 0
    bucket = reduction_bucket_bytes(config, stage)
    if part.endswith(("update", "fold")):  # the engine's step, which flattens the gradients' partition
        own["gradients"] += shard
        own["workspace"] = traced["workspace"] // world_size
        return _with(traced, own, bucket if stage == 3 else 0)
    in_use = stage != 2 or part.endswith("backward")
    return _with(traced, own, gathered + (bucket if in_use else 0))


def _with(traced: Memory, own: dict[Kind, int], engine: int) -> Memory:
    return {**traced, **own, "engine": traced["engine"] + engine}
