"""The loss on the fixed validation set: the same windows for every run, rank count and micro-batch."""

import math
from collections.abc import Callable

import numpy as np
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
    token_bytes: np.ndarray | None = None,
) -> tuple[float, int, int] | None:
    """Mean cross entropy in nats per token over the whole set, and the numbers of tokens and of bytes, over all ranks.

    Args:
        strategy: holds the model; every rank takes part, with the same number of forwards.
        windows: this rank's share of the fixed windows; padding has targets of -100.
        micro_batch_size: windows per forward.
        progress: called with a few words before each forward.
        interrupted: called before each forward with the reason why this rank has no data, or None; must return the same
            on all ranks. True ends the evaluation without a result.
        token_bytes: (vocab_size,) the bytes of text of each id; without it, the number of bytes is 0.
    """
    strategy.model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=strategy.device)
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
        total[:2] += torch.stack((loss_sum.double(), (targets >= 0).sum().double()))
        if token_bytes is not None:
            total[2] += int(token_bytes[batch.targets[batch.targets >= 0]].sum())
    strategy.distributed.all_reduce(total)
    strategy.model.train()
    loss, count, size = total.tolist()
    return loss / count, int(count), int(size)


def bits_per_byte(loss: float | None, bytes_per_token: float | None) -> float | None:
    """Convert a loss in nats per token to bits per byte of text, which compares models of different vocabularies."""
    return None if loss is None or not bytes_per_token else loss / math.log(2) / bytes_per_token
