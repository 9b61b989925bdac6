"""The memory of a step on each device, by arithmetic that can be checked by hand.

benchmarks/memory.py compares it with real steps (results/planner/memory.md). A step's memory rises and falls layer by layer,
so its peak is at one of a few moments of a forward and backward pass:

    head    the forward is done: all layers' activations are kept, and the loss head has a chunk of logits
    last    the backward of the last block: all activations, the temporaries of a block, the head's gradient
    first   the backward of the first block and the embeddings: few activations, all gradients

or in the update, or when an estimate is folded into h. N is the tokens of a micro-batch, d the width, L the layers, T the
sequence length, V the padded vocabulary, P all parameters, W the ranks and e the bytes of an activation in matrix products:
2 under bf16, else 4. The residual stream, norms, gradients and state are float32.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch

from models import GPT2, GPT2Config
from models.head import EAGER_ROWS, rows_per_chunk
from training.config import (
    ConfigurationError,
    DDPConfig,
    DeepSpeedConfig,
    ExternalConfig,
    FSDPConfig,
    MuonConfig,
    OptimizerConfig,
    RunConfig,
    micro_batch_size,
)
from training.curvature import CurvaturePass
from training.optimizers import build_optimizers
from training.strategies.communication import BFLOAT16, FLOAT32
from training.strategies.state import state_tensors

Kind = Literal["weights", "gradients", "optimizer", "curvature", "activations", "head", "engine", "workspace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Phase = Literal["curvature", "training", "update"]
PHASES: tuple[Phase, ...] = get_args(Phase)
DeviceType = Literal["cpu", "cuda"]
Memory = dict[Kind, int]  # bytes by kind
Bytes = Counter[Kind]  # the same, with addition

#: Float32 numbers of optimizer state per parameter, and of h among them. Muon keeps one per element of the blocks' matrices;
#: optimizers from elsewhere are measured.
STATE = {"adamw": (2, 0), "lion": (1, 0), "signum": (1, 1), "sophiag": (1, 1), "sophiah": (1, 1), "adahessian": (1, 1)}
#: Temporary float32 numbers per parameter of uncompiled `sophia` optimizers on a GPU, in an update and when folding an
#: estimate into h: each foreach operation runs over all tensors at once (sophia/kernels.py).
FOREACH_UPDATE, FOREACH_FOLD = 5, 4
#: DeepSpeed's defaults, in elements: reduce_bucket_size, and the gathered weights that it keeps for reuse
#: (stage3_max_reuse_distance, stage3_max_live_parameters).
REDUCTION_BUCKET = 500_000_000
LIVE_WEIGHTS = 1_000_000_000


def planned_memory(config: RunConfig, shape: GPT2Config, world_size: int, device: DeviceType) -> dict[Phase, Memory]:
    """Return the peak memory of each phase of a step on each device, in bytes by kind.

    Args:
        config: the run's configuration, with `auto` resolved.
        world_size: number of ranks, one per device.

    Raises:
        ConfigurationError: the batch is not divisible by the ranks.
    """
    step = _Step(config, shape, world_size, device)
    moments: dict[Phase, list[Bytes]] = {
        "curvature": list(step.curvature()),
        "training": list(step.training()),
        "update": [step.update()],
    }
    return {phase: _highest(candidates) for phase, candidates in moments.items() if candidates}


def _highest(moments: list[Bytes]) -> Memory:
    highest = max(moments, key=lambda moment: moment.total())
    return {kind: highest[kind] for kind in KINDS}


def bytes_of(**by_kind: int) -> Bytes:
    return Counter(cast(Memory, by_kind))


def curvature_of(config: RunConfig, world_size: int) -> CurvaturePass | None:
    """Return the run's curvature pass, which shares the training forward if the run would."""
    micro, shared = micro_batch_size(config, world_size), isinstance(config.strategy, DDPConfig)
    batch, shared = config.train.global_batch_size, shared and config.train.shared_forward
    return CurvaturePass.of(config.optimizer, 0, batch, micro, shared_forward=shared)


def reduction_bucket_bytes(config: RunConfig) -> int:
    """Return the size of DeepSpeed's gradient-reduction buffers, independent of the model; 0 for other strategies."""
    if not isinstance(config.strategy, DeepSpeedConfig):
        return 0
    narrow = config.strategy.zero_stage == 2 and engine_has_bf16_weights(config)
    return REDUCTION_BUCKET * (BFLOAT16 if narrow else FLOAT32)


def engine_has_bf16_weights(config: RunConfig) -> bool:
    """Return whether FSDP2 gathers the blocks, or ZeRO keeps the forward's weights, in bf16 (training/strategies)."""
    exact = config.estimator == "hutchinson_differences"
    stage = getattr(config.strategy, "zero_stage", 0)
    return config.train.precision == "bf16" and not exact and (stage > 1 or isinstance(config.strategy, FSDPConfig))


def _state_sizes(optimizer: OptimizerConfig, shape: GPT2Config) -> tuple[int, int]:
    """Return the float32 numbers of the whole model's optimizer state, and those of h."""
    size = shape.parameter_count()
    if isinstance(optimizer, ExternalConfig):
        return round(measured_state(optimizer.model_dump_json(), shape) * size), 0
    numbers, of_curvature = STATE.get(optimizer.name, STATE["adamw"])
    matrices = shape.n_layer * 12 * shape.n_embd**2 if isinstance(optimizer, MuonConfig) else 0
    return numbers * size - matrices, of_curvature * size


@functools.lru_cache(maxsize=64)
def measured_state(settings: str, shape: GPT2Config) -> float:
    """Return the float32 numbers of state per parameter, found by stepping the optimizer on stand-ins for the parameters.

    They have the real shapes but no memory. An optimizer that reads values back cannot step these: it gets a small model,
    whose matrices keep their aspect ratio. If that fails too, it is assumed to keep as many numbers as AdamW.

    Args:
        settings: an ExternalConfig as JSON, which is hashable.

    Raises:
        ConfigurationError: the factory cannot be imported or called.
    """
    optimizer = ExternalConfig.model_validate_json(settings)
    width, scale = 16, 16 / shape.n_embd
    small = GPT2Config(
        vocab_size=max(2, round(shape.padded_vocab_size * scale)),
        n_layer=1,
        n_head=1,
        n_embd=width,
        block_size=max(2, round(shape.block_size * scale)),
        bias=shape.bias,
    )
    for device, model in (("meta", shape), ("cpu", small)):
        with torch.device(device):
            parameters = dict(GPT2(model).named_parameters())
        try:
            optimizers = build_optimizers(optimizer, compile_step=False)(parameters)
            for _ in range(2):  # some create state in the second step
                for parameter in parameters.values():
                    parameter.grad = torch.full_like(parameter, 1e-3)
                optimizers[0].step()
        except ConfigurationError:
            if device == "cpu":
                raise
            continue
        except Exception:
            continue
        kept = (value for name, value in state_tensors(parameters, optimizers) if name.startswith("optimizer."))
        bytes_kept = sum(value.nbytes for value in kept if value.numel() > 1)
        return bytes_kept / FLOAT32 / sum(parameter.numel() for parameter in parameters.values())
    return STATE["adamw"][0]


@dataclass(frozen=True)
class _Pass:
    """One forward and backward over `tokens`, and what else is in memory."""

    tokens: int
    width: int  # e
    accumulated: bool  # gradients of earlier micro-batches exist
    held: Bytes  # in addition to weights and state
    both_losses: bool = False  # labels are sampled too: the first of two backwards keeps its graph


class _Step:
    """The sizes of a run's tensors in bytes, and the moments of its step."""

    def __init__(self, config: RunConfig, shape: GPT2Config, world_size: int, device: DeviceType) -> None:
        self.config, self.shape, self.world_size, self.device = config, shape, world_size, device
        self.compiled = bool(config.train.compile)
        self.micro_batch_size = micro_batch_size(config, world_size)
        self.pass_of_curvature = curvature_of(config, world_size)
        strategy = config.strategy
        self.fsdp = strategy if isinstance(strategy, FSDPConfig) else None
        self.zero = strategy if isinstance(strategy, DeepSpeedConfig) else None
        self.bf16_weights = engine_has_bf16_weights(config)
        self.weight_bytes = BFLOAT16 if self.bf16_weights else FLOAT32  # of a block in the forward
        self.parameters = shape.parameter_count()
        self.embedding = FLOAT32 * shape.padded_vocab_size * shape.n_embd  # its gradient is not sharded
        self.block = (shape.parameter_count(embeddings=False) - shape.n_embd * (1 + shape.bias)) // shape.n_layer
        self.root = self.parameters - shape.n_layer * self.block  # embeddings and final norm
        self.model = FLOAT32 * self.parameters
        self.shard = self.model // (world_size if self.fsdp or self.zero else 1)

    # Permanent memory

    def standing(self) -> Bytes:
        """Return weights, state, and buffers that outlive a step."""
        optimizer, curvature = _state_sizes(self.config.optimizer, self.shape)
        share = self.shard / self.model
        on_device = not (self.zero and self.zero.offload_optimizer)
        memory = bytes_of(
            weights=self.shard,
            optimizer=round(FLOAT32 * optimizer * share) * on_device,
            curvature=round(FLOAT32 * curvature * share) * on_device,
        )
        if self.zero:  # float32 partitions, and the forward's weights
            forward = self.weight_bytes * self.parameters
            memory["weights"] = self.shard * on_device + (
                forward // self.world_size if self.zero.zero_stage == 3 else forward
            )
            memory["gradients"] = self.model if self.zero.zero_stage == 1 else self.shard
        elif self.fsdp is None and self.world_size > 1:
            memory["gradients"] = self.model  # DistributedDataParallel's buckets
        return memory

    # Activations

    def kept_of_block(self, tokens: int, width: int) -> int:
        """Return the bytes that a block keeps for its backward pass.

        Per token: both norms' inputs, 8d; in the products' precision q, k, v (3d), attention's output (d) and the MLP's
        hidden layer (4d). An uncompiled block also keeps the outputs of both norms (2d) and of GELU (4d). A compiled block
        recomputes them, except for one norm's output, kept in bf16.
        """
        d, e = self.shape.n_embd, width
        each = 8 * d + 8 * e * d + 4 * self.shape.n_head  # and attention's normalizer
        if self.compiled:
            each += 2 * d * (e == BFLOAT16)
        else:
            each += 6 * e * d + 2 * 8  # and the norms' means and deviations
            each += e * d * self.shape.attention_layer_scaling  # scaled queries
        each += 2 * d * (self.shape.dropout > 0)  # masks of bytes
        return tokens * each

    def temporaries_of_block(self, tokens: int, width: int) -> int:
        """Return the temporaries at the peak of a block's backward pass: the incoming gradient and those around GELU.

        A compiled block recomputes GELU and frees nothing before its end.
        """
        d = self.shape.n_embd
        return tokens * d * (FLOAT32 + (width if width == BFLOAT16 else 0) + (8 if self.compiled else 4) * width)

    def copies_of_block(self, width: int) -> int:
        """Return the bytes of the block's matrices in bf16, which autocast keeps for the backward pass."""
        return BFLOAT16 * self.block if width == BFLOAT16 and not self.bf16_weights else 0

    # The loss head (models/head.py)

    def head(self, done: _Pass) -> int:
        """Return the head's peak, including the gradients of hidden states and weight, computed in the forward pass."""
        tokens, width = done.tokens, done.width
        d, padded = self.shape.n_embd, self.shape.padded_vocab_size
        rows = rows_per_chunk(tokens, self.device)
        narrow = width == BFLOAT16
        inputs = narrow * (BFLOAT16 * tokens * d + (0 if self.zero and self.bf16_weights else BFLOAT16 * padded * d))
        gradients = width * tokens * d + self.embedding
        logits = width * rows * padded
        # A chunk's part of the weight's gradient before it is added. Uncompiled code widens slices of the logits.
        part = narrow * BFLOAT16 * padded * d
        slices = 0 if self.compiled else (3 if narrow else 2) * FLOAT32 * min(EAGER_ROWS, rows) * padded
        if rows >= tokens:  # a single chunk: no gradient exists yet when slices are widened
            slices -= min(slices, self.embedding)
        of_rows = 2 * FLOAT32 * rows * d
        return inputs + gradients + logits + max(part + of_rows, slices)

    def head_kept(self, done: _Pass) -> int:
        """Return what the head keeps for two backward passes: both gradients, hidden states, weight and labels."""
        d, padded = self.shape.n_embd, self.shape.padded_vocab_size
        weight = BFLOAT16 * padded * d if done.width == BFLOAT16 else 0
        return self.embedding + weight + done.tokens * (2 * done.width * d + 16)

    # Moments of a forward and backward pass

    def moments(self, done: _Pass) -> Iterator[Bytes]:
        tokens, width, layers = done.tokens, done.width, self.shape.n_layer
        stream = FLOAT32 * tokens * self.shape.n_embd
        base = self.standing() + done.held
        block = bytes_of(activations=self.kept_of_block(tokens, width), engine=self.copies_of_block(width))
        kept = bytes_of(activations=layers * block["activations"], engine=layers * block["engine"])
        recomputed = bytes_of()
        if self.fsdp and self.fsdp.activation_checkpointing:  # only the block's input is kept
            kept, recomputed = bytes_of(activations=layers * stream), block
        temporaries = bytes_of(activations=self.temporaries_of_block(tokens, width))

        if done.accumulated and (self.zero is None):
            base["gradients"] += self.model
        gathered = self.gathered()
        yield base + gathered + kept + bytes_of(activations=2 * stream, head=self.head(done))

        backward = base + self.gathered_in_backward() + temporaries + recomputed
        if done.both_losses:
            kept += bytes_of(activations=stream, head=self.head_kept(done))
        yield backward + kept + bytes_of(head=self.embedding)

        # The embedding has two gradients: one as the head's weight, already computed, and one from the lookup.
        end = base + gathered + (kept if done.both_losses else bytes_of())
        if self.fsdp:
            if not done.accumulated:
                end["gradients"] += self.shard
            yield end + bytes_of(engine=2 * FLOAT32 * self.root, activations=stream)
            return
        standing = self.zero or self.world_size > 1 or done.accumulated  # the other gradients are already allocated
        end["gradients"] += self.embedding if standing else self.model
        yield end + bytes_of(gradients=self.embedding, activations=stream)
        if not done.both_losses:
            end += block
        yield end + temporaries

    def gathered(self) -> Bytes:
        """Return the gathered weights while the head runs."""
        if self.fsdp:  # embeddings and final norm in float32, and blocks unless they are freed after their forward
            blocks = 0 if self.fsdp.reshard_after_forward else self.shape.n_layer * self.weight_bytes * self.block
            return bytes_of(engine=FLOAT32 * self.root + blocks)
        if self.zero:
            stage = self.zero.zero_stage
            weights = self.weight_bytes * min(self.parameters, LIVE_WEIGHTS) if stage == 3 else 0
            return bytes_of(engine=weights + (reduction_bucket_bytes(self.config) if stage != 2 else 0))
        return bytes_of()

    def gathered_in_backward(self) -> Bytes:
        """Return the gathered weights in a block's backward pass, and the block's gradients being reduced."""
        memory = self.gathered()
        if self.fsdp:  # weights of this block and the next, gradients as computed and in float32 for the reduction
            memory["engine"] += (3 * self.weight_bytes + FLOAT32) * self.block
        elif self.zero and self.zero.zero_stage == 2:
            memory["engine"] += reduction_bucket_bytes(self.config)
        return memory

    # Phases

    def training(self) -> Iterator[Bytes]:
        rows = self.config.train.global_batch_size // self.world_size
        width = BFLOAT16 if self.config.train.precision == "bf16" else FLOAT32
        tokens = self.micro_batch_size * self.config.train.sequence_length
        yield from self.moments(_Pass(tokens, width, rows > self.micro_batch_size, bytes_of()))

    def update(self) -> Bytes:
        memory = self.standing()
        if self.zero:  # the engine flattens the gradients' partition
            memory["gradients"] += self.shard
            memory["engine"] += reduction_bucket_bytes(self.config) if self.zero.zero_stage == 3 else 0
        elif self.fsdp or self.world_size == 1:
            memory["gradients"] += self.shard
        memory["workspace"] += self.workspace(FOREACH_UPDATE)
        return memory

    def workspace(self, numbers: int) -> int:
        """Return the update's temporaries: 0 for fused AdamW, compiled updates, and CPUs, which update in small pieces."""
        compiled = self.compiled and not isinstance(self.config.optimizer, ExternalConfig)
        if compiled or self.device == "cpu" or self.config.optimizer.name in ("adamw", "muon"):
            return 0
        return numbers * self.shard

    def curvature(self) -> Iterator[Bytes]:
        curvature = self.pass_of_curvature
        if curvature is None:
            return
        length = self.config.train.sequence_length
        of_rank = self.config.train.global_batch_size // self.world_size
        rows = min(-(-curvature.sequences // self.world_size), of_rank)  # the largest share of a rank
        micro_batches = -(-rows // self.micro_batch_size)
        width = BFLOAT16 if self.config.train.precision == "bf16" else FLOAT32
        fold = bytes_of(workspace=self.workspace(FOREACH_FOLD))
        if curvature.within_training:
            done = _Pass(min(rows, self.micro_batch_size) * length, width, False, bytes_of(), both_losses=True)
            if micro_batches > 1:  # the gradients of both losses
                done = replace(done, accumulated=True, held=bytes_of(gradients=self.model))
            yield from self.moments(done)
            stream = FLOAT32 * done.tokens * self.shape.n_embd
            kept = bytes_of(
                activations=self.shape.n_layer * self.kept_of_block(done.tokens, width) + stream,
                engine=self.shape.n_layer * self.copies_of_block(width),
                head=self.head_kept(done),
            )
            yield self.standing() + kept + done.held + fold + bytes_of(gradients=self.model * (self.world_size == 1))
            if rows < of_rank:  # the rest of the batch adds to the slice's gradients
                rest = min(of_rank - rows, self.micro_batch_size) * length
                yield from self.moments(_Pass(rest, width, True, bytes_of()))
            return
        tokens = -(-rows // micro_batches) * length
        if curvature.estimator == "hutchinson":
            yield self.exact_product(tokens, width)
            yield self.standing() + fold + bytes_of(activations=self.model)
            return
        held = bytes_of()
        if curvature.estimator == "hutchinson_differences":  # noise, the saved weights, the first gradient
            held["workspace"] = 3 * self.shard
            width = FLOAT32
        yield from self.moments(_Pass(tokens, width, micro_batches > 1, held))
        taken = bytes_of(gradients=self.shard * (2 if held else 1))
        yield self.standing() + held + fold + taken

    def exact_product(self, tokens: int, width: int) -> Bytes:
        """Return the memory of a Hessian-vector product by double backward, uncompiled, with attention maps and full logits.

        The factors (bytes per entry of maps, other activations and logits) were counted in real passes. The first gradient,
        the noise and the products come on top.
        """
        narrow = width == BFLOAT16
        of_map, of_activation, of_logit = (14, 90, 17) if narrow else (12, 160, 22)
        shape, length = self.shape, self.config.train.sequence_length
        layer = tokens * (of_map * shape.n_head * length + of_activation * shape.n_embd)
        logits = of_logit * tokens * shape.padded_vocab_size
        copies = BFLOAT16 * self.parameters if narrow else 0
        passed = bytes_of(activations=shape.n_layer * layer + logits + 3 * self.model, engine=copies)
        return self.standing() + passed
