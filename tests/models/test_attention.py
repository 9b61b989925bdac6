import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention as attention_module
from models.attention import _BlockedAttention, _query_blocks, causal_attention


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    smallest=st.integers(1, 50),
    layer=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 1000),
)
def test_the_blocked_route_equals_torchs_kernel_with_its_gradients(
    length: int, smallest: int, layer: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, length, 8)
    query, key, value, d_output = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    factor = None if layer is None else torch.tensor(1 / (layer + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "SMALLEST_BLOCK", smallest)
        output = _BlockedAttention.apply(*inputs, factor)
        actual = torch.autograd.grad(output, inputs, d_output)
    scale = 8**-0.5 / (1 if layer is None else layer + 1)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale)
    # The route's softmax is fp32.
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, inputs, d_output), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@given(length=st.integers(1, 5000))
def test_blocks_of_queries_cover_the_sequence_in_order(length: int) -> None:
    blocks = _query_blocks(length)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(length))
    assert len(blocks) <= attention_module.MOST_BLOCKS


def test_in_bf16_the_blocked_route_is_as_near_to_fp32_as_torchs_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (2 * torch.randn(2, 2, 300, 32, generator=generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    narrow = [t.bfloat16() for t in (query, key, value)]
    flash = (F.scaled_dot_product_attention(*narrow, is_causal=True) - exact).norm()
    assert (_BlockedAttention.apply(*narrow, None) - exact).norm() < 2 * flash


def test_the_logit_factor_divides_the_logits_on_torchs_route() -> None:
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    output = causal_attention(query, key, value, logit_factor=torch.tensor(0.25))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25 * 8**-0.5)
    torch.testing.assert_close(output, expected)
