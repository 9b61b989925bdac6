import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophia
from models import GPT2, GPT2Config, parameter_kind
from models import gpt2 as gpt2_module

TINY = GPT2Config(vocab_size=300, n_layer=2, n_head=2, n_embd=32, block_size=16)


def batch(config: GPT2Config = TINY, sequences: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, config.block_size)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    targets = torch.randint(config.vocab_size, shape, generator=generator)
    return tokens, targets, torch.rand(shape, generator=generator)


def moved(model: GPT2, scale: float = 0.1) -> GPT2:
    """A model with random weights: at initialisation, biases, norms and attention would hardly matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def reference_logits(model: GPT2, tokens: Tensor) -> Tensor:
    """A second GPT-2, from the paper's equations, without modules or fused kernels."""
    config, weights = model.config, dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.zeros(()))

    length, head_size = tokens.size(1), config.n_embd // config.n_head
    future = torch.ones(length, length).triu(1).bool()
    x = weights["token_embedding.weight"][tokens] + weights["position_embedding.weight"][:length]
    for layer in range(config.n_layer):
        qkv = linear(norm(x, f"blocks.{layer}.attention_norm"), f"blocks.{layer}.attention.qkv")
        heads = []
        for head in range(config.n_head):
            q, k, v = (part[..., head * head_size : (head + 1) * head_size] for part in qkv.chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / math.sqrt(head_size)
            if config.attention_layer_scaling:
                scores = scores / (layer + 1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{layer}.attention.out")
        y = linear(norm(x, f"blocks.{layer}.mlp_norm"), f"blocks.{layer}.mlp.up")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"blocks.{layer}.mlp.down")
    return (norm(x, "final_norm") @ weights["token_embedding.weight"].T)[..., : config.vocab_size]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attention_layer_scaling", [False, True])
def test_logits_are_those_of_the_equations(bias: bool, attention_layer_scaling: bool) -> None:
    config = GPT2Config(300, 3, 2, 32, 16, bias=bias, attention_layer_scaling=attention_layer_scaling)
    model = moved(GPT2(config))
    tokens, targets, _ = batch(config)
    expected = reference_logits(model, tokens)
    torch.testing.assert_close(model.logits(tokens), expected, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(tokens, targets), loss)


def test_a_token_is_predicted_from_earlier_ones_only() -> None:
    model = moved(GPT2(TINY))
    tokens, _, _ = batch()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY.vocab_size
    assert torch.equal(model.logits(tokens)[:, :9], model.logits(changed)[:, :9])
    assert not torch.equal(model.logits(tokens)[:, 9], model.logits(changed)[:, 9])


def test_the_loss_is_a_sum_over_the_positions_that_have_a_target() -> None:
    model = moved(GPT2(TINY))
    tokens, targets, _ = batch()
    targets[0, :5] = -100
    each = F.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    loss_sum = model(tokens, targets).loss_sum
    torch.testing.assert_close(loss_sum, each.sum())
    torch.testing.assert_close(model.loss(tokens, targets), loss_sum / (targets != -100).sum())


def test_only_the_requested_losses_are_computed() -> None:
    model = GPT2(TINY)
    tokens, targets, uniforms = batch()
    assert model(tokens) == (None, None)
    assert model(tokens, targets).sampled_loss_sum is None
    assert model(tokens, uniforms=uniforms).loss_sum is None
    both = model(tokens, targets, uniforms)
    torch.testing.assert_close(both.loss_sum, model(tokens, targets).loss_sum)
    torch.testing.assert_close(both.sampled_loss_sum, model(tokens, uniforms=uniforms).sampled_loss_sum)


def test_a_sequence_beyond_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens: block_size=16"):
        GPT2(TINY)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_layer": 0}, "n_layer=0"), ({"n_embd": 30, "n_head": 4}, "n_embd=30"), ({"dropout": 1.0}, "dropout=1.0")],
)
def test_a_shape_that_cannot_be_built_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config(**arguments)  # type: ignore[arg-type]


def test_the_default_is_gpt2_small_as_the_paper_trains_it() -> None:
    assert GPT2Config() == GPT2Config(50257, 12, 12, 768, 1024, False, 0.0, False, 128)


def test_every_linear_layer_and_norm_has_a_bias_or_none_has() -> None:
    for bias in (True, False):
        names = [name for name, _ in GPT2(GPT2Config(300, 2, 2, 32, 16, bias=bias)).named_parameters()]
        layers = {name.removesuffix(".weight") for name in names if name.endswith("weight")}
        with_bias = {name.removesuffix(".bias") for name in names if name.endswith("bias")}
        assert with_bias == (layers - {"token_embedding", "position_embedding"} if bias else set())


@pytest.mark.parametrize(("vocab_size", "padded"), [(50257, 50304), (50304, 50304), (1, 128)])
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, padded: int) -> None:
    assert GPT2Config(vocab_size=vocab_size).padded_vocab_size == padded


def test_padding_has_no_weight_no_gradient_and_no_part_in_the_softmax() -> None:
    model = GPT2(TINY)
    padding = model.token_embedding.weight[TINY.vocab_size :]
    assert len(padding) == 84
    assert not padding.any()
    tokens, targets, uniforms = batch()
    before = model(tokens, targets, uniforms)
    with torch.no_grad():
        padding.fill_(5.0)
    output = model(tokens, targets, uniforms)
    assert output == before
    (output.loss_sum + output.sampled_loss_sum).backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    assert not gradient[TINY.vocab_size :].any()
    assert gradient[: TINY.vocab_size].any(dim=1).all()


def test_dropout_acts_on_the_embeddings_the_attention_and_both_branches_of_each_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = GPT2(GPT2Config(300, 2, 2, 32, 16, dropout=0.25))
    seen: list[str | float] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    attend = gpt2_module.causal_attention
    monkeypatch.setattr(
        gpt2_module, "causal_attention", lambda q, k, v, p, factor: seen.append(p) or attend(q, k, v, p, factor)
    )
    for training, p in ((True, 0.25), (False, 0.0)):
        seen.clear()
        model.train(training).hidden(batch()[0])
        assert seen == ["dropout", *(place for b in (0, 1) for place in (p, *[f"blocks.{b}.dropout"] * 2))]


def test_the_initial_weights_are_frozen() -> None:
    # A change here changes every run, so that new records cannot be paired with old ones.
    model = GPT2(GPT2Config(vocab_size=5, n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_multiple=8))
    expected = {"token_embedding": [-0.02509209, 0.01589716], "blocks.1.mlp.down": [-0.00269459, 0.00782729]}
    model.initialize(7)
    for name, values in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(weight.flatten()[:2], torch.tensor(values), rtol=1e-5, atol=0)


def test_initialisation_has_gpt2s_standard_deviations() -> None:
    config = GPT2Config(1000, 8, 4, 128, 64, bias=True)
    for name, parameter in GPT2(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter_kind(name) == "norm":
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter[: config.vocab_size].std().item() == pytest.approx(expected, rel=0.05), name


def test_initialisation_is_a_function_of_seed_and_name_alone() -> None:
    deep = GPT2(GPT2Config(300, 4, 2, 32, 16))
    torch.manual_seed(7)
    with torch.device("meta"):
        on_meta = GPT2(TINY)
    shallow = on_meta.to_empty(device="cpu")
    shallow.initialize(0)
    for name, parameter in shallow.named_parameters():
        if not name.endswith(("out.weight", "down.weight")):  # their scale depends on the depth
            assert torch.equal(parameter, dict(deep.named_parameters())[name]), name
    other = GPT2(TINY)
    other.initialize(1)
    for (name, parameter), seed_zero in zip(other.named_parameters(), GPT2(TINY).parameters(), strict=True):
        if parameter_kind(name) != "norm":
            assert (parameter[: TINY.vocab_size] != seed_zero[: TINY.vocab_size]).float().mean() > 0.99, name
    drawn = [p.flatten()[:8] for n, p in deep.named_parameters() if parameter_kind(n) != "norm"]
    scaled = {tuple((d / d[0]).tolist()) for d in drawn}
    assert len(scaled) == len(drawn), "two tensors share their random numbers"


def test_every_parameter_has_a_kind() -> None:
    kinds = {
        name: parameter_kind(name) for name, _ in GPT2(GPT2Config(300, 1, 2, 32, 16, bias=True)).named_parameters()
    }
    assert kinds["token_embedding.weight"] == kinds["position_embedding.weight"] == "embedding"
    assert kinds["blocks.0.attention.out.bias"] == "attention"
    assert kinds["blocks.0.mlp.up.weight"] == "mlp"
    assert kinds["blocks.0.attention_norm.bias"] == kinds["final_norm.weight"] == "norm"
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        parameter_kind("lm_head.weight")


class TestSecondDerivatives:
    """Inside maths_attention, the model can be differentiated twice."""

    def test_hessian_vector_product_equals_a_central_difference_in_double_precision(self) -> None:
        model = moved(GPT2(TINY)).double()
        tokens, targets, _ = batch()
        parameters = list(model.parameters())
        generator = torch.Generator().manual_seed(2)
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        with model.maths_attention():
            gradient = torch.autograd.grad(model.loss(tokens, targets).double(), parameters, create_graph=True)
            product = torch.autograd.grad(gradient, parameters, grad_outputs=direction)

        def gradient_at(offset: float) -> list[Tensor]:
            shifted = moved(GPT2(TINY)).double()
            with torch.no_grad():
                for parameter, step in zip(shifted.parameters(), direction, strict=True):
                    parameter.add_(step, alpha=offset)
            with shifted.maths_attention():
                logits = F.linear(shifted.hidden(tokens), shifted.token_embedding.weight)[..., : TINY.vocab_size]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return list(torch.autograd.grad(loss, list(shifted.parameters())))

        epsilon = 1e-5
        for plus, minus, exact in zip(gradient_at(epsilon), gradient_at(-epsilon), product, strict=True):
            torch.testing.assert_close((plus - minus) / (2 * epsilon), exact, atol=2e-5, rtol=1e-3)

    def test_hutchinson_is_right_inside_and_refused_outside(self) -> None:
        model = moved(GPT2(TINY))
        tokens, targets, _ = batch()

        def estimate(method: Callable[..., list[Tensor | None]]) -> Tensor:
            estimates = method(lambda: model.loss(tokens, targets), model.parameters(), seed=0, step=1)
            return torch.cat([e.flatten() for e in estimates if e is not None])

        with model.maths_attention():
            exact = estimate(sophia.hutchinson)
        assert (estimate(sophia.hutchinson_differences) - exact).norm() < 5e-3 * exact.norm()
        with pytest.raises(RuntimeError, match=r"model\.maths_attention\(\)"):
            estimate(sophia.hutchinson)

    def test_losses_are_those_of_the_fast_route(self) -> None:
        model = moved(GPT2(TINY))
        inputs = batch()
        fast = model(*inputs)
        with model.maths_attention():
            exact = model(*inputs)
        torch.testing.assert_close(fast, exact)
        assert model.attention == "sdpa"

    def test_the_switch_is_reset_after_an_error_and_after_a_switch_within(self) -> None:
        model = GPT2(TINY)
        with model.maths_attention():
            with model.maths_attention():
                pass
            assert model.attention == "math"
        with pytest.raises(RuntimeError, match="inside"), model.maths_attention():
            raise RuntimeError("inside")
        assert model.attention == "sdpa"


def test_under_autocast_losses_are_fp32_and_near_the_fp32_model() -> None:
    model = moved(GPT2(TINY))
    inputs = batch()
    exact = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = model(*inputs)
        with model.maths_attention():
            plain = model(*inputs)
    for output in (fast, plain):
        for loss, expected in zip(output, exact, strict=True):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
