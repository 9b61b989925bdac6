"""Parameters, gradients and optimizer state sharded over the ranks, block by block (FSDP2, `fully_shard`).

Each parameter is a DTensor split along dimension 0. The optimizers step the shards, and their state is sharded alike. The
embeddings and the final norm form one group, gathered for the whole forward and backward because the head uses the token
embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from models import LanguageModel, ModelOutput
from training.config import FSDPConfig
from training.distributed import Distributed
from training.strategies.base import NumberPiece, Piece, PieceReader, StepStatistics, Strategy
from training.strategies.communication import BFLOAT16, FLOAT32, fsdp_traffic
from training.strategies.gradients import clip_and_step, unclipped, update_hessian
from training.strategies.precision import keep_norms_float32
from training.strategies.state import load_state, saved_state, sharded_pieces
from training.weights import InitialWeights


class FSDP(Strategy):
    """Every rank holds 1/W of weights, gradients and optimizer state.

    Args:
        config: whether blocks keep their activations and gathered weights from forward to backward.
        gather_bf16: under bf16, gather the blocks' weights in bf16, for half the bytes. The products are the same, since
            autocast rounds the weights anyway. Must be false if the curvature pass needs a float32 forward.
    """

    shards_optimizer_state = True

    def __init__(
        self,
        distributed: Distributed,
        config: FSDPConfig,
        *,
        bf16: bool,
        compile_model: bool,
        gather_bf16: bool,
    ) -> None:
        super().__init__(distributed, bf16=bf16, compile_model=compile_model)
        self._config = config
        self._gather_bf16 = bf16 and gather_bf16

    def prepare(
        self,
        model: LanguageModel,
        weights: InitialWeights,
        build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]],
    ) -> None:
        self.distributed.ensure_group()
        mesh = init_device_mesh(self.device.type, (self.distributed.world_size,))
        # Gradients are always reduced in float32. Inputs stay as autocast leaves them: the residual stream is float32, as
        # without sharding.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self._gather_bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        if self._gather_bf16:
            keep_norms_float32(model)
        if self.compile_model:
            model.head.compile()
        for block in model.blocks:
            # The engine's hooks stay outside of what is compiled or recomputed.
            block.forward = _forward_of(  # type: ignore[method-assign]
                block, compiled=self.compile_model, checkpointed=self._config.activation_checkpointing
            )
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self._config.reshard_after_forward)
        root = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._sharded: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=root)
        # Each rank's loss is its share of the mean: shares are summed, not averaged.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.model = model.to_empty(device=self.device)
        weights.apply(self.model)
        self._parameters = dict(self.model.named_parameters())
        self.optimizers = build_optimizers(self._parameters)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None) -> ModelOutput:
        with self.autocast():
            output: ModelOutput = self.model(tokens, targets, uniforms)
        if not torch.is_grad_enabled():
            self._sharded.reshard()  # no backward will release the root's gathered weights
        return output

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update_hessian(
        self, *, num_predictions: int | Tensor | None = None, estimates: Sequence[Tensor] | None = None
    ) -> Tensor:
        return update_hessian(self.optimizers, self._parameters.values(), num_predictions, estimates)

    def step(self, max_norm: float | None, loss: Tensor | None = None) -> StepStatistics:
        statistics = clip_and_step(self.optimizers, max_norm, loss)
        self.zero_grad()
        counts = unclipped(self.optimizers)
        if counts is not None:
            self.distributed.all_reduce(counts)
            statistics = statistics._replace(unclipped_fraction=counts[0] / counts[1])
        return statistics

    def parameters(self) -> dict[str, Tensor]:
        # Not read from the module: while weights are gathered, it shows whole tensors instead of shards.
        return dict(self._parameters)

    def pieces(self) -> Iterator[Piece | NumberPiece]:
        return sharded_pieces(saved_state(self._parameters, self.optimizers), is_main=self.distributed.is_main)

    def load(self, reader: PieceReader) -> None:
        load_state(self._parameters, self.optimizers, reader)

    def bytes_communicated(self, micro_batches: int) -> int:
        in_blocks = sum(p.numel() for name, p in self._parameters.items() if name.startswith("blocks."))
        traffic = fsdp_traffic(
            in_blocks,
            sum(p.numel() for p in self._parameters.values()) - in_blocks,
            self.distributed.world_size,
            block_bytes=BFLOAT16 if self._gather_bf16 else FLOAT32,
            reshard_after_forward=self._config.reshard_after_forward,
        )
        return traffic.total(micro_batches)


def _forward_of(block: nn.Module, *, compiled: bool, checkpointed: bool) -> Callable[..., Any]:
    forward: Callable[..., Any] = block.forward
    if compiled:
        forward = torch.compile(forward)
    if checkpointed:
        forward = partial(checkpoint, forward, use_reentrant=False)
    return forward
