"""The loss on the fixed validation set: the same windows for every run, rank count and micro-batch."""

from collections.abc import Callable

import torch

from data.batches import ValidationWindows, next_batch
from training.hardware import to_device
from training.strategies.base import Strategy


@torch.no_grad()
def validation_loss(
    strategy: Strategy,
    windows: ValidationWindows,
    micro_batch_size: int,
    progress: Callable[[str], None] = lambda doing: None,
    interrupted: Callable[[str | None], bool] = lambda problem: False,
) -> tuple[float, int] | None:
    """Mean cross entropy in nats per token over the whole set, and the number of tokens, over all ranks.

    Args:
        strategy: holds the model; every rank takes part, with the same number of forwards.
        windows: this rank's share of the fixed windows; padding has targets of -100.
        micro_batch_size: windows per forward.
        progress: called with a few words before each forward.
        interrupted: called before each forward with the reason why this rank has no data, or None; must return the same
            on all ranks. True ends the evaluation without a result.
    """
    strategy.model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    batches = windows.batches(micro_batch_size)
    for number in range(windows.forwards(micro_batch_size)):
        batch, problem = next_batch(batches)
        if interrupted(problem):
            strategy.model.train()
            return None
        assert batch is not None
        progress(f"evaluating, forward {number}")
        tokens = to_device(batch.tokens, strategy.device)
        targets = to_device(batch.targets, strategy.device)
        loss_sum = strategy.forward(tokens, targets).loss_sum
        assert loss_sum is not None
        total += torch.stack((loss_sum.double(), (targets >= 0).sum().double()))
    strategy.distributed.all_reduce(total)
    strategy.model.train()
    loss, count = total.tolist()
    return loss / count, int(count)
