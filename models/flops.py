"""The model's floating-point operations, computed from its shape.

Counts what the hardware executes in matrix products, with two operations per multiply-add, as torch.utils.flop_counter
does: the head includes the padded vocabulary, and attention all pairs of positions, the masked half included. Embedding
look-ups, norms, softmax and the optimizer are not counted. A backward pass counts twice its forward pass. Recomputation
is not counted.
"""

from models.gpt2 import GPT2Config


def block_flops_per_token(config: GPT2Config) -> int:
    """Forward FLOPs of the linear layers of all blocks: 2 · 12 d² per block."""
    return 2 * config.n_layer * 12 * config.n_embd**2


def attention_flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """Forward FLOPs of q kᵀ and of weights times v, uncausal: 2 · 2 T d per block."""
    return 4 * config.n_layer * sequence_length * config.n_embd


def head_flops_per_token(config: GPT2Config) -> int:
    """Forward FLOPs of the product with the padded token embedding."""
    return 2 * config.padded_vocab_size * config.n_embd


def forward_flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """Forward FLOPs of the whole model per token of a sequence of `sequence_length` tokens."""
    return (
        block_flops_per_token(config)
        + attention_flops_per_token(config, sequence_length)
        + head_flops_per_token(config)
    )


def evaluation_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """A forward pass over `tokens` tokens."""
    return tokens * forward_flops_per_token(config, sequence_length)


def forward_backward_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """A forward and a backward pass over `tokens` tokens: a training step, or the empirical Fisher's pass."""
    return 3 * evaluation_flops(config, tokens, sequence_length)


def gauss_newton_bartlett_flops(
    config: GPT2Config, tokens: int, sequence_length: int, *, own_forward: bool = True
) -> int:
    """The Gauss-Newton-Bartlett pass over `tokens` tokens.

    With its own forward pass: a forward and a backward pass. If labels are drawn in the training forward pass: only a
    backward pass through the trunk, since the head's gradients of the two losses differ only by look-ups
    (models/head.py).
    """
    if own_forward:
        return forward_backward_flops(config, tokens, sequence_length)
    trunk = forward_flops_per_token(config, sequence_length) - head_flops_per_token(config)
    return 2 * tokens * trunk


def hutchinson_differences_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """A Hessian-vector product by a central difference: two first-order gradients."""
    return 2 * forward_backward_flops(config, tokens, sequence_length)


def hutchinson_exact_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """An exact Hessian-vector product by double backward: forward, backward, and a backward through both."""
    return 3 * forward_backward_flops(config, tokens, sequence_length)


def parameter_count(config: GPT2Config, *, embeddings: bool = True) -> int:
    """Number of parameters, including the token embedding's padding rows; without any embeddings if so asked."""
    width = config.n_embd
    block = 12 * width**2 + 2 * width  # matrices and norm scales
    norm = width
    if config.bias:
        block += 9 * width + 2 * width  # biases of qkv, out, up and down, and norm offsets
        norm += width
    outside = config.n_layer * block + norm
    return outside + (config.padded_vocab_size + config.block_size) * width if embeddings else outside
