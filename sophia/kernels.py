"""How a rule of `sophia.rules` is applied to many tensors: one call per tensor, eager for now."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives on this rank; any other tensor as it is. No gradient flows: call under
    no_grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def apply(
    rule: Callable[..., Tensor | None],
    tensors: Sequence[Sequence[Tensor]],  # for each tensor argument of the rule, one tensor per parameter
    scalars: Sequence[Tensor | None],
) -> list[Tensor]:
    results = [rule(*arguments, *scalars) for arguments in zip(*tensors, strict=True)]
    return [result for result in results if result is not None]


def scalar(value: float | Tensor) -> Tensor:
    """A hyper-parameter as the 0-D float64 tensor that the rules take; a 0-D tensor stays on its device."""
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
