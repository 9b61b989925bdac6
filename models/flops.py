"""How many floating-point operations the model takes, counted from its shape.

Matrix products only, a multiply-add as two, as torch.utils.flop_counter counts them: what the hardware executes, so the
head over the padded vocabulary and attention over all pairs of positions, the masked half included. Look-ups in the
embeddings, norms, softmax and the optimizer are left out. A backward pass is twice its forward. Recomputation is not
counted.
"""

from models.gpt2 import GPT2Config


def block_flops_per_token(config: GPT2Config) -> int:
    """Forward, the linear layers of all blocks: 2 · 12 d² each."""
    return 2 * config.n_layer * 12 * config.n_embd**2


def attention_flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """Forward, q kᵀ and weights times v in all blocks, uncausal: 2 · 2 T d each block."""
    return 4 * config.n_layer * sequence_length * config.n_embd


def head_flops_per_token(config: GPT2Config) -> int:
    """Forward, the product with the padded token embedding."""
    return 2 * config.padded_vocab_size * config.n_embd


def forward_flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """Forward, the whole model, for a token of a sequence of `sequence_length` tokens."""
    return (
        block_flops_per_token(config)
        + attention_flops_per_token(config, sequence_length)
        + head_flops_per_token(config)
    )


def evaluation_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """One forward over `tokens` tokens."""
    return tokens * forward_flops_per_token(config, sequence_length)


def forward_backward_flops(config: GPT2Config, tokens: int, sequence_length: int) -> int:
    """One forward and one backward over `tokens` tokens: training, and the empirical Fisher's pass."""
    return 3 * evaluation_flops(config, tokens, sequence_length)


def gauss_newton_bartlett_flops(
    config: GPT2Config, tokens: int, sequence_length: int, *, own_forward: bool = True
) -> int:
    """The Gauss-Newton-Bartlett pass over `tokens` tokens.

    With its own forward: a forward and a backward. Where labels are drawn in the training forward: a backward
    through the trunk alone, since the head's gradients for the two losses differ by look-ups only
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
    """An exact Hessian-vector product by double backward: a forward, a backward, and a backward through both."""
    return 3 * forward_backward_flops(config, tokens, sequence_length)


def parameter_count(config: GPT2Config, *, embeddings: bool = True) -> int:
    """Parameters of the model, the padding rows of the token embedding included; or those outside of the embeddings."""
    width = config.n_embd
    block = 12 * width**2 + 2 * width  # the matrices, and the norms' scales
    norm = width
    if config.bias:
        block += 9 * width + 2 * width  # of qkv, out, up and down; and the norms' offsets
        norm += width
    outside = config.n_layer * block + norm
    return outside + (config.padded_vocab_size + config.block_size) * width if embeddings else outside
