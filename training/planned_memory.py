"""The memory that a step would take on each device, found out by doing it with tensors that have no data.

The project's own model, strategy, optimizer and curvature pass run one step on fake tensors, as rank 0 of a fake world of
any size; training/memory_trace.py follows the storages. GPT-2's blocks are alike, so two models of few layers give the
bytes of a layer and of the rest, and a model of any depth takes no longer than a small one.

    ddp        the engine's gradient buckets cannot be faked (C++): the trace has tensors of their sizes in their place
    fsdp       traced as it is
    deepspeed  the model is traced; what the engine makes of its weights, gradients and state is added from its layout

Tensors are fake CPU tensors whatever the device: torch cannot fake CUDA's without CUDA. Where the project does otherwise
on a GPU, the trace does what it does there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import models.head
import sophia.kernels
from data.batches import Batch
from models import GPT2, GPT2Config
from sophia.kernels import Form
from training import planned_zero
from training.config import AdaHessianConfig, DDPConfig, DeepSpeedConfig, FSDPConfig, RunConfig, micro_batch_size
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.loop import Run, forward_backward, forward_backward_refresh
from training.memory_trace import KINDS, Kind, Memory, MemoryTrace
from training.optimizers import build_optimizers
from training.planned_compilation import as_if_compiled
from training.recording.ledger import Ledger
from training.strategies.base import Strategy
from training.strategies.ddp import DDP
from training.weights import InitialWeights

Phase = Literal["curvature", "training", "update"]
PHASES: tuple[Phase, ...] = ("curvature", "training", "update")
DeviceType = Literal["cpu", "cuda"]

#: Layers of the two models whose difference is the memory of a layer. The first and the last are unlike those between:
#: FSDP gathers the next block during one, and of two checkpointed blocks the last's gradients come and go with the head's.
SAMPLED_LAYERS = (3, 4)


def planned_memory(config: RunConfig, shape: GPT2Config, world_size: int, device: DeviceType) -> dict[Phase, Memory]:
    """The largest memory of each phase of a step on each device, in bytes by kind.

    Args:
        config: of the run; `auto` resolved.
        world_size: ranks of the run, one on each device.
        device: the kind of device that the run would have.

    Raises:
        ConfigurationError: the batch does not divide over the ranks.
        RuntimeError: this process has a process group; planning needs one of its own.
    """
    micro = micro_batch_size(config, world_size)
    few, more = SAMPLED_LAYERS
    if shape.n_layer <= more:
        return _highest(_trace(config, shape, world_size, micro, device))
    small, large = (_trace(config, _with_layers(shape, n), world_size, micro, device) for n in SAMPLED_LAYERS)
    layers = (shape.n_layer - few) / (more - few)
    return _highest(
        {
            part: {kind: max(0, round(a[kind] + layers * (large[part][kind] - a[kind]))) for kind in KINDS}
            for part, a in small.items()
        }
    )


def _highest(parts: dict[str, Memory]) -> dict[Phase, Memory]:
    """Of the parts of each phase (`training`, `training backward`, `curvature fold`, …) the one that takes most.

    Parts grow with the layers each in its own way; which one is the highest may be another in a deep model.
    """
    by_phase = {phase: [memory for part, memory in parts.items() if part.split()[0] == phase] for phase in PHASES}
    return {
        phase: max(memories, key=lambda memory: sum(memory.values()))
        for phase, memories in by_phase.items()
        if memories
    }


def _with_layers(shape: GPT2Config, n_layer: int) -> GPT2Config:
    return GPT2Config(**{**vars(shape), "n_layer": n_layer})


def _trace(config: RunConfig, shape: GPT2Config, world_size: int, micro: int, device: DeviceType) -> dict[str, Memory]:
    """The peaks of a step's parts."""
    zero = config.strategy if isinstance(config.strategy, DeepSpeedConfig) else None
    sharded = isinstance(config.strategy, FSDPConfig)
    trace = MemoryTrace()
    with contextlib.ExitStack() as stack:
        if sharded:
            stack.enter_context(_fake_world(world_size))
        stack.enter_context(_as_on(device, shape, compiled=bool(config.train.compile)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        strategy = _strategy(config, shape, world_size if sharded else 1, trace)
        if isinstance(strategy, DDP) and zero is None and world_size > 1:
            _add_buckets(strategy, trace)
        _make_state(config, strategy, trace, device)
        _count_fold(strategy, trace)
        batch = step_batch(config.train.sequence_length, min(2, _micro_batches(config, world_size)) * micro)
        curvature = curvature_of(config, micro)
        if curvature is not None:  # further slices need no more memory than the second
            rows = min(-(-curvature.sequences // world_size), len(batch.tokens))
            curvature.sequences = rows * strategy.distributed.world_size
        one_step(config, strategy, batch, micro, curvature, 2, trace.phase)  # the first refresh may be another
        peaks = {part: memory for part, memory in trace.peaks.items() if part.split()[0] in PHASES}
    if zero is None:
        return peaks
    state = _whole_state(strategy)
    return {
        part: planned_zero.engine_memory(config, zero, shape, world_size, state, part, memory)
        for part, memory in peaks.items()
    }


def _micro_batches(config: RunConfig, world_size: int) -> int:
    return config.train.global_batch_size // (world_size * micro_batch_size(config, world_size))


def step_batch(length: int, rows: int) -> Batch:
    """A rank's part of a batch, of nothing in particular."""
    tokens = np.zeros((rows, length), dtype=np.int64)
    return Batch(tokens, tokens, np.arange(rows))


def curvature_of(config: RunConfig, micro_batch_size: int) -> CurvaturePass | None:
    """The run's curvature pass; its labels come from the training forward where the run's own would."""
    return CurvaturePass.of(
        config.optimizer,
        0,
        config.train.global_batch_size,
        micro_batch_size,
        shared_forward=config.train.shared_forward and isinstance(config.strategy, DDPConfig),
    )


def one_step(
    config: RunConfig,
    strategy: Strategy,
    batch: Batch,
    micro_batch_size: int,
    curvature: CurvaturePass | None,
    number: int,
    phase: Callable[[Phase, Kind], AbstractContextManager[None]] = lambda phase, kind: nullcontext(),
) -> None:
    """What the loop does in a step with a refresh, then in one without: the refresh, forward and backward, update."""
    run = cast(
        Run,
        SimpleNamespace(
            config=config,
            strategy=strategy,
            micro_batch_size=micro_batch_size,
            ledger=Ledger(strategy.device),
            progress=lambda doing: None,
            state=SimpleNamespace(step=number - 1),
        ),
    )
    if curvature is not None:
        with phase("curvature", "activations"):
            if curvature.shares_forward(strategy, number):
                forward_backward_refresh(run, curvature, strategy, batch, number)
                strategy.zero_grad()
            else:
                curvature.run(strategy, batch, number)
    with phase("training", "activations"):
        forward_backward(run, batch)
    with phase("update", "workspace"):
        strategy.step(config.train.grad_clip)


class _NoWeights:
    """In the place of InitialWeights: fake tensors hold no values."""

    def apply(self, model: GPT2) -> None:
        """Nothing to copy."""


def _strategy(config: RunConfig, shape: GPT2Config, world_size: int, trace: MemoryTrace) -> Strategy:
    """The run's strategy with model and optimizers, ready to step; for ZeRO the model as its engine would have it."""
    distributed = Distributed(0, 0, world_size, torch.device("cpu"))
    bf16 = config.train.precision == "bf16"
    strategy: Strategy
    if isinstance(config.strategy, FSDPConfig):
        from training.strategies.fsdp import FSDP

        gather_bf16 = getattr(config.optimizer, "estimator", None) != "hutchinson_differences"
        strategy = FSDP(distributed, config.strategy, bf16=bf16, compile_model=False, gather_bf16=gather_bf16)
    else:
        strategy = DDP(distributed, bf16=bf16, compile_model=False)
    model = GPT2(shape)
    if isinstance(config.strategy, DeepSpeedConfig) and planned_zero.has_bf16_weights(config):
        planned_zero.narrow(model)
    model.to_empty = lambda *, device, recurse=True: model  # type: ignore[method-assign]  # it is there already
    if config.train.compile:
        as_if_compiled(model, trace)
    strategy.prepare(model, cast(InitialWeights, _NoWeights()), build_optimizers(config.optimizer, compile_step=False))
    for parameter in strategy.parameters().values():
        trace.label(parameter, "weights")
    _count_head(model.head, trace)
    _count_gathered(model, trace)
    _count_gradients(strategy, trace)

    def normals(seed: int, step: int) -> list[Tensor]:  # Philox's rounds are many operations
        return [torch.empty_like(p, dtype=torch.float32) for p in strategy.parameters().values()]

    strategy.normals = strategy.parameter_normals = normals  # type: ignore[method-assign]
    return strategy


def _count_head(head: nn.Module, trace: MemoryTrace) -> None:
    open_contexts: list[contextlib.AbstractContextManager[None]] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        open_contexts.append(trace.making("head"))
        open_contexts[-1].__enter__()

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    head.register_forward_pre_hook(begin)
    head.register_forward_hook(end)


def _count_gathered(model: GPT2, trace: MemoryTrace) -> None:
    """FSDP's gathered weights, in each forward before they are given up."""

    def label(module: nn.Module, inputs: Any, output: Any) -> None:
        for sharded in _sharded_parameters(module):
            for gathered in sharded.all_gather_outputs:
                trace.label(gathered, "engine")

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_hook(label, prepend=True)


def _sharded_parameters(module: nn.Module) -> Sequence[Any]:
    group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
    return group.fsdp_params if group is not None else ()


def _count_gradients(strategy: Strategy, trace: MemoryTrace) -> None:
    """After each backward pass, what has become of it is known."""
    backward = strategy.backward

    def counted(loss: Tensor, **options: bool) -> None:
        with trace.phase(f"{trace.current_phase} backward", "activations"):
            backward(loss, **options)
        for gradient in _gradients(strategy):
            trace.label(gradient, "gradients")

    strategy.backward = counted  # type: ignore[method-assign]


def _count_fold(strategy: Strategy, trace: MemoryTrace) -> None:
    """Folding an estimate into h is a part of its own: activations have gone, and an eager fold has temporaries."""
    update_hessian = strategy.update_hessian

    def counted(**estimate: Any) -> Tensor:
        with trace.phase(f"{trace.current_phase} fold", "workspace"):
            return update_hessian(**estimate)

    strategy.update_hessian = counted  # type: ignore[method-assign]


def _gradients(strategy: Strategy) -> Iterator[Tensor]:
    for parameter in strategy.parameters().values():
        if parameter.grad is not None:
            yield parameter.grad
    for module in strategy.model.modules():
        for sharded in _sharded_parameters(module):  # between the micro-batches of an accumulation, whole
            if sharded.unsharded_accumulated_grad is not None:
                yield sharded.unsharded_accumulated_grad


def _add_buckets(strategy: Strategy, trace: MemoryTrace) -> None:
    """DistributedDataParallel's buckets: memory of its own for every gradient, which `.grad` becomes a view of.

    It does so where gradients are reduced; those of an accumulation's earlier micro-batches stand beside the buckets.
    """
    micro_batch = strategy.micro_batch
    reducing = [False]

    @contextlib.contextmanager
    def noted(*, last: bool) -> Iterator[None]:
        reducing[0] = last
        with micro_batch(last=last):
            yield
        reducing[0] = False

    strategy.micro_batch = noted  # type: ignore[method-assign]
    for parameter in strategy.parameters().values():
        with trace.making("gradients"):
            view = torch.empty_like(parameter, requires_grad=False)

        def into_bucket(parameter: Tensor, view: Tensor = view) -> None:
            if reducing[0] and parameter.grad is not view:
                assert parameter.grad is not None
                view.copy_(parameter.grad)
                parameter.grad = view

        parameter.register_post_accumulate_grad_hook(into_bucket)


def _make_state(config: RunConfig, strategy: Strategy, trace: MemoryTrace, device: DeviceType) -> None:
    """The state that a first step leaves behind, from gradients of zero."""
    for optimizer in strategy.optimizers:
        if hasattr(optimizer, "_form"):  # the project's own
            foreach = device == "cuda" and not config.train.compile
            optimizer._form = Form(foreach=foreach, compile=bool(config.train.compile))
    for parameter in strategy.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    if isinstance(config.optimizer, AdaHessianConfig):  # which takes no other estimates
        strategy.update_hessian(estimates=[torch.zeros_like(p) for p in strategy.parameters().values()])
    elif CurvaturePass.of(config.optimizer, 0, 1, 1) is not None:
        strategy.update_hessian(num_predictions=1)
    strategy.step(None)
    for optimizer in strategy.optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    trace.label(value, "curvature" if key == "hessian" else "optimizer")


def _whole_state(strategy: Strategy) -> Memory:
    """Optimizer and curvature state of the whole model in float32."""
    memory: Memory = dict.fromkeys(KINDS, 0)
    for optimizer in strategy.optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    memory["curvature" if key == "hessian" else "optimizer"] += 4 * value.numel()
    return memory


@contextlib.contextmanager
def _fake_world(world_size: int) -> Iterator[None]:
    """A process group whose collectives do nothing, as its rank 0."""
    if dist.is_initialized():
        raise RuntimeError(
            "planning needs a fake process group and this process has a real one; plan in a process of its own"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_on(device: DeviceType, shape: GPT2Config, *, compiled: bool) -> Iterator[None]:
    """What the project does on the device; what costs time and no memory is left out.

    On fake CPU tensors attention is the CPU's flash kernel, whose saved tensors are those of CUDA's kernels.
    """
    import training.strategies.fsdp as fsdp

    chunk_rows = models.head._chunk_rows
    init_device_mesh = fsdp.init_device_mesh

    def real_mesh(*arguments: Any) -> Any:
        with unset_fake_temporarily():  # it reads the ranks
            return init_device_mesh(*arguments)

    replaced: list[tuple[Any, str, Any]] = [
        (models.head, "_chunk_rows", lambda rows, _: chunk_rows(rows, device)),
        (fsdp, "init_device_mesh", real_mesh),
        (GPT2, "initialize", lambda model, seed: None),
        # A compiled update is a pass without temporaries; an uncompiled one on the CPU has small ones.
        (sophia.kernels, "_call_compiled", lambda rule, rows, scalars: [torch.zeros((), dtype=torch.int64)]),
        (sophia.kernels, "_compiler_failed", False),
    ]
    if not compiled:
        replaced.append((sophia.kernels, "EAGER_PIECE", 1 << 24))
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
