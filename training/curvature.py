"""The curvature pass: every k steps, before the step, estimate the Hessian's diagonal on a share of the batch.

    slice: the batch's sequences i < max(1, round(batch_fraction · B)); a rank without any takes part with weight zero
    gnb                    sampled labels, backward of their mean loss, ĥ = N ĝ ⊙ ĝ
    empirical_fisher       the same with the training labels
    hutchinson             ĥ = u ⊙ (∇²L u), the product by double backward
    hutchinson_differences ĥ = u ⊙ (∇L(θ + δu) − ∇L(θ − δu)) / 2δ, in float32

If the strategy can differentiate one forward twice, Gauss-Newton-Bartlett needs no forward of its own and samples its
labels from the softmax of the training forward (`run_within_training`). Otherwise `run` does a separate pass.

N counts the actual predictions. The estimate is never clipped by norm. Formulas: Liu et al. 2024, section 2.3.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from models.flops import Flops
from sophia import random, refresh_due
from training.config import CurvatureSettings, OptimizerSettings
from training.hardware import to_device
from training.recording.ledger import Ledger
from training.strategies.base import KeepsGraphs, Strategy
from training.strategies.communication import FLOAT32, all_reduce_bytes


class CurvatureSlice(NamedTuple):
    """A micro-batch of this rank's share of the slice. Rows beyond the share are padding with weight zero."""

    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, -100 in padding
    positions: Tensor  # (b, T) int64, global position in the batch: sequence index · T + position; -1 in padding


class CurvaturePass:
    """Runs the curvature pass of one optimizer configuration under any strategy.

    Args:
        config: the section of an optimizer with curvature estimates.
        seed: the curvature seed; labels and noise are pure functions of it, the step and the global position.
        global_batch_size: B, sequences in a training batch.
        micro_batch_size: maximum number of sequences per forward on a rank.
        shared_forward: whether labels may be sampled in the training forward.
        progress: called before each micro-batch of a pass.
    """

    def __init__(
        self,
        config: CurvatureSettings,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        *,
        shared_forward: bool = False,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._progress = progress
        self._shared_forward = shared_forward
        self.interval = config.hessian_interval
        self.estimator = config.estimator
        self._seed = seed
        self.sequences = max(1, round(config.batch_fraction * global_batch_size))
        self._micro_batch_size = micro_batch_size

    @classmethod
    def of(
        cls,
        config: OptimizerSettings,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        *,
        shared_forward: bool = False,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> "CurvaturePass | None":
        """Return the pass of a configuration, or None if its optimizer has none."""
        if config.curvature is None:
            return None
        return cls(
            config.curvature,
            seed,
            global_batch_size,
            micro_batch_size,
            shared_forward=shared_forward,
            progress=progress,
        )

    def due(self, step: int) -> bool:
        """Return whether step t is one of 1, 1 + k, 1 + 2k, …; unlike the optimizer's count, t includes skipped steps."""
        return refresh_due(step, self.interval)

    def run(self, strategy: Strategy, batch: Batch, step: int) -> Tensor:
        """Estimate at the current weights and fold the estimate into h. Gradients are clear before and after.

        The pass does not change the dropout masks of training.

        Returns 1 (0-D, on the device) if a non-finite estimate was skipped, else 0.
        """
        slices = list(self.slices(strategy, batch))
        num_predictions = self._count_predictions(strategy, slices)
        with random.generators_kept([strategy.device]):
            match self.estimator:
                case "hutchinson":
                    product = self._product(strategy, slices, step, num_predictions)
                    skipped = strategy.update_hessian(estimates=product)
                case "hutchinson_differences":
                    quotient = self._differences(strategy, slices, step, num_predictions)
                    skipped = strategy.update_hessian(estimates=quotient)
                case _:
                    loss = self._sampled_loss(step) if self.estimator == "gnb" else _training_loss
                    self._backward(strategy, slices, loss, num_predictions)
                    skipped = strategy.update_hessian(num_predictions=num_predictions)
        strategy.zero_grad()
        return skipped

    @property
    def within_training(self) -> bool:
        """Whether the training forward provides all that a refresh needs: the logits to sample labels from."""
        return self._shared_forward and self.estimator == "gnb"

    def shares_forward(self, strategy: Strategy) -> TypeGuard[KeepsGraphs]:
        """Return whether this pass can share the training forward under this strategy."""
        return self.within_training and isinstance(strategy, KeepsGraphs)

    def run_within_training(
        self, strategy: KeepsGraphs, batch: Batch, step: int, predictions: int, ledger: Ledger
    ) -> tuple[Tensor, int, Tensor]:
        """Do `run` and the training forward and backward of the slice's sequences, with one forward for both.

        h equals that of `run` up to rounding. The gradients of the training loss are left in `.grad`. If the slice has
        several micro-batches, both gradients are in memory.

        Args:
            predictions: number of predictions in the training batch, over all ranks.
            ledger: books the extra cost of the estimate as curvature.

        Returns:
            This rank's share of the mean training loss over the sequences done (0-D); the number of this rank's
            sequences done; 1 (0-D, on the device) if a non-finite estimate was skipped, else 0.
        """
        parameters = list(strategy.parameters().values())
        parts = list(self._own_rows(strategy, batch))
        num_predictions = self._count_predictions(strategy, parts)
        training: list[Tensor | None] = [None] * len(parameters)
        share = torch.zeros((), device=strategy.device)
        skipped = None
        for index, part in enumerate(self._reported(parts)):
            with ledger.measure("forward_backward", part=True):
                uniforms = random.uniforms(self._seed, step, part.positions)
                output = strategy.forward_locally(part.tokens, part.targets, uniforms)
                assert output.loss_sum is not None
                assert output.sampled_loss_sum is not None
            with ledger.measure("curvature", part=True):
                strategy.backward(output.sampled_loss_sum / num_predictions, retain_graph=True)
                if index == len(parts) - 1:
                    skipped = self._fold(strategy, num_predictions)
            with ledger.measure("forward_backward", part=True):
                curvature = _exchange_gradients(parameters, training)
                strategy.backward(output.loss_sum / predictions)
                share += output.loss_sum.detach() / predictions
                if skipped is None:
                    training = _exchange_gradients(parameters, curvature)
        if skipped is None:  # this rank has no sequence of the slice
            skipped = self._fold(strategy, num_predictions)
        return share, sum(len(part.tokens) for part in parts), skipped

    @staticmethod
    def _fold(strategy: KeepsGraphs, num_predictions: Tensor) -> Tensor:
        strategy.reduce_gradients()
        skipped = strategy.update_hessian(num_predictions=num_predictions)
        strategy.zero_grad()
        return skipped

    def _own_rows(self, strategy: Strategy, batch: Batch) -> Iterator[CurvatureSlice]:
        """Yield this rank's sequences of the slice in micro-batches, without padding: their number may differ by rank."""
        mine = self._rows_of(strategy)
        for first in range(0, mine, self._micro_batch_size):
            yield _part_of(batch, range(first, min(first + self._micro_batch_size, mine)), mine, strategy.device)

    def covers_batch(self, rows: int, world_size: int) -> bool:
        """Return whether the slice includes all `rows` sequences of some rank."""
        return -(-self.sequences // world_size) >= rows

    def slices(self, strategy: Strategy, batch: Batch) -> Iterator[CurvatureSlice]:
        """Yield this rank's micro-batches, padded to the same number and shape on every rank."""
        world_size = strategy.distributed.world_size
        rows = -(-self.sequences // world_size)  # the largest share of a rank
        size = -(-rows // self._micro_batches(world_size))
        for first in range(0, rows, size):
            yield _part_of(batch, range(first, first + size), self._rows_of(strategy), strategy.device)

    def _rows_of(self, strategy: Strategy) -> int:
        """Return the number of sequences of the slice on this rank."""
        return len(range(strategy.distributed.rank, self.sequences, strategy.distributed.world_size))

    def _count_predictions(self, strategy: Strategy, slices: list[CurvatureSlice]) -> Tensor:
        """() int64 on the device: N over all ranks. The host does not wait for it."""
        local = torch.zeros((), dtype=torch.int64, device=strategy.device)
        for part in slices:
            local += (part.positions >= 0).sum()
        return strategy.distributed.all_reduce(local)

    def _sampled_loss(self, step: int) -> "Callable[[Strategy, CurvatureSlice], Tensor]":
        """Return a function that sums the losses of sampled labels over a micro-batch."""

        def sampled(strategy: Strategy, part: CurvatureSlice) -> Tensor:
            drawn = random.uniforms(self._seed, step, part.positions.clamp(min=0))
            uniforms = torch.where(part.positions >= 0, drawn, -1.0)
            loss = strategy.forward(part.tokens, None, uniforms).sampled_loss_sum
            assert loss is not None
            return loss

        return sampled

    def _reported(self, parts: list[CurvatureSlice]) -> Iterator[CurvatureSlice]:
        """Yield micro-batches, and report progress before each."""
        for number, part in enumerate(parts, start=1):
            self._progress(f"in the curvature pass, micro-batch {number} of {len(parts)}")
            yield part

    def _backward(
        self,
        strategy: Strategy,
        slices: list[CurvatureSlice],
        loss: Callable[[Strategy, CurvatureSlice], Tensor],
        num_predictions: Tensor,
    ) -> None:
        """Leave the gradient of the mean loss over all ranks' predictions in `.grad`."""
        for index, part in enumerate(self._reported(slices)):
            with strategy.micro_batch(last=index == len(slices) - 1):
                strategy.backward(loss(strategy, part) / num_predictions)

    def _product(
        self, strategy: Strategy, slices: list[CurvatureSlice], step: int, num_predictions: Tensor
    ) -> list[Tensor]:
        """Return u ⊙ (∇²L u), by double backward through the whole model on every rank and a sum over the ranks."""
        parameters = list(strategy.parameters().values())
        noise = strategy.parameter_normals(self._seed, step)
        products = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        with strategy.model.maths_attention(), strategy.autocast():
            for part in self._reported(slices):
                loss_sum = strategy.model(part.tokens, part.targets).loss_sum
                first = torch.autograd.grad(loss_sum / num_predictions, parameters, create_graph=True)
                second = torch.autograd.grad(first, parameters, grad_outputs=noise)
                torch._foreach_add_(products, [s.to(p.dtype) for s, p in zip(second, products, strict=True)])
        for product in products:
            strategy.distributed.all_reduce(product)
        torch._foreach_mul_(products, noise)
        return products

    def _differences(
        self, strategy: Strategy, slices: list[CurvatureSlice], step: int, num_predictions: Tensor
    ) -> list[Tensor]:
        """Return u ⊙ (∇L(θ + δu) − ∇L(θ − δu)) / 2δ with the same dropout masks; θ is restored from a copy."""
        noise = strategy.normals(self._seed, step)
        with strategy.full_precision():
            delta = strategy.difference_step(noise)

            def gradient_at(scale: Tensor) -> list[Tensor]:
                with strategy.perturbed(noise, scale):
                    self._backward(strategy, slices, _training_loss, num_predictions)
                    return strategy.take_gradients()

            with random.generators_kept([strategy.device]):
                estimates = gradient_at(delta)
            torch._foreach_sub_(estimates, gradient_at(-delta))
        torch._foreach_mul_(estimates, noise)
        torch._foreach_div_(estimates, 2 * delta)
        return estimates

    def bytes_communicated(self, strategy: Strategy) -> int:
        """Return the bytes that each rank sends in a refresh."""
        world_size = strategy.distributed.world_size
        if self.estimator == "hutchinson":  # the products are reduced outside the engine
            parameters = sum(p.numel() for p in strategy.parameters().values())
            return all_reduce_bytes(FLOAT32 * parameters, world_size)
        passes = 2 if self.estimator == "hutchinson_differences" else 1
        return passes * strategy.bytes_communicated(self._micro_batches(world_size))

    def _micro_batches(self, world_size: int) -> int:
        """Return the number of forwards of a pass on each rank."""
        rows = -(-self.sequences // world_size)  # the largest share of a rank
        return -(-rows // self._micro_batch_size)

    def tokens(self, sequence_length: int) -> int:
        """Return the number of tokens in a refresh, over all ranks."""
        return self.sequences * sequence_length

    def flops(self, forward: Flops, sequence_length: int, *, shared_forward: bool = False) -> int:
        """Return the model FLOPs of a refresh over all ranks, including its own forwards, from those of a forward."""
        tokens = self.tokens(sequence_length)
        if shared_forward:
            return forward.gauss_newton_bartlett(tokens, own_forward=False)
        match self.estimator:
            case "hutchinson":
                return forward.hutchinson_exact(tokens)
            case "hutchinson_differences":
                return forward.hutchinson_differences(tokens)
            case _:
                return forward.forward_backward(tokens)


def _part_of(batch: Batch, rows: range, real: int, device: torch.device) -> CurvatureSlice:
    """Take rows of the rank's batch; rows from `real` on are padding."""
    row = np.arange(rows.start, rows.stop)
    taken = row.clip(max=len(batch.indices) - 1)
    positions = batch.indices[taken, None] * batch.tokens.shape[1] + np.arange(batch.tokens.shape[1])
    targets = batch.targets[taken]
    if rows.stop > real:
        targets, positions = (np.where(row[:, None] < real, a, b) for a, b in ((targets, -100), (positions, -1)))
    arrays = (batch.tokens[taken], targets, positions)
    return CurvatureSlice(*(to_device(array, device) for array in arrays))


def _training_loss(strategy: Strategy, part: CurvatureSlice) -> Tensor:
    loss = strategy.forward(part.tokens, part.targets).loss_sum
    assert loss is not None
    return loss


def _exchange_gradients(parameters: Sequence[Tensor], incoming: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Put `incoming` into `.grad` and return the previous gradients, without copies."""
    outgoing = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, incoming, strict=True):
        parameter.grad = gradient
    return outgoing
