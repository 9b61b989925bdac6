"""What the loop asks of a strategy: forward, backward, curvature, step, and its state as pieces of full tensors.

The loop does not know which strategy it has. A strategy owns the wrapped model, the optimizers, the precision and the
reduction of gradients; it is small, and its own class alone knows its engine.
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

from models import GPT2, GPT2Output
from sophia.random import normals_like
from training.distributed import Distributed
from training.weights import InitialWeights

# Share of ‖θ‖ by which a central difference moves the weights: smaller drowns in float32's rounding, larger in the
# cubic term.
DIFFERENCE_SHARE = 1e-3


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """() float32, the Euclidean norm over all elements of all tensors: of shards (DTensor) by one sum over ranks.

    Tensors are either all whole or all sharded over one mesh dimension. torch.nn.utils.get_total_norm would reduce
    shards tensor by tensor.
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

    Rows of a matrix (FSDP), a fragment of a flat partition (ZeRO) and a whole tensor are all of this form.
    """

    name: str  # "model.<parameter>" or "optimizer.<parameter>.<state>"
    shape: tuple[int, ...]  # of the full tensor
    start: int  # index of the first element
    values: Tensor  # (n,) flat


#: What a state may hold besides tensors, and a checkpoint's manifest holds as it is.
Number = int | float | bool | None
#: The types of tensor that a checkpoint holds.
SAVED_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class NumberPiece(NamedTuple):
    """A number of an optimizer's state; one rank has it."""

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
    """0-D tensors on the device: reading them is the caller's choice of when to wait."""

    grad_norm: Tensor  # of the mean gradient, before the clip
    clipped: Tensor  # 1 where the norm was above the limit
    skipped: Tensor  # 1 where a non-finite loss or gradient left weights and state alone
    unclipped_fraction: Tensor | None  # Sophia: share of coordinates with |m| < γh


class Strategy(ABC):
    """One way of running a model over the ranks.

    Args:
        distributed: this process's place.
        bf16: run the forward under bf16 (parameters and optimizer state stay float32).
        compile_model: compile the model in place.
    """

    model: GPT2
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
        model: GPT2,  # on the meta device
        weights: InitialWeights,
        build_optimizers: Callable[[Mapping[str, Tensor]], list[Optimizer]],
    ) -> None:
        """Put the weights on the device, wrap the model, build the optimizers over the parameters that they step."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None) -> GPT2Output:
        """The model's losses, in the run's precision, through the engine's hooks."""

    @abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """The surroundings of one forward and backward of an accumulation; gradients are reduced in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the global mean loss.

        After the last micro-batch, gradients hold the sum over the micro-batches and over the ranks.
        """

    @abstractmethod
    def update_hessian(
        self, *, num_predictions: int | None = None, estimates: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Fold an estimate into h: from the gradients and N, or from a tensor for each parameter in their order.

        The tensors are whole, or have the form of `normals`. An estimate that is not finite, or N g² that would not be,
        never enters h. What is left of the gradients is for `zero_grad` to clear.

        Returns 1 (0-D, on the device) where an estimate was held back.
        """

    @abstractmethod
    def step(self, max_norm: float | None, loss: Tensor | None = None) -> StepStatistics:
        """Clip the global norm of the mean gradient, update the weights, clear the gradients.

        Args:
            max_norm: None clips nothing.
            loss: 0-D, on the device, the same on all ranks; where it or the gradient is not finite, weights and state
                stay as they are.
        """

    @abstractmethod
    def zero_grad(self) -> None: ...

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The forward in float32, whatever the run's precision."""
        bf16, self.bf16 = self.bf16, False
        try:
            yield
        finally:
            self.bf16 = bf16

    def parameter_normals(self, seed: int, step: int) -> list[Tensor]:
        """Hutchinson's noise u ~ N(0, I) in the form of each parameter of the model."""
        return [normals_like(p, seed, step, name, compile=self.compile_noise) for name, p in self.parameters().items()]

    def normals(self, seed: int, step: int) -> list[Tensor]:
        """The same noise for each parameter, where the strategy shards this rank's part of it."""
        return self.parameter_normals(seed, step)

    def difference_step(self, directions: Sequence[Tensor]) -> Tensor:
        """() δ for a central difference along `directions`: a share of the weights' norm over the directions' norm, or the
        share itself where all weights are zero."""
        size = self.norm(self.weights())
        return torch.where(size > 0, DIFFERENCE_SHARE * size / self.norm(directions), DIFFERENCE_SHARE)

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """() the Euclidean norm over tensors in the form of `normals`, over all ranks."""
        return total_norm(tensors)

    def weights(self) -> list[Tensor]:
        """The float32 weights that the optimizers step, in the form of `normals`, to be changed in place."""
        return [p.detach() for p in self.parameters().values()]

    def weights_changed(self) -> None:  # noqa: B027 (most forwards read `weights()` themselves)
        """To be called after `weights()` have been changed, before the next forward."""

    @contextmanager
    def perturbed(self, directions: Sequence[Tensor], scale: Tensor) -> Iterator[None]:
        """The weights moved by `scale` (0-D) times the directions; afterwards they are what they were, bit for bit."""
        weights = self.weights()
        saved = [w.clone() for w in weights]
        try:
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(direction * scale)
            self.weights_changed()
            yield
        finally:
            for weight, original in zip(weights, saved, strict=True):
                weight.copy_(original)
            self.weights_changed()

    def take_gradients(self) -> list[Tensor]:
        """The reduced gradients in the form of `normals`; they are the caller's afterwards, and cleared here."""
        taken = []
        for name, parameter in self.parameters().items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient after a backward pass")
            taken.append(parameter.grad.clone())
        self.zero_grad()
        return taken

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, in the model's order; shards where the strategy shards."""
        return dict(self.model.named_parameters())

    #: Whether each rank holds only a part of `curvature_state()`.
    shards_optimizer_state: bool = False
    #: Whether one update is several calls of the optimizer's `step`, each with some of its groups' parameters.
    steps_in_parts: bool = False

    def curvature_state(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, h, m) of each parameter, whole or this rank's part of it."""
        (optimizer,) = self.optimizers
        for name, parameter in self.parameters().items():
            state = optimizer.state[parameter]
            if "hessian" in state:
                yield name, state["hessian"], state["exp_avg"]

    def set_learning_rate(self, factor: float) -> None:
        """Every group's rate to its peak times the factor, in place."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    @abstractmethod
    def pieces(self) -> Iterator[Piece | NumberPiece]:
        """This rank's part of weights and optimizer state. Over all ranks each element stands in exactly one piece.

        Raises:
            ConfigurationError: the optimizer keeps state that no checkpoint can hold.
        """

    @abstractmethod
    def load(self, reader: PieceReader) -> None:
        """Weights and optimizer state from a checkpoint that any strategy at any world size has written."""

    @abstractmethod
    def bytes_communicated(self, micro_batches: int) -> int:
        """Bytes that each rank sends for one accumulation of gradients over so many micro-batches and its update."""


class KeepsGraphs(Strategy):
    """A strategy whose ranks can keep gradients to themselves for a while, and differentiate one forward twice.

    Engines that gather weights for a forward and its backward, or own the gradients, cannot.
    """

    @abstractmethod
    def forward_locally(
        self, tokens: Tensor, targets: Tensor | None = None, uniforms: Tensor | None = None
    ) -> GPT2Output:
        """`forward` past the engine's hooks: what is differentiated stays on this rank until it is reduced."""

    @abstractmethod
    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None: ...

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum what local backwards have left in `.grad` over the ranks, as a last micro-batch's `backward` does."""
