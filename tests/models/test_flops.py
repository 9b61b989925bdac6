from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import GPT2, GPT2Config
from models import flops as flops_module
from models.flops import (
    attention_flops_per_token,
    block_flops_per_token,
    evaluation_flops,
    forward_backward_flops,
    forward_flops_per_token,
    gauss_newton_bartlett_flops,
    head_flops_per_token,
    hutchinson_differences_flops,
    hutchinson_exact_flops,
)

CONFIGS = [
    GPT2Config(300, 3, 2, 32, 16),
    GPT2Config(50257, 12, 12, 768, 1024),
    GPT2Config(1000, 2, 4, 64, 32, bias=True, attention_layer_scaling=True),
]


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
class TestAgainstTorchsCounter:
    """Count on the meta device, which counts all of attention (the counter does not know the CPU's flash kernel)."""

    def model_and_tokens(self, config: GPT2Config) -> tuple[GPT2, torch.Tensor, int]:
        with torch.device("meta"):
            tokens = torch.zeros(2, config.block_size, dtype=torch.long)
            return GPT2(config), tokens, tokens.numel()

    def test_forward(self, config: GPT2Config) -> None:
        model, tokens, count = self.model_and_tokens(config)
        with torch.no_grad():
            assert counted(lambda: model(tokens, tokens)) == evaluation_flops(config, count, config.block_size)

    def test_forward_and_backward_through_the_chunked_head(self, config: GPT2Config) -> None:
        model, tokens, count = self.model_and_tokens(config)
        expected = forward_backward_flops(config, count, config.block_size)
        with model.maths_attention():
            assert counted(lambda: model.loss(tokens, tokens).backward()) == expected
        trunk = forward_backward_flops(config, count, config.block_size) - 3 * count * head_flops_per_token(config)
        assert counted(lambda: model.hidden(tokens).sum().backward()) == trunk
        weight = model.token_embedding.weight
        hidden = torch.empty(*tokens.shape, config.n_embd, device="meta", requires_grad=True)
        head = counted(lambda: model.head(hidden, weight, tokens, None)[0].backward())
        assert head == 3 * count * head_flops_per_token(config)

    def test_hessian_vector_product(self, config: GPT2Config) -> None:
        model, tokens, count = self.model_and_tokens(config)
        parameters = list(model.parameters())

        def product() -> None:
            with model.maths_attention():
                gradient = torch.autograd.grad(model.loss(tokens, tokens), parameters, create_graph=True)
                torch.autograd.grad(gradient, parameters, grad_outputs=[torch.empty_like(p) for p in parameters])

        assert counted(product) == hutchinson_exact_flops(config, count, config.block_size)


def test_labels_drawn_in_the_training_forward_cost_a_backward_through_the_trunk() -> None:
    config = GPT2Config(300, 3, 2, 32, 16)
    model = GPT2(config)
    tokens = torch.zeros(2, 16, dtype=torch.long)

    def train(uniforms: torch.Tensor | None) -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = model(tokens, tokens, uniforms)
            if uniforms is not None:
                output.sampled_loss_sum.backward(retain_graph=True)
            output.loss_sum.backward()

    extra = counted(lambda: train(torch.rand(2, 16))) - counted(lambda: train(None))
    assert extra == gauss_newton_bartlett_flops(config, 32, 16, own_forward=False)


def test_the_parts_add_up_and_scale_with_tokens() -> None:
    config = GPT2Config()
    parts = block_flops_per_token(config) + attention_flops_per_token(config, 512) + head_flops_per_token(config)
    assert forward_flops_per_token(config, 512) == parts
    assert evaluation_flops(config, 1000, 512) == 1000 * parts
    assert forward_backward_flops(config, 1000, 512) == gauss_newton_bartlett_flops(config, 1000, 512) == 3000 * parts
    assert hutchinson_differences_flops(config, 1000, 512) == 6000 * parts


def test_gpt2_small_has_its_published_size_and_about_six_flops_a_parameter() -> None:
    config = GPT2Config(bias=True)
    with torch.device("meta"):
        total = sum(p.numel() for p in GPT2(config).parameters())
    assert flops_module.parameter_count(config) == total
    assert total - (config.padded_vocab_size - config.vocab_size) * 768 == 124_439_808
    matrices = total - config.block_size * 768
    without_attention = forward_flops_per_token(config, 1024) - attention_flops_per_token(config, 1024)
    assert 3 * without_attention == pytest.approx(6 * matrices, rel=0.002)
