"""γ held at a target unclipped fraction: the authors' advice on how to choose it, followed by a controller."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sophia.optimizer import Sophia


class GammaController:
    """After each step, γ ← γ · exp(rate · (target - unclipped fraction)), within a factor of `span` of where it began.

    Not in the paper, whose γ is constant. One γ for all groups, kept as a 0-D tensor in `param_groups`, so it is
    saved with the optimizer's state and changes without a host sync. Before the first estimate nothing changes.

        optimizer.step()
        controller.update()

    Args:
        optimizer: whose γ is controlled.
        target: the unclipped fraction aimed at, in (0, 1).
        rate: relative change of γ per step and unit of fraction.
        span: the largest factor by which γ may leave its initial value, up or down.
        process_group: over which the state is sharded, if it is: all its ranks then get one γ. Not for replicas.

    Raises:
        ValueError: an argument out of its range, or groups with different γ.
    """

    def __init__(
        self,
        optimizer: Sophia,
        target: float = 0.25,
        rate: float = 0.1,
        span: float = 100.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 < target < 1:
            raise ValueError(f"target = {target}, expected a fraction in (0, 1): the authors advise 0.1 to 0.5")
        if not 0 < rate <= 1:
            raise ValueError(f"rate = {rate}, expected a number in (0, 1]: faster makes γ oscillate")
        if not span > 1:
            raise ValueError(f"span = {span}, expected a factor > 1")
        gammas = {float(group["gamma"]) for group in optimizer.param_groups}
        if len(gammas) != 1:
            raise ValueError(f"the groups have gamma = {sorted(gammas)}, expected one value: one fraction sets one γ")
        self.optimizer = optimizer
        self.target = target
        self.rate = rate
        self.process_group = process_group
        (initial,) = gammas
        self._low, self._high = initial / span, initial * span
        self._gamma = torch.tensor(initial, dtype=torch.float64)
        self._share()

    @property
    def gamma(self) -> Tensor:
        """() float64, the γ of the next step."""
        return self._gamma

    @torch.no_grad()
    def update(self, fraction: Tensor | None = None) -> None:
        """Adjust γ by the unclipped fraction of the last step, without waiting for the device.

        Args:
            fraction: (), of a loop that has it over all ranks; by default from the optimizer's own count.
        """
        count = self.optimizer.unclipped_count.double()
        if fraction is None:
            if self.optimizer.hessian_age is None:
                return
            total = torch.full_like(count, self.optimizer.numel)
            if self.process_group is not None:
                both = torch.stack([count, total])
                dist.all_reduce(both, group=self.process_group)
                count, total = both
            fraction = count / total.clamp_min(1)
        error = self.target - fraction.to(count)
        self._gamma = (self._gamma.to(count.device) * torch.exp(self.rate * error)).clamp(self._low, self._high)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """γ as a number, for loops whose checkpoints leave `param_groups` out. Waits for the device."""
        return {"gamma": float(self._gamma)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved γ; the span stays that around the γ that the optimizer was built with."""
        self._gamma = torch.tensor(state["gamma"], dtype=torch.float64)
        self._share()

    def _share(self) -> None:
        for group in self.optimizer.param_groups:
            group["gamma"] = self._gamma
