"""What training asks of a language model, and what all models share: loss head, compilation, initialisation, FLOPs.

A model derives from `LanguageModel`, makes its layers and writes `hidden`. models/gpt2.py is one; docs/model.md says what a
model of one's own has to offer.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.flops import Flops
from models.head import LossHead, plain_losses

#: Embeddings may have a learning rate and a weight decay of their own, and norms start at one. Elsewhere, kinds are labels
#: of the record's curvature statistics.
KINDS = ("embedding", "attention", "mlp", "norm")
INITIAL_STD = 0.02


class ModelOutput(NamedTuple):
    """Sums over positions, not means: callers divide by counts over all micro-batches and ranks."""

    loss_sum: Tensor | None  # () float32, cross entropy over positions with target != -100
    sampled_loss_sum: Tensor | None  # () float32, cross entropy of labels drawn from the softmax where uniforms >= 0


class LanguageModel(nn.Module):
    """A causal language model with its loss: forward(tokens, targets, uniforms) -> ModelOutput.

    A subclass calls this constructor first. Then it makes `token_embedding` (tied to the output, unless it overrides
    `output_weight`), the ModuleList `blocks` and other layers, and writes `hidden`. Blocks are called as modules, so that
    strategies can wrap each. Training builds a model on the meta device, where nothing may depend on values, and fills its
    parameters by name.

    Args:
        vocab_size: tokens of the tokenizer. The output may have more rows, for alignment; they are ignored.
        block_size: the longest sequence, in tokens.
    """

    blocks: nn.ModuleList
    token_embedding: nn.Embedding
    #: What `parameter_kind` may return, in the order of the record.
    kinds: tuple[str, ...] = KINDS

    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.head = LossHead(vocab_size)
        self.attention: Literal["sdpa", "math"] = "sdpa"

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, d): what the output layer is applied to."""
        raise NotImplementedError(f"{type(self).__name__} has no hidden(tokens)")

    @property
    def output_weight(self) -> Tensor:
        """(at least vocab_size, d): the output layer, which has no bias."""
        return self.token_embedding.weight

    def parameter_kind(self, name: str) -> str:
        """One of `kinds`. Raises ValueError for a name without a kind."""
        return parameter_kind(name)

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, -100 for no target
        uniforms: Tensor | None = None,  # (B, T) float32 in [0, 1), negative to draw no label
    ) -> ModelOutput:
        """Cross entropy of the targets, if given, and of labels drawn with the uniforms, if given."""
        hidden, weight = self.hidden(tokens), self.output_weight
        if self.attention == "math":
            return ModelOutput(*plain_losses(hidden, weight, targets, uniforms, self.vocab_size))
        return ModelOutput(*self.head(hidden, weight, targets, uniforms))

    def through_blocks(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d): all blocks in turn."""
        if not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(x, 0)  # compile once, for any batch size
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """() float32: the mean cross entropy over positions with target != -100."""
        loss_sum = self(tokens, targets).loss_sum
        return loss_sum / (targets != -100).sum()

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, vocab_size) float32."""
        return F.linear(self.hidden(tokens), self.output_weight)[..., : self.vocab_size].float()

    @contextmanager
    def maths_attention(self) -> Iterator[None]:
        """Run eagerly with the math attention kernel and the plain loss head, which can be differentiated twice.

        Flash and memory-efficient attention, torch.compile and the chunked head have no double backward.
        """
        before = self.attention
        self.attention = "math"
        try:
            with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            self.attention = before

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block and the passes inside the loss head in place, with torch.compile's arguments.

        All blocks share one compiled graph. Turns off donated buffers for the whole process, so that both losses of one
        forward pass can be differentiated, the first with retain_graph=True.
        """
        torch._functorch.config.donated_buffer = False
        # The backward pass of attention is such a function, and depends on nothing outside of it.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        for block in self.blocks:
            block.compile(*args, **kwargs)
        self.head.compile(*args, **kwargs)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every parameter to its `initial_tensor`, on any device and sharding."""
        for name, parameter in self.named_parameters():
            initial = self.initial_tensor(name, parameter.shape, seed).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                # Each rank generated the whole tensor and keeps its shard, without communication.
                sharded = distribute_tensor(initial, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(sharded.to_local())
            else:
                parameter.copy_(initial)

    def initial_tensor(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Return a parameter's initial value on the CPU, a pure function of the arguments: the model may be sharded.

        Biases are zero, norms one, everything else normal with standard deviation `initial_std`.
        """
        if name.endswith("bias"):
            return torch.zeros(shape)
        if self.parameter_kind(name) == "norm":
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape, device="cpu").normal_(0.0, self.initial_std(name), generator=generator)

    def initial_std(self, name: str) -> float:
        """Return the standard deviation of a parameter's initial values: 0.02 as in GPT-2."""
        return INITIAL_STD

    def flops(self, sequence_length: int) -> Flops:
        """Return the forward FLOPs per token, counted in `hidden` by torch's counter.

        The counter knows matrix products, convolutions and torch's attention. A model with kernels of its own overrides this.

        Raises:
            ValueError: `hidden` returns another shape.
        """
        from torch.utils.flop_counter import FlopCounterMode

        weight = self.output_weight
        tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device=weight.device)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            hidden = self.hidden(tokens)
        if hidden.shape != (1, sequence_length, weight.size(1)):
            raise ValueError(
                f"hidden returns the shape {tuple(hidden.shape)} for tokens of {tuple(tokens.shape)}; the output layer takes "
                f"{(1, sequence_length, weight.size(1))}"
            )
        return Flops(trunk=counter.get_total_flops() // sequence_length, head=2 * weight.numel())


def parameter_kind(name: str) -> str:
    """The part of a model that a parameter belongs to, by the names of the modules that hold it.

    A module whose name ends in "norm" holds norms, in "embedding" embeddings; "attention" and "mlp" hold the rest.

    Raises ValueError for another name.
    """
    parts = name.split(".")
    rules: dict[str, Callable[[str], bool]] = {
        "norm": lambda part: part.endswith("norm"),
        "embedding": lambda part: part.endswith("embedding"),
        "attention": lambda part: part == "attention",
        "mlp": lambda part: part == "mlp",
    }
    for kind, matches in rules.items():
        if any(matches(part) for part in parts):
            return kind
    raise ValueError(f"the parameter {name} has no kind; expected a name such as blocks.0.attention.qkv.weight")
