"""DeepSpeed ZeRO: stage 1 shards the optimizer state, stage 2 also the gradients, stage 3 also the weights.

The engine gives the optimizer flat float32 partitions of its parameter groups. A *fragment* is the contiguous range of a
parameter's elements in one of this rank's partitions. Curvature, checkpoints and diagnostics work on fragments.

Gradients are reduced by the engine's step, which reduces, partitions and casts them and then calls the optimizer. So
everything that needs reduced gradients (the update, the curvature estimate, the two gradients of a central difference) is
an engine step with another action instead of the optimizer's. The engine neither clips nor schedules.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import LanguageModel, ModelOutput
from sophia.random import normals
from training.config import DeepSpeedConfig
from training.distributed import Distributed
from training.strategies.base import NumberPiece, Piece, PieceReader, StepStatistics, Strategy, total_norm
from training.strategies.communication import BFLOAT16, FLOAT32, zero_traffic
from training.strategies.gradients import gradients, skips_on_device, unclipped
from training.strategies.precision import keep_norms_float32, keep_residual_float32
from training.strategies.state import check_savable, counts_on_host, saved_keys
from training.weights import InitialWeights


def prepare_environment(device: str) -> None:
    """Set what DeepSpeed reads at its first import, before the ranks join.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init requires it, even at world size 1
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # The CPU backend's shared-memory collectives cost 45 seconds of C++ compilation at the first start and need ninja and
    # g++. Gloo does the same without them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that this rank steps; empty if other ranks hold all of it."""

    name: str
    shape: tuple[int, ...]  # of the parameter
    start: int  # index of the first element in the flattened parameter
    count: int
    partition: int  # index of the flat partition
    offset: int  # in the partition

    def of(self, flat: Tensor) -> Tensor:
        """(count,) view of this fragment in a tensor shaped like its partition."""
        return flat.narrow(0, self.offset, self.count)

    def cut(self, whole: Tensor) -> Tensor:
        """(count,) this fragment of a tensor shaped like the parameter."""
        return whole.reshape(-1).narrow(0, self.start, self.count)


class EngineOptimizer(Optimizer):
    """The optimizer as the engine sees it: with the inner optimizer's groups and state, and `action` as its step.

    The engine replaces the groups' parameters with flat partitions and calls `step` once per group or partition.
    """

    def __init__(self, inner: Optimizer) -> None:
        # No Optimizer.__init__: groups and state belong to the inner optimizer.
        self.inner = inner
        self.defaults = inner.defaults
        self.action: Callable[[], Any] = inner.step

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.action()


class DeepSpeed(Strategy):
    """ZeRO with the project's optimizers, learning-rate schedule, clip and checkpoints.

    Args:
        config: the stage, and whether optimizer state is in host memory.
        engine_bf16: under bf16, stages 2 and 3 keep bf16 weights next to the float32 partitions. Must be false if the
            curvature pass needs a float32 forward: then, and at stage 1, the weights are float32 under autocast, as
            with DDP.
    """

    shards_optimizer_state = True
    steps_in_parts = True

    def __init__(
        self,
        distributed: Distributed,
        config: DeepSpeedConfig,
        *,
        bf16: bool,
        compile_model: bool,
        engine_bf16: bool,
    ) -> None:
        super().__init__(distributed, bf16=bf16, compile_model=compile_model)
        self._config = config
        self._engine_bf16 = bf16 and engine_bf16 and config.zero_stage > 1

    def prepare(
        self,
        model: LanguageModel,
        weights: InitialWeights,
        build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]],
    ) -> None:
        import deepspeed

        self.distributed.ensure_group()
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._width = model.output_weight.size(1)
        optimizer = self._build_optimizer(build_optimizers)
        self._materialize(model, weights)
        for group in optimizer.param_groups:
            group["params"] = [model.get_parameter(name) for name in group["names"]]
        self._set_up_forward(model)
        self._client = EngineOptimizer(optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._client, config=self._engine_configuration()
        )
        self.model = model
        self.optimizers = [optimizer]
        self._partitions, self._fragments = _layout(self._engine.optimizer, model, self._shapes, self.distributed)
        if self._engine_bf16:  # the engine made the float32 partitions from rounded weights
            for exact, (_, whole), (fragment, _) in zip(self.weights(), weights.tensors(), self._placed(), strict=True):
                exact.copy_(fragment.cut(whole))

    def _build_optimizer(self, build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]]) -> Optimizer:
        """Build the optimizer over zero-memory stand-ins of the right shape: at stage 3, parameters have no shape."""
        device = torch.device("cpu") if self._config.offload_optimizer else self.device
        stand_ins = {name: torch.zeros((), device=device).expand(shape) for name, shape in self._shapes.items()}
        (optimizer,) = build_optimizers(stand_ins)
        return optimizer

    def _materialize(self, model: LanguageModel, weights: InitialWeights) -> None:
        """Put the weights into the model, at stage 3 one tensor at a time, so that no rank ever holds the whole model."""
        import deepspeed

        dtype = torch.bfloat16 if self._engine_bf16 else torch.float32
        for name, whole in weights.tensors():
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            owner.register_parameter(leaf, nn.Parameter(whole.to(self.device, dtype)))
            if self._config.zero_stage == 3 and not any(p.is_meta for p in owner.parameters(recurse=False)):
                deepspeed.zero.Init(module=owner, config_dict_or_path=self._engine_configuration(), dtype=dtype)

    def _set_up_forward(self, model: LanguageModel) -> None:
        """Enable autocast inside the engine, which disables an outer one, and register the head's use of the embedding."""
        import deepspeed

        forward = model.forward

        def under_autocast(
            tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None
        ) -> ModelOutput:
            with self.autocast():
                return forward(tokens, targets, uniforms)

        if self._engine_bf16:
            keep_norms_float32(model)
            keep_residual_float32(model)
        if self.compile_model:
            if self._config.zero_stage == 3:  # the engine gathers weights in hooks inside the blocks
                model.head.compile()
            else:
                model.compile()
        model.forward = under_autocast  # type: ignore[method-assign]
        if self._config.zero_stage == 3:
            deepspeed.zero.register_external_parameter(model, model.output_weight)

    def _engine_configuration(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self._config.zero_stage,
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
            "stage3_param_persistence_threshold": 10 * self._width,  # norms and biases stay gathered
        }
        if self._config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # `step` ends an accumulation, whatever it counted
            "gradient_clipping": 0.0,  # the optimizer clips, in its own kernel
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self._engine_bf16},
            "zero_optimization": zero,
            "steps_per_print": None,
        }

    def forward(self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None) -> ModelOutput:
        output: ModelOutput = self._engine(tokens, targets, uniforms)
        return output

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # stage 1 reduces in the engine's step, the others in every backward

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.distributed.world_size)  # the engine averages, but the shares must be summed

    def update_hessian(
        self, *, num_predictions: int | Tensor | None = None, estimates: Sequence[Tensor] | None = None
    ) -> Tensor:
        optimizer: Any = self._client.inner
        if estimates is None:
            with self._unnoticed():
                return self._engine_step(
                    lambda: optimizer.update_hessian(num_predictions=num_predictions), predictions=num_predictions
                ).skipped
        parts = self._parts_of(estimates)
        skipped = (~torch.isfinite(self.norm(parts))).float()
        if not skips_on_device(optimizer) and skipped:
            return skipped
        flat = {id(partition): torch.zeros_like(partition) for partition in self._partitions}
        for fragment, part in zip(self._fragments.values(), parts, strict=True):
            fragment.of(flat[id(self._partitions[fragment.partition])]).copy_(part)
        with self._all_partitions():
            optimizer.found_inf = skipped
            order = [partition for group in optimizer.param_groups for partition in group["params"]]
            optimizer.update_hessian(estimates=[flat[id(partition)] for partition in order])
            optimizer.found_inf = None
        return skipped

    def step(self, max_norm: float | None, loss: Tensor | None = None) -> StepStatistics:
        limit = float("inf") if max_norm is None else max_norm
        statistics = self._engine_step(self._client.inner.step, limit, loss=loss)
        counts = unclipped(self.optimizers)
        if counts is not None:
            # Divide by the model's size, not the partitions', which are padded.
            count = self.distributed.all_reduce(counts[0].to(self.device))
            statistics = statistics._replace(unclipped_fraction=count / self._size())
        return statistics

    def _engine_step(
        self,
        action: Callable[[], Any],
        limit: float = float("inf"),
        *,
        loss: Tensor | None = None,
        predictions: int | Tensor | None = None,
    ) -> StepStatistics:
        """Reduce the gradients and call the action once per partition, with clip and skip in its kernel.

        If the engine itself finds non-finite gradients (in float32, and at stage 3), it does not call the action.
        """
        optimizer: Any = self._client.inner

        def guarded() -> None:
            statistics = self._statistics(limit, loss, predictions)
            scale = torch.clamp(statistics.grad_norm / limit, min=1.0).nan_to_num(nan=1.0, posinf=1.0)
            # The CPU if offloaded, to which AdamW would copy the scale without waiting for it.
            where = self._partitions[0].device
            scale, skipped = scale.to(where), statistics.skipped.to(where)
            if not skips_on_device(optimizer):
                if not skipped:
                    torch._foreach_div_(gradients([optimizer]), scale)
                    action()
                return
            optimizer.found_inf, optimizer.grad_scale = skipped, scale
            action()
            optimizer.grad_scale = optimizer.found_inf = None

        self._client.action = guarded
        try:
            self._engine.step()
        finally:
            self._client.action = self._client.inner.step
        return self._statistics(limit, loss, predictions)

    def _statistics(self, limit: float, loss: Tensor | None, predictions: int | Tensor | None) -> StepStatistics:
        """Return the statistics of the last reduced gradients over all ranks. They are skipped if they, the loss or
        N ‖g‖², the bound of an estimate from N predictions, are not finite."""
        norm = torch.as_tensor(self._engine.optimizer._global_grad_norm, device=self.device, dtype=torch.float32)
        norm = torch.where(norm >= 0, norm, float("inf"))  # the engine reports a non-finite norm as -1
        finite = torch.isfinite(norm if predictions is None else norm.square() * predictions)
        if loss is not None:
            finite = finite & torch.isfinite(loss)
        return StepStatistics(norm, (norm > limit).float(), (~finite).float(), None)

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Restore the engine's counters after an engine step."""
        counters = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        saved = {name: getattr(self._engine, name) for name in counters}
        try:
            yield
        finally:
            for name, value in saved.items():
                setattr(self._engine, name, value)

    def zero_grad(self) -> None:
        self._engine.zero_grad()

    def normals(self, seed: int, step: int) -> list[Tensor]:
        form = self.compile_noise
        return [
            normals(seed, step, part.name, part.start, part.start + part.count, partition.device, compile=form)
            for part, partition in self._placed()
        ]

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        square = total_norm(tensors).square().to(self.device)
        return self.distributed.all_reduce(square).sqrt()

    def weights(self) -> list[Tensor]:
        return [fragment.of(partition.detach()) for fragment, partition in self._placed()]

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Copy the float32 partitions to the forward's weights, on all ranks."""
        engine = self._engine.optimizer
        if self._config.zero_stage < 3:
            engine.update_lp_params()
            return
        engine._partition_all_parameters()
        for index in range(len(engine.fp16_groups)):
            engine._reassign_or_swap_out_partitioned_parameters(index)
        if engine.persistent_parameters:
            engine.persistent_parameters[0].all_gather(engine.persistent_parameters)

    def take_gradients(self) -> list[Tensor]:
        taken: dict[int, Tensor] = {}

        def collect() -> None:
            for group in self._client.param_groups:
                for partition in group["params"]:
                    taken[id(partition)] = partition.grad.clone()

        with self._unnoticed():
            if self._engine_step(collect).skipped:  # nothing was collected: NaN has the estimate skipped
                return [torch.full_like(weight, float("nan")) for weight in self.weights()]
        return [fragment.of(taken[id(partition)]) for fragment, partition in self._placed()]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self._all_partitions(), super().evaluating():
            yield

    def curvature_state(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for fragment, partition in self._placed():
            state = self._client.state[partition]
            if {"hessian", "exp_avg"} <= state.keys():
                yield fragment.name, fragment.of(state["hessian"]), fragment.of(state["exp_avg"])

    def pieces(self) -> Iterator[Piece | NumberPiece]:
        for fragment, partition in self._placed():
            if fragment.count == 0:
                continue
            yield Piece(f"model.{fragment.name}", fragment.shape, fragment.start, fragment.of(partition.detach()))
            for key, value in self._client.state.get(partition, {}).items():
                check_savable(self._client.inner, key, value, partition, sharded=True)
                name = f"optimizer.{fragment.name}.{key}"
                if not isinstance(value, Tensor):
                    if fragment.start == 0:
                        yield NumberPiece(name, value)
                elif value.shape == partition.shape:
                    yield Piece(name, fragment.shape, fragment.start, fragment.of(value))
                elif fragment.start == 0:  # a count, shared by all parameters of the partition
                    yield Piece(name, tuple(value.shape), 0, value.reshape(-1).clone())

    @torch.no_grad()
    def load(self, reader: PieceReader) -> None:
        numbers = reader.numbers()
        tensors, counts = saved_keys(self._shapes, sorted(reader.names())), saved_keys(self._shapes, sorted(numbers))
        shared: dict[tuple[int, str], Any] = {}  # (partition, key) -> value of all its parameters
        for fragment, partition in self._placed():
            _read(fragment, fragment.of(partition), f"model.{fragment.name}", reader)
            state = self._client.state[partition]
            for key in tensors.get(fragment.name, ()):
                name = f"optimizer.{fragment.name}.{key}"
                if reader.shape(name) == fragment.shape:
                    if key not in state:
                        state[key] = torch.zeros_like(partition, dtype=reader.dtype(name))
                    _read(fragment, fragment.of(state[key]), name, reader)
                elif fragment.count:
                    group = self._client.param_groups[0]
                    count = reader.read(name, 0, 1).reshape(reader.shape(name))
                    _share(shared, fragment, key, count.item())
                    state[key] = count if counts_on_host(key, group) else count.to(partition.device)
            for key in counts.get(fragment.name, ()) if fragment.count else ():
                state[key] = _share(shared, fragment, key, numbers[f"optimizer.{fragment.name}.{key}"])
        self.weights_changed()

    def bytes_communicated(self, micro_batches: int) -> int:
        weight_bytes = BFLOAT16 if self._engine_bf16 else FLOAT32
        traffic = zero_traffic(
            self._size(),
            self.distributed.world_size,
            stage=self._config.zero_stage,
            weight_bytes=weight_bytes,
        )
        return traffic.total(micro_batches)

    def _size(self) -> int:
        """Return the number of parameters of the whole model."""
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def _placed(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield each parameter's fragment and its flat partition, in the model's order."""
        for fragment in self._fragments.values():
            yield fragment, self._partitions[fragment.partition]

    def _parts_of(self, estimates: Sequence[Tensor]) -> list[Tensor]:
        """Cut whole tensors to this rank's fragments; fragments stay as they are."""
        return [
            fragment.cut(estimate) if estimate.shape == fragment.shape else estimate
            for fragment, estimate in zip(self._fragments.values(), estimates, strict=True)
        ]

    @contextmanager
    def _all_partitions(self) -> Iterator[None]:
        """Give every group all of its partitions; outside its step the engine may leave groups empty."""
        optimizer = self._client.inner
        saved = [group["params"] for group in optimizer.param_groups]
        group_of = {name: index for index, group in enumerate(optimizer.param_groups) for name in group["names"]}
        members: list[dict[int, Tensor]] = [{} for _ in saved]
        for fragment, partition in self._placed():
            members[group_of[fragment.name]][id(partition)] = partition
        try:
            for group, partitions in zip(optimizer.param_groups, members, strict=True):
                group["params"] = list(partitions.values())
            yield
        finally:
            for group, partitions_before in zip(optimizer.param_groups, saved, strict=True):
                group["params"] = partitions_before


def _layout(
    engine: Any, model: LanguageModel, shapes: Mapping[str, tuple[int, ...]], distributed: Distributed
) -> tuple[list[Tensor], dict[str, Fragment]]:
    """Return the engine's flat float32 partitions on this rank, and each parameter's fragment."""
    parameters: dict[str, Any] = dict(model.named_parameters())  # with attributes set by the engine
    place = _place_at_stage_3 if hasattr(engine, "fp32_partitioned_groups_flat") else _place_at_stages_1_and_2
    partitions = getattr(engine, "fp32_partitioned_groups_flat", None) or engine.single_partition_of_fp32_groups
    fragments = {
        name: Fragment(name, shapes[name], *place(engine, parameter, distributed.rank))
        for name, parameter in parameters.items()
    }
    return list(partitions), fragments


def _place_at_stage_3(engine: Any, parameter: Any, rank: int) -> tuple[int, int, int, int]:
    """Return (start, count, partition, offset). Every rank has an equal part of every parameter, the last one padded."""
    partition, offset, padded = engine.grad_position[engine.get_param_id(parameter)]
    start = min(rank * padded, parameter.ds_numel)
    return start, min(padded, parameter.ds_numel - start), partition, offset


def _place_at_stages_1_and_2(engine: Any, parameter: Any, rank: int) -> tuple[int, int, int, int]:
    """Return the same. A group's parameters are concatenated and cut into one part per rank."""
    place = parameter._hp_mapping
    if place is not None:
        inside, outside = place.hp_fragment_address, place.lp_fragment_address
        return outside.start, outside.numel, place.param_group_index, inside.start
    group = next(i for i, members in enumerate(engine.bit16_groups) if any(p is parameter for p in members))
    return 0, 0, group, 0


def _share(shared: dict[tuple[int, str], Any], fragment: Fragment, key: str, value: Any) -> Any:
    """Return the value that all parameters of a partition share. Raises ValueError if they differ."""
    known = shared.setdefault((fragment.partition, key), value)
    if known != value and not (known != known and value != value):
        raise ValueError(
            f"state[{key!r}] of {fragment.name} is {value}, but {known} for another parameter of its partition; resume "
            "under strategy=ddp or fsdp"
        )
    return value


def _read(fragment: Fragment, into: Tensor, name: str, reader: PieceReader) -> None:
    if reader.shape(name) != fragment.shape:
        raise ValueError(f"{name} has shape {reader.shape(name)} in the checkpoint, {fragment.shape} here")
    into.copy_(reader.read(name, fragment.start, fragment.start + fragment.count))
