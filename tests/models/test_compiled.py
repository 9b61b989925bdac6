"""The compiled model. Most tests trace without generating code (aot_eager); one goes through inductor."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from models import GPT2, GPT2Config

CONFIG = GPT2Config(300, 3, 2, 32, 16, attention_layer_scaling=True)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs(sequences: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, CONFIG.block_size)
    tokens, targets = (torch.randint(CONFIG.vocab_size, shape, generator=generator) for _ in range(2))
    return tokens, targets, torch.rand(shape, generator=generator)


def both_gradients(model: GPT2, batch: Inputs) -> list[Tensor]:
    """The gradients of the sampled and of the training loss, through one forward pass."""
    output = model(*batch)
    assert output.sampled_loss_sum is not None
    assert output.loss_sum is not None
    taken = []
    for loss, retain_graph in ((output.sampled_loss_sum, True), (output.loss_sum, False)):
        model.zero_grad()
        loss.backward(retain_graph=retain_graph)
        taken += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return taken


def compiled(backend: str, config: GPT2Config = CONFIG) -> GPT2:
    model = GPT2(config)
    model.compile(backend=backend)
    return model


def test_two_backwards_through_one_compiled_forward_equal_the_eager_gradients() -> None:
    config = replace(CONFIG, n_layer=1)  # generated code takes long to compile
    model = compiled("inductor", config)
    model.loss(*inputs()[:2]).backward()  # compiles the backward pass before a second one is known
    for gradient, expected in zip(both_gradients(model, inputs()), both_gradients(GPT2(config), inputs()), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_all_blocks_share_one_compilation() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = GPT2(CONFIG)
    for block in model.blocks:
        block.compile(backend=counter)
    model.loss(*inputs()[:2]).backward()
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_nothing_is_recompiled_after_training_evaluation_and_curvature_have_run() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = GPT2(CONFIG)
    model.compile(backend=counter)
    tokens, targets, uniforms = inputs()

    def everything(sequences: int) -> None:
        model.train()
        model(tokens, targets).loss_sum.backward()
        both_gradients(model, (tokens, targets, uniforms))
        model(tokens[:sequences], None, uniforms[:sequences]).sampled_loss_sum.backward()
        model.eval()
        with torch.no_grad():
            model(tokens[:sequences], targets[:sequences])

    everything(2)
    everything(3)
    seen = counter.frame_count
    for sequences in (2, 3, 4):
        everything(sequences)
    assert counter.frame_count == seen


def test_parameter_names_are_those_of_the_uncompiled_model() -> None:
    assert compiled("aot_eager").state_dict().keys() == GPT2(CONFIG).state_dict().keys()


def test_second_derivatives_bypass_the_compiled_code() -> None:
    model = compiled("aot_eager")
    tokens, targets, _ = inputs()
    model.loss(tokens, targets)
    parameters = list(model.parameters())
    with model.maths_attention():
        gradient = torch.autograd.grad(model.loss(tokens, targets), parameters, create_graph=True)
        product = torch.autograd.grad(gradient, parameters, grad_outputs=gradient)
    eager = GPT2(CONFIG)
    with eager.maths_attention():
        gradient = torch.autograd.grad(eager.loss(tokens, targets), list(eager.parameters()), create_graph=True)
        expected = torch.autograd.grad(gradient, list(eager.parameters()), grad_outputs=gradient)
    torch.testing.assert_close(product, expected)


def test_torch_compile_of_the_whole_model_gives_the_same_losses() -> None:
    model = GPT2(CONFIG)
    whole = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(whole(*inputs()), model(*inputs()))
