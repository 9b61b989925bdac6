"""A model with bf16 weights whose arithmetic is autocast's over float32 weights.

Autocast on CUDA widens a norm's weights where they are bf16; on the CPU it does not, and the residual stream follows
the embeddings' dtype everywhere. Engines that gather or keep weights in bf16 would so round more than the matrix
products.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models import GPT2


def keep_norms_float32(model: GPT2) -> None:
    """Norms in float32, of weights of any dtype."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]


def keep_residual_float32(model: GPT2) -> None:
    """The residual stream in float32, where the embeddings are bf16."""
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))


def _norm(module: nn.LayerNorm, x: Tensor) -> Tensor:  # (*, d) -> (*, d) float32
    bias = None if module.bias is None else module.bias.float()
    return F.layer_norm(x.float(), module.normalized_shape, module.weight.float(), bias, module.eps)
