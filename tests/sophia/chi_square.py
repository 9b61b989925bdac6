"""Pearson's test, so that the library's tests need torch alone."""

import torch
from torch import Tensor


def chi_square_p(
    observed: Tensor,  # (n,) counts
    expected: Tensor,  # (n,) of the same sum, float64
) -> float:
    """The probability of counts at least as far from what is expected."""
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2, dtype=torch.float64), statistic / 2).item()
