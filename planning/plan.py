"""Plan a run on a cluster: memory, hours, cost, traffic, and settings that fit if the run does not.

memory         planning/memory.py
FLOPs          models/flops.py, as in a run's ledger
communication  training/strategies/communication.py, as in a run's ledger
time           a step is forward and backward at the given utilisation, the communication that does not run during them,
               and the update at memory bandwidth; every k-th step adds the curvature pass, at the size of a rank's share
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models import GPT2Config
from models.flops import Flops
from planning.cluster import OPTIMIZERS, ClusterConfig
from planning.memory import Memory, Phase, curvature_of, engine_has_bf16_weights, planned_memory
from training.architectures import model_shape
from training.compose import compose_dictionary, validate
from training.config import (
    ConfigurationError,
    DDPConfig,
    DeepSpeedConfig,
    FSDPConfig,
    MuonConfig,
    RunConfig,
    divisors,
    micro_batch_size,
)
from training.curvature import CurvaturePass
from training.strategies.communication import (
    BFLOAT16,
    FLOAT32,
    all_reduce_bytes,
    ddp_traffic,
    fsdp_traffic,
    zero_traffic,
)

GPT2_VOCABULARY = 50257
MOST_GPUS = 4096
#: float32 numbers that an update reads and writes per parameter, including gradient and weight. Unlisted optimizers are
#: assumed to keep two numbers per parameter, like AdamW.
UPDATE_ACCESSES = {"adamw": 7, "lion": 5, "signum": 5, "sophiag": 6, "sophiah": 6, "adahessian": 6, "muon": 5}
#: Reads and writes of folding an estimate into h.
REFRESH_ACCESSES = 3
NEWTON_SCHULZ_STEPS = 5
# Names of collectives.
GRADIENTS_DDP, GRADIENTS, WEIGHTS = "all-reduce of gradients", "reduce-scatter of gradients", "all-gather of weights"


@dataclass(frozen=True)
class PlannedTraffic:
    """Bytes that each rank sends, by collective."""

    step: dict[str, int]
    curvature_pass: dict[str, int]


@dataclass(frozen=True)
class StepSeconds:
    """The average time of a step, including 1/k of a curvature pass."""

    compute: float  # forward and backward, including recomputation
    exposed: float  # communication that forward and backward do not hide
    update: float
    curvature: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update + self.curvature


@dataclass(frozen=True)
class OptimizerPlan:
    """A run of one optimizer on the cluster."""

    optimizer: str
    estimator: str | None
    hessian_interval: int | None
    memory: dict[Phase, Memory]
    peak_bytes: int
    peak_phase: Phase
    fits: bool
    flops_per_step: int  # average over all ranks, including curvature passes
    seconds: StepSeconds
    hours: float
    cost: float
    traffic: PlannedTraffic


@dataclass(frozen=True)
class Remedy:
    """Overrides with which the run fits."""

    overrides: tuple[str, ...]
    peak_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """A run on a cluster, planned with several optimizers."""

    config: RunConfig
    cluster: ClusterConfig
    shape: GPT2Config
    parameters: int
    micro_batch_size: int
    micro_batches: int
    tokens: int
    training_flops_per_step: int
    optimizers: tuple[OptimizerPlan, ...]
    refused: dict[str, str]  # optimizer -> why the strategy does not support it
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]

    def as_dictionary(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = dataclasses.asdict(dataclasses.replace(self, optimizers=(), remedies=()))
        del values["shape"]
        return values | {
            "config": self.config.model_dump(mode="json"),
            "cluster": self.cluster.model_dump(mode="json") | {"usable_bytes": self.cluster.usable_bytes},
            "optimizers": [
                {**dataclasses.asdict(one), "seconds_per_step": one.seconds.total} for one in self.optimizers
            ],
            "remedies": [dataclasses.asdict(remedy) for remedy in self.remedies],
        }


def plan_run(
    config: RunConfig,
    cluster: ClusterConfig,
    optimizers: Sequence[str] = OPTIMIZERS,
    notes: Sequence[str] = (),
) -> RunPlan:
    """Plan a run, composed by `compose_for`, with each of the optimizers; if it does not fit, find settings that do.

    Raises:
        ConfigurationError: an optimizer does not exist, or the batch is not divisible by the ranks.
    """
    shape, chosen, said = planned_shape(config), config.optimizer.name, list(notes)
    micro = micro_batch_size(config, cluster.gpus)
    plans: list[OptimizerPlan] = []
    refused: dict[str, str] = {}
    sections = {
        name: compose_dictionary([f"optimizer={name}"])["optimizer"]
        for name in dict.fromkeys(optimizers)
        if name != chosen
    }
    for name in dict.fromkeys((*optimizers, chosen)):
        try:
            other = config if name == chosen else with_optimizer(config, sections[name], said)
        except ConfigurationError as error:
            refused[name] = str(error)
            continue
        plans.append(plan_optimizer(other, shape, cluster))
    if isinstance(config.strategy, DeepSpeedConfig) and config.strategy.offload_optimizer:
        said.append(
            "strategy.offload_optimizer=true: time and cost leave out the transfers to the CPU and its slower update; measure "
            "a few steps"
        )
    own = next(one for one in plans if one.optimizer == chosen)
    return RunPlan(
        config=config,
        cluster=cluster,
        shape=shape,
        parameters=shape.parameter_count(),
        micro_batch_size=micro,
        micro_batches=config.train.global_batch_size // (micro * cluster.gpus),
        tokens=config.train.steps * step_tokens(config),
        training_flops_per_step=shape.flops(config.train.sequence_length).forward_backward(step_tokens(config)),
        optimizers=tuple(plans),
        refused=refused,
        remedies=() if own.fits else tuple(remedies(config, shape, cluster)),
        notes=tuple(dict.fromkeys(said)),
    )


def with_optimizer(config: RunConfig, section: dict[str, Any], notes: list[str]) -> RunConfig:
    """Return the run with another optimizer section, with hutchinson_differences if the strategy requires it."""
    values = config.model_dump(mode="json") | {"optimizer": section}
    try:
        return validate(values)
    except ConfigurationError:
        if section.get("estimator") != "hutchinson":
            raise
        section["estimator"] = "hutchinson_differences"
        notes.append(
            f"{section['name']}: optimizer.estimator=hutchinson_differences, since double backward fails on shards"
        )
        return validate(values)


def planned_shape(config: RunConfig) -> GPT2Config:
    """Return the model's shape with the tokenizer's vocabulary."""
    return model_shape(config.model, config.tokenizer.vocab_size or GPT2_VOCABULARY)


def plan_optimizer(config: RunConfig, shape: GPT2Config, cluster: ClusterConfig) -> OptimizerPlan:
    """Plan memory, time and cost of one run."""
    memory = planned_memory(config, shape, cluster.gpus, "cuda")
    totals = {phase: sum(by_kind.values()) for phase, by_kind in memory.items()}
    phase = max(totals, key=lambda one: totals[one])
    traffic = planned_traffic(config, shape, cluster.gpus)
    seconds = step_seconds(config, shape, cluster, traffic)
    hours = config.train.steps * seconds.total / 3600
    length = config.train.sequence_length
    flops = shape.flops(length).forward_backward(step_tokens(config))
    curvature = curvature_of(config, cluster.gpus)
    if curvature is not None:
        flops += _curvature_flops(curvature, shape.flops(length), length) // curvature.interval
    return OptimizerPlan(
        optimizer=config.optimizer.name,
        estimator=config.estimator,
        hessian_interval=curvature.interval if curvature else None,
        memory=memory,
        peak_bytes=totals[phase],
        peak_phase=phase,
        fits=totals[phase] <= cluster.usable_bytes,
        flops_per_step=flops,
        seconds=seconds,
        hours=hours,
        cost=hours * cluster.gpus * cluster.price_per_hour,
        traffic=traffic,
    )


def step_tokens(config: RunConfig) -> int:
    return config.train.global_batch_size * config.train.sequence_length


def _curvature_flops(curvature: CurvaturePass, forward: Flops, length: int) -> int:
    return curvature.flops(forward, length, shared_forward=curvature.within_training)


def step_seconds(config: RunConfig, shape: GPT2Config, cluster: ClusterConfig, traffic: PlannedTraffic) -> StepSeconds:
    """Return the average time of a step. Like a run's `seconds`, it excludes evaluation and checkpoints."""
    length, world_size = config.train.sequence_length, cluster.gpus
    peak = cluster.bf16_tflops if config.train.precision == "bf16" else cluster.fp32_tflops
    rate = peak * 1e12 * cluster.utilisation
    tokens = step_tokens(config) // world_size  # per rank
    forward = shape.flops(length)
    recomputed = forward.trunk if getattr(config.strategy, "activation_checkpointing", False) else 0
    compute = (forward.forward_backward(tokens) + tokens * recomputed) / rate
    curvature_seconds = 0.0
    curvature = curvature_of(config, world_size)
    sharded = not isinstance(config.strategy, DDPConfig)
    mine = shape.parameter_count() // (world_size if sharded else 1)
    memory_rate = cluster.memory_bandwidth * 1e9 * cluster.bandwidth_utilisation
    if curvature is not None:
        rows = -(-curvature.sequences // world_size)  # the largest share; ranks with less wait
        share = rows * world_size / curvature.sequences
        exact = curvature.estimator == "hutchinson_differences"
        rate_of_pass = cluster.fp32_tflops * 1e12 * cluster.utilisation if exact else rate
        work = _curvature_flops(curvature, forward, length) / world_size * share
        if curvature.estimator != "hutchinson":
            work += rows * length * recomputed * (2 if exact else 1)  # of the two gradients that are subtracted
        one = max(work / rate_of_pass, sum(traffic.curvature_pass.values()) / cluster.link_bandwidth)
        curvature_seconds = (one + REFRESH_ACCESSES * FLOAT32 * mine / memory_rate) / curvature.interval
    accesses = UPDATE_ACCESSES.get(config.optimizer.name, UPDATE_ACCESSES["adamw"])
    update = accesses * FLOAT32 * mine / memory_rate
    if isinstance(config.optimizer, MuonConfig):  # not distributed: every rank does the full update
        update += newton_schulz_flops(shape) / (cluster.bf16_tflops * 1e12 * cluster.utilisation)
    exposed = exposed_seconds(config, cluster, traffic.step, compute)
    return StepSeconds(compute, exposed, update, curvature_seconds)


def exposed_seconds(config: RunConfig, cluster: ClusterConfig, sent: Mapping[str, int], compute: float) -> float:
    """Return the time of a step's communication that its `compute` seconds cannot hide, at best.

    Gradients that are reduced once are reduced in the backward pass of the last micro-batch (DDP, FSDP) or after it (ZeRO 1),
    weights gathered after the update by ZeRO 1 and 2 are hidden by nothing, and all else runs in every micro-batch.
    """
    micro_batches = config.train.global_batch_size // (cluster.gpus * micro_batch_size(config, cluster.gpus))
    recomputes = getattr(config.strategy, "activation_checkpointing", False)
    last_backward = (3 / 4 if recomputes else 2 / 3) / micro_batches
    match config.strategy:
        case DDPConfig():
            window = {GRADIENTS_DDP: last_backward}
        case FSDPConfig():
            window = {WEIGHTS: 1.0, GRADIENTS: last_backward}
        case DeepSpeedConfig(zero_stage=stage):
            window = {WEIGHTS: 1.0 if stage == 3 else 0.0, GRADIENTS: 0.0 if stage == 1 else 1.0}
    seconds = {name: size / cluster.link_bandwidth for name, size in sent.items()}
    apart = sum(max(0.0, value - window[name] * compute) for name, value in seconds.items())
    return max(apart, sum(seconds.values()) - compute)


def newton_schulz_flops(shape: GPT2Config) -> int:
    """Return the FLOPs of torch.optim.Muon's update of all blocks: a Gram matrix and two products, five times."""
    width = shape.n_embd
    matrices = ((width, 3 * width), (width, width), (width, 4 * width), (width, 4 * width))
    block = sum(NEWTON_SCHULZ_STEPS * (4 * rows * rows * columns + 2 * rows**3) for rows, columns in matrices)
    return shape.n_layer * block


def planned_traffic(config: RunConfig, shape: GPT2Config, world_size: int) -> PlannedTraffic:
    """Return the bytes that each rank sends in a step and in a curvature pass."""
    micro_batches = config.train.global_batch_size // (world_size * micro_batch_size(config, world_size))
    step = _traffic(config, shape, world_size, micro_batches)
    curvature = curvature_of(config, world_size)
    if curvature is None:
        return PlannedTraffic(step, {})
    if curvature.estimator == "hutchinson":
        products = all_reduce_bytes(FLOAT32 * shape.parameter_count(), world_size)
        return PlannedTraffic(step, {"all-reduce of products": products})
    passes = 2 if curvature.estimator == "hutchinson_differences" else 1
    rows = -(-curvature.sequences // world_size)
    one = _traffic(config, shape, world_size, -(-rows // micro_batch_size(config, world_size)))
    return PlannedTraffic(step, {name: passes * size for name, size in one.items()})


def _traffic(config: RunConfig, shape: GPT2Config, world_size: int, micro_batches: int) -> dict[str, int]:
    size = shape.parameter_count()
    weight_bytes = BFLOAT16 if engine_has_bf16_weights(config) else FLOAT32
    match config.strategy:
        case DDPConfig():
            return {GRADIENTS_DDP: ddp_traffic(size, world_size).total(micro_batches)}
        case FSDPConfig():
            root = (shape.padded_vocab_size + shape.block_size) * shape.n_embd + shape.n_embd * (1 + shape.bias)
            traffic = fsdp_traffic(
                size - root,
                root,
                world_size,
                block_bytes=weight_bytes,
                reshard_after_forward=config.strategy.reshard_after_forward,
            )
            return {
                WEIGHTS: micro_batches * traffic.per_micro_batch,
                GRADIENTS: traffic.per_update,
            }
        case DeepSpeedConfig(zero_stage=stage):
            gradients = zero_traffic(size, world_size, stage=stage, weight_bytes=0).total(micro_batches)
            both = zero_traffic(size, world_size, stage=stage, weight_bytes=weight_bytes).total(micro_batches)
            return {GRADIENTS: gradients, WEIGHTS: both - gradients}


def remedies(config: RunConfig, shape: GPT2Config, cluster: ClusterConfig) -> Iterator[Remedy]:
    """Yield the nearest settings that fit, of each kind: micro-batch, strategy and checkpointing, number of GPUs."""
    now = micro_batch_size(config, cluster.gpus)

    def largest(overrides: tuple[str, ...], strategy: dict[str, Any] | None, gpus: int) -> Remedy | None:
        """Find the largest micro-batch, up to the configured one, that fits on `gpus` GPUs."""
        for micro in reversed([d for d in divisors(config.train.global_batch_size // gpus) if d <= now]):
            values = config.model_dump(mode="json")
            values["train"]["micro_batch_size"] = micro
            values["strategy"] = strategy or values["strategy"]
            try:
                memory = planned_memory(validate(values), shape, gpus, "cuda")
            except ConfigurationError:  # the strategy does not support the optimizer
                return None
            peak = max(sum(by_kind.values()) for by_kind in memory.values())
            if peak <= cluster.usable_bytes:
                smaller = () if micro == now else (f"train.micro_batch_size={micro}",)
                return Remedy((*overrides, *smaller), peak)
        return None

    if remedy := largest((), None, cluster.gpus):
        yield remedy
    given = config.strategy.model_dump()  # overrides of a strategy that stays keep its other keys
    fsdp = (given if isinstance(config.strategy, FSDPConfig) else {"name": "fsdp"}) | {
        "activation_checkpointing": False
    }
    checkpointed = fsdp | {"activation_checkpointing": True}
    checkpointing = ("strategy=fsdp", "strategy.activation_checkpointing=true")
    strategies: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    if isinstance(config.strategy, DeepSpeedConfig):
        for stage in range(config.strategy.zero_stage + 1, 4):
            strategies.append(((f"strategy.zero_stage={stage}",), given | {"zero_stage": stage}))
    if isinstance(config.strategy, FSDPConfig):
        if not config.strategy.reshard_after_forward:
            strategies.append((("strategy.reshard_after_forward=true",), given | {"reshard_after_forward": True}))
        strategies.append((checkpointing[1:], checkpointed))
    else:
        strategies += [(checkpointing[:1], fsdp), (checkpointing, checkpointed)]
    for overrides, strategy in strategies:
        if remedy := largest(overrides, strategy, cluster.gpus):
            yield remedy
            if strategy == fsdp and remedy.overrides == overrides:  # fits without recomputation
                break
    more: list[tuple[tuple[str, ...], dict[str, Any] | None]] = [(checkpointing, checkpointed)]
    if isinstance(config.strategy, DeepSpeedConfig):
        more.append(((), None))
    for overrides, further in more:
        gpus = 2 * cluster.gpus
        while gpus <= MOST_GPUS and config.train.global_batch_size % gpus == 0:
            if remedy := largest((f"cluster.gpus={gpus}", *overrides), further, gpus):
                yield remedy
                break
            gpus *= 2
