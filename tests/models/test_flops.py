from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.my_model import Rotary
from models import GPT2, GPT2Config, LanguageModel

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
            assert counted(lambda: model(tokens, tokens)) == config.flops(config.block_size).evaluation(count)

    def test_forward_and_backward_through_the_chunked_head(self, config: GPT2Config) -> None:
        model, tokens, count = self.model_and_tokens(config)
        flops = config.flops(config.block_size)
        with model.maths_attention():
            assert counted(lambda: model.loss(tokens, tokens).backward()) == flops.forward_backward(count)
        assert counted(lambda: model.hidden(tokens).sum().backward()) == 3 * count * flops.trunk
        weight = model.token_embedding.weight
        hidden = torch.empty(*tokens.shape, config.n_embd, device="meta", requires_grad=True)
        head = counted(lambda: model.head(hidden, weight, tokens, None)[0].backward())
        assert head == 3 * count * flops.head

    def test_hessian_vector_product(self, config: GPT2Config) -> None:
        model, tokens, count = self.model_and_tokens(config)
        parameters = list(model.parameters())

        def product() -> None:
            with model.maths_attention():
                gradient = torch.autograd.grad(model.loss(tokens, tokens), parameters, create_graph=True)
                torch.autograd.grad(gradient, parameters, grad_outputs=[torch.empty_like(p) for p in parameters])

        assert counted(product) == config.flops(config.block_size).hutchinson_exact(count)


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
    assert extra == config.flops(16).gauss_newton_bartlett(32, own_forward=False)


def test_passes_are_multiples_of_a_forward_and_scale_with_tokens() -> None:
    flops = GPT2Config().flops(512)
    assert flops == (12 * (2 * 12 * 768**2 + 4 * 512 * 768), 2 * 50304 * 768)
    assert flops.evaluation(1000) == 1000 * sum(flops)
    assert flops.forward_backward(1000) == flops.gauss_newton_bartlett(1000) == 3000 * sum(flops)
    assert flops.hutchinson_differences(1000) == 6000 * sum(flops)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_count_in_a_model_without_a_formula_is_the_formula_of_gpt2(device: str) -> None:
    with torch.device(device):
        model = GPT2(CONFIGS[2])
    assert LanguageModel.flops(model, 24) == model.flops(24)


def test_the_count_in_a_model_of_ones_own_is_two_per_weight_and_attention() -> None:
    with torch.device("meta"):
        model = Rotary(vocab_size=300, n_layer=3, n_head=2, n_embd=32, block_size=64)
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2)
    assert model.flops(48) == (2 * matrices + 3 * 4 * 48 * 32, 2 * 300 * 32)


def test_gpt2_small_has_its_published_size_and_about_six_flops_a_parameter() -> None:
    config = GPT2Config(bias=True)
    with torch.device("meta"):
        total = sum(p.numel() for p in GPT2(config).parameters())
    assert config.parameter_count() == total
    assert total - (config.padded_vocab_size - config.vocab_size) * 768 == 124_439_808
    matrices = total - config.block_size * 768
    without_attention = sum(config.flops(0))
    assert 3 * without_attention == pytest.approx(6 * matrices, rel=0.002)
