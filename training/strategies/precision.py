"""Make a model with bf16 weights compute as autocast does over float32 weights.

Autocast on CUDA widens bf16 weights of norms, but not on the CPU, and the residual stream takes the embeddings' dtype on
both. Engines that gather or keep weights in bf16 would therefore round more than the matrix products.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models import LanguageModel


def keep_norms_float32(model: LanguageModel) -> None:
    """Compute norms in float32, whatever the dtype of their weights."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.RMSNorm):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]


def keep_residual_float32(model: LanguageModel) -> None:
    """Keep the residual stream in float32 if the embeddings are bf16."""
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))


def _norm(module: nn.LayerNorm, x: Tensor) -> Tensor:  # (*, d) -> (*, d) float32
    bias = None if module.bias is None else module.bias.float()
    return F.layer_norm(x.float(), module.normalized_shape, module.weight.float(), bias, module.eps)


def _rms_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:  # (*, d) -> (*, d) float32
    weight = None if module.weight is None else module.weight.float()
    return F.rms_norm(x.float(), module.normalized_shape, weight, module.eps)
