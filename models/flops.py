"""A model's floating-point operations.

Counts what the hardware executes in matrix products, with two operations per multiply-add, as torch.utils.flop_counter
does: the head includes the padded vocabulary, and attention all pairs of positions, the masked half included. Embedding
look-ups, norms, softmax and the optimizer are not counted. A backward pass counts twice its forward pass. Recomputation
is not counted.
"""

from typing import NamedTuple


class Flops(NamedTuple):
    """A model's forward FLOPs per token of sequences of one length; the methods count passes over so many tokens."""

    trunk: int  # everything but the head, attention included
    head: int

    def evaluation(self, tokens: int) -> int:
        """A forward pass."""
        return tokens * (self.trunk + self.head)

    def forward_backward(self, tokens: int) -> int:
        """A forward and a backward pass: a training step, or the empirical Fisher's pass."""
        return 3 * self.evaluation(tokens)

    def gauss_newton_bartlett(self, tokens: int, *, own_forward: bool = True) -> int:
        """The Gauss-Newton-Bartlett pass.

        With its own forward pass: a forward and a backward pass. If labels are drawn in the training forward pass: only a
        backward pass through the trunk, since the head's gradients of the two losses differ only by look-ups
        (models/head.py).
        """
        return self.forward_backward(tokens) if own_forward else 2 * tokens * self.trunk

    def hutchinson_differences(self, tokens: int) -> int:
        """A Hessian-vector product by a central difference: two first-order gradients."""
        return 2 * self.forward_backward(tokens)

    def hutchinson_exact(self, tokens: int) -> int:
        """An exact Hessian-vector product by double backward: forward, backward, and a backward through both."""
        return 3 * self.forward_backward(tokens)
