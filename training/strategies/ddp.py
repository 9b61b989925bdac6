"""Replicas with averaged gradients (DistributedDataParallel); a plain single process at world size 1."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from models import LanguageModel, ModelOutput
from training.strategies.base import KeepsGraphs, NumberPiece, Piece, PieceReader, StepStatistics
from training.strategies.communication import ddp_traffic
from training.strategies.gradients import clip_and_step, unclipped, update_hessian
from training.strategies.state import assigned_pieces, load_state, saved_state
from training.weights import InitialWeights

# Small gradients are reduced together, in buckets of DDP's size.
BUCKET_BYTES = 25 * 2**20


class DDP(KeepsGraphs):
    """Every rank holds the whole model and the whole optimizer state."""

    def prepare(
        self,
        model: LanguageModel,
        weights: InitialWeights,
        build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]],
    ) -> None:
        self.model = model.to_empty(device=self.device)
        weights.apply(self.model)
        if self.compile_model:
            self.model.compile()
        self.optimizers = build_optimizers(self.parameters())
        self._wrapped: nn.Module = self.model
        if self.distributed.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None) -> ModelOutput:
        # Without gradients there is nothing to reduce: evaluation goes past the wrapper.
        module = self._wrapped if torch.is_grad_enabled() else self.model
        with self.autocast():
            return module(tokens, targets, uniforms)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        # DDP averages over the ranks, but the shares must be summed.
        (loss * self.distributed.world_size).backward(retain_graph=retain_graph)

    def forward_locally(
        self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None
    ) -> ModelOutput:
        # DDP's hooks do not run in a backward unless a forward of the wrapper has armed them.
        with self.autocast():
            return self.model(tokens, targets, uniforms)

    def reduce_gradients(self) -> None:
        parameters = list(self.model.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no share of the batch
                parameter.grad = torch.zeros_like(parameter)
        if self.distributed.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(gradients, self.distributed.world_size)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket]) if len(bucket) > 1 else bucket[0]
            self.distributed.all_reduce(flat)
            if len(bucket) > 1:
                parts = flat.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    def update_hessian(
        self, *, num_predictions: int | Tensor | None = None, estimates: Sequence[Tensor] | None = None
    ) -> Tensor:
        return update_hessian(self.optimizers, self.parameters().values(), num_predictions, estimates)

    def step(self, max_norm: float | None, loss: Tensor | None = None) -> StepStatistics:
        statistics = clip_and_step(self.optimizers, max_norm, loss)
        self.zero_grad()
        counts = unclipped(self.optimizers)
        return statistics if counts is None else statistics._replace(unclipped_fraction=counts[0] / counts[1])

    def pieces(self) -> Iterator[Piece | NumberPiece]:
        tensors = saved_state(self.parameters(), self.optimizers)
        return assigned_pieces(tensors, self.distributed.rank, self.distributed.world_size)

    def load(self, reader: PieceReader) -> None:
        load_state(self.parameters(), self.optimizers, reader)

    def bytes_communicated(self, micro_batches: int) -> int:
        parameters = sum(p.numel() for p in self.model.parameters())
        return ddp_traffic(parameters, self.distributed.world_size).total(micro_batches)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, as many together as fit into a bucket; a larger one alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
