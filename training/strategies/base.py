"""The interface of a strategy: forward, backward, curvature, step, and its state as pieces of full tensors.

The loop does not know which strategy it uses. A strategy owns the wrapped model, the optimizers, the precision and the
reduction of gradients. Only its class knows its engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from models import LanguageModel, ModelOutput
from sophia.random import normals_like
from training.distributed import Distributed
from training.external import has_evaluation_mode
from training.weights import InitialWeights

# Share of ‖θ‖ by which a central difference moves the weights. Smaller steps drown in float32 rounding, larger ones in
# the cubic term.
DIFFERENCE_SHARE = 1e-3


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """() float32, the Euclidean norm over all elements of all tensors.

    The tensors are either all whole or all sharded (DTensor) over one mesh dimension; shards need one sum over ranks.
    torch.nn.utils.get_total_norm would reduce them tensor by tensor.
    """
    listed = list(tensors)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in listed]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(local)).float())
    if isinstance(listed[0], DTensor):
        square = norm.square()
        dist.all_reduce(square, group=listed[0].device_mesh.get_group())
        norm = square.sqrt()
    return norm


class Piece(NamedTuple):
    """A contiguous range of a full tensor's elements in row-major order, held by this rank.

    It describes rows of a matrix (FSDP), a fragment of a flat partition (ZeRO) or a whole tensor.
    """

    name: str  # "model.<parameter>" or "optimizer.<parameter>.<state>"
    shape: tuple[int, ...]  # of the full tensor
    start: int  # index of the first element
    values: Tensor  # (n,) flat


#: What optimizer state may hold in addition to tensors; stored in a checkpoint's manifest.
Number = int | float | bool | None
#: The dtypes that a checkpoint can store.
SAVED_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class NumberPiece(NamedTuple):
    """A number of an optimizer's state, yielded by one rank."""

    name: str  # "optimizer.<parameter>.<state>" or "group.<parameter>.<key>"
    value: Number


class PieceReader(Protocol):
    """A checkpoint's full tensors, readable in part, and numbers."""

    def numbers(self) -> Mapping[str, Number]: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) the elements [start, stop) of the full tensor, on the CPU."""
        ...


class StepStatistics(NamedTuple):
    """0-D tensors on the device; the caller decides when to read them and wait."""

    grad_norm: Tensor  # of the mean gradient, before the clip
    clipped: Tensor  # 1 if the norm was above the limit
    skipped: Tensor  # 1 if a non-finite loss or gradient left weights and state unchanged
    unclipped_fraction: Tensor | None  # Sophia: share of coordinates with |m| < γh


class Strategy(ABC):
    """One way to run a model over the ranks.

    Args:
        distributed: this process's rank and world size.
        bf16: run the forward in bf16 (parameters and optimizer state stay float32).
        compile_model: compile the model in place.
    """

    model: LanguageModel
    optimizers: list[Optimizer]

    def __init__(self, distributed: Distributed, *, bf16: bool, compile_model: bool) -> None:
        self.distributed = distributed
        self.device = distributed.device
        self.bf16 = bf16
        self.compile_model = compile_model
        self.compile_noise = None if compile_model else False  # as sophia.random takes it

    @abstractmethod
    def prepare(
        self,
        model: LanguageModel,  # on the meta device
        weights: InitialWeights,
        build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]],
    ) -> None:
        """Put the weights on the device, wrap the model, and build the optimizers over the parameters they step."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None) -> ModelOutput:
        """Return the model's losses, in the run's precision, through the engine's hooks."""

    @abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward of an accumulation; gradients are reduced in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the global mean loss.

        After the last micro-batch, gradients hold the sum over the micro-batches and over the ranks.
        """

    @abstractmethod
    def update_hessian(
        self, *, num_predictions: int | Tensor | None = None, estimates: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Fold an estimate into h: from the gradients and N, or from one tensor per parameter, in the parameters' order.

        N is an integer, or a 0-D tensor on the device, which is not read back to the host.

        The tensors are whole, or have the form of `normals`. Estimates that are not finite, or whose N g² would not be,
        are skipped. `zero_grad` clears the gradients afterwards.

        Returns a 0-D tensor on the device: 1 if the estimate was skipped.
        """

    @abstractmethod
    def step(self, max_norm: float | None, loss: Tensor | None = None) -> StepStatistics:
        """Clip the global norm of the mean gradient, update the weights and clear the gradients.

        Args:
            max_norm: None disables clipping.
            loss: 0-D, on the device, the same on all ranks. If it or the gradient is not finite, weights and state do
                not change.
        """

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Run forwards in float32, whatever the run's precision."""
        bf16, self.bf16 = self.bf16, False
        try:
            yield
        finally:
            self.bf16 = bf16

    def parameter_normals(self, seed: int, step: int) -> list[Tensor]:
        """Return Hutchinson's noise u ~ N(0, I), one tensor in the form of each parameter of the model."""
        return [normals_like(p, seed, step, name, compile=self.compile_noise) for name, p in self.parameters().items()]

    def normals(self, seed: int, step: int) -> list[Tensor]:
        """Return the same noise; under a sharding strategy, this rank's part of it."""
        return self.parameter_normals(seed, step)

    def difference_step(self, directions: Sequence[Tensor]) -> Tensor:
        """() δ of a central difference along `directions`, on their device: DIFFERENCE_SHARE ‖θ‖ / ‖directions‖, or
        DIFFERENCE_SHARE if all weights are zero."""
        size = self.norm(self.weights())
        step = torch.where(size > 0, DIFFERENCE_SHARE * size / self.norm(directions), DIFFERENCE_SHARE)
        return step.to(directions[0].device)

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """() the Euclidean norm of tensors in the form of `normals`, over all ranks."""
        return total_norm(tensors)

    def weights(self) -> list[Tensor]:
        """Return the float32 weights that the optimizers step, in the form of `normals`. They may be changed in place."""
        return [p.detach() for p in self.parameters().values()]

    def weights_changed(self) -> None:  # noqa: B027 (most forwards read `weights()` themselves)
        """Call it after changing `weights()`, before the next forward."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put optimizers with an evaluation mode into it. On exit the weights of training are restored bit for bit."""
        modal: list[Any] = [optimizer for optimizer in self.optimizers if has_evaluation_mode(optimizer)]
        if not modal:
            yield
            return
        with self._restored():
            try:
                for optimizer in modal:
                    optimizer.eval()
                self.weights_changed()
                yield
            finally:
                for optimizer in modal:
                    optimizer.train()

    @contextmanager
    def perturbed(self, directions: Sequence[Tensor], scale: Tensor) -> Iterator[None]:
        """Move the weights by `scale` (0-D) times the directions. On exit they are restored bit for bit."""
        with self._restored():
            for weight, direction in zip(self.weights(), directions, strict=True):
                weight.add_(direction * scale)
            self.weights_changed()
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """On exit the weights are those of the entry, bit for bit."""
        weights = self.weights()
        saved = [w.clone() for w in weights]
        try:
            yield
        finally:
            for weight, original in zip(weights, saved, strict=True):
                weight.copy_(original)
            self.weights_changed()

    def take_gradients(self) -> list[Tensor]:
        """Return the reduced gradients in the form of `normals` and clear them here."""
        taken = []
        for name, parameter in self.parameters().items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient after a backward pass")
            taken.append(parameter.grad.clone())
        self.zero_grad()
        return taken

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name, in the model's order; shards if the strategy shards."""
        return dict(self.model.named_parameters())

    #: Whether each rank holds only a part of `curvature_state()`.
    shards_optimizer_state: bool = False
    #: Whether one update calls the optimizer's `step` several times, each with some of its groups' parameters.
    steps_in_parts: bool = False

    def curvature_state(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, h, m) of each parameter, whole or this rank's part; nothing if the optimizer has other names."""
        (optimizer,) = self.optimizers
        for name, parameter in self.parameters().items():
            state = optimizer.state.get(parameter, {})
            hessian, momentum = state.get("hessian"), state.get("exp_avg")
            if isinstance(hessian, Tensor) and isinstance(momentum, Tensor):
                yield name, hessian, momentum

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's learning rate to its peak times the factor."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    @abstractmethod
    def pieces(self) -> Iterator[Piece | NumberPiece]:
        """Yield this rank's part of weights and optimizer state. Over all ranks, each element is in exactly one piece.

        Raises:
            ConfigurationError: the optimizer keeps state that a checkpoint cannot store.
        """

    @abstractmethod
    def load(self, reader: PieceReader) -> None:
        """Load weights and optimizer state from a checkpoint written by any strategy at any world size."""

    @abstractmethod
    def bytes_communicated(self, micro_batches: int) -> int:
        """Return the bytes that each rank sends for one update with this many micro-batches."""


class KeepsGraphs(Strategy):
    """A strategy that can defer the reduction of gradients and differentiate one forward twice.

    Engines that gather weights for a forward and its backward, or that own the gradients, cannot.
    """

    @abstractmethod
    def forward_locally(
        self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None
    ) -> ModelOutput:
        """`forward` without the engine's hooks: gradients stay on this rank until `reduce_gradients`."""

    @abstractmethod
    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None: ...

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum the `.grad` of local backwards over the ranks, as the last micro-batch's `backward` does."""
