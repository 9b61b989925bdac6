"""The step over gradients in `.grad`, whole or sharded (DTensor): norm, clip and update without a synchronisation.

Clipping is not a separate pass: optimizers with torch's AMP protocol divide the gradient by `grad_scale` in their kernel
and change nothing if `found_inf` is 1. torch.optim.Muon and most optimizers from elsewhere lack that protocol, so they need a
pass and a synchronisation.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sophia import Sophia
from training.strategies.base import StepStatistics, total_norm


def gradients(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether the optimizer follows torch's AMP protocol, in its step and in `update_hessian`."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def clip_and_step(
    optimizers: Sequence[Optimizer], max_norm: float | None, loss: Tensor | None = None
) -> StepStatistics:
    """Clip the global gradient norm to `max_norm` and step. A non-finite norm or loss skips the step on the device.

    `loss` (0-D) is the global batch's: an infinite loss may have finite gradients.
    """
    norm = total_norm(gradients(optimizers)).float()
    finite = torch.isfinite(norm)
    if loss is not None:
        finite = finite & torch.isfinite(loss)
    skipped = (~finite).float()
    limit = float("inf") if max_norm is None else max_norm
    scale = torch.clamp(norm / limit, min=1.0).nan_to_num(nan=1.0, posinf=1.0)
    for optimizer in optimizers:
        if skips_on_device(optimizer):
            optimizer.grad_scale, optimizer.found_inf = scale, skipped  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        elif not skipped:
            torch._foreach_div_(gradients([optimizer]), scale)
            optimizer.step()
    return StepStatistics(norm, (norm > limit).float(), skipped, None)


def unclipped(optimizers: Sequence[Optimizer]) -> Tensor | None:
    """(2,) float64: coordinates with |m| < γh in this rank's last step, and all coordinates stepped; None without h."""
    if not isinstance(optimizers[0], Sophia):
        return None
    count = optimizers[0].unclipped_count.double()
    return torch.stack((count, torch.full_like(count, optimizers[0].numel)))


def update_hessian(
    optimizers: Sequence[Optimizer],
    parameters: Iterable[Tensor],
    num_predictions: int | Tensor | None,
    estimates: Sequence[Tensor] | None,
) -> Tensor:
    """Call the optimizer's `update_hessian`. A non-finite estimate is skipped, on the device if the optimizer can.

    `estimates` are in the order of `parameters`, which may differ from the order in the optimizer's groups.
    """
    (optimizer,) = optimizers
    norm = total_norm(gradients(optimizers) if estimates is None else estimates)
    # ĥ = N ĝ² may overflow even if ĝ does not. N ‖ĝ‖² bounds it.
    bound = norm if num_predictions is None else norm.square() * num_predictions
    skipped = (~torch.isfinite(bound)).float()
    if not skips_on_device(optimizer) and skipped:
        return skipped
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    if estimates is None:
        optimizer.update_hessian(num_predictions=num_predictions)  # type: ignore[attr-defined]
    else:
        of = {id(parameter): estimate for parameter, estimate in zip(parameters, estimates, strict=True)}
        ordered = [of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.update_hessian(estimates=ordered)  # type: ignore[attr-defined]
    optimizer.found_inf = None  # type: ignore[attr-defined]
    return skipped
