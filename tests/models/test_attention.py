import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention as attention_module
from models.attention import _BlockedBackward, _query_blocks, causal_attention


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    smallest=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_the_blocked_backward_pass_equals_that_of_torchs_kernel(length: int, smallest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, length, 8)
    query, key, value, d_output = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "SMALLEST_BLOCK", smallest)
        output = _BlockedBackward.apply(*inputs)
        actual = torch.autograd.grad(output, inputs, d_output)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    # The blocked backward pass computes its softmax in fp32.
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, inputs, d_output), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@given(length=st.integers(1, 5000))
def test_blocks_of_queries_cover_the_sequence_in_order(length: int) -> None:
    blocks = _query_blocks(length)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(length))
    assert len(blocks) <= attention_module.MOST_BLOCKS


# The blocked backward pass computes its logits in bf16, torch's kernel in fp32: the rounding error grows with the logits.
@pytest.mark.parametrize(("size", "times"), [(0.5, 1.3), (3.0, 5.0)])
def test_in_bf16_the_blocked_backward_pass_is_within_some_times_of_torchs_error(size: float, times: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, d_output = (size * torch.randn(2, 2, 600, 32, generator=generator) for _ in range(4))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, d_output)
    narrow = [t.detach().bfloat16().requires_grad_() for t in inputs]
    flash = torch.autograd.grad(F.scaled_dot_product_attention(*narrow, is_causal=True), narrow, d_output.bfloat16())
    blocked = torch.autograd.grad(_BlockedBackward.apply(*narrow), narrow, d_output.bfloat16())
    for ours, theirs, wanted in zip(blocked, flash, exact, strict=True):
        assert (ours - wanted).norm() < times * (theirs - wanted).norm()


@pytest.mark.slow
def test_compiled_and_uncompiled_blocks_of_many_queries_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, 600, 32, generator=generator).bfloat16() for _ in range(4)]
    inputs, d_output = [t.requires_grad_() for t in tensors[:3]], tensors[3]
    compiled = torch.compile(causal_attention)(*inputs)
    uncompiled = _BlockedBackward.apply(*inputs)
    assert torch.equal(compiled, uncompiled)
    for actual, expected in zip(
        torch.autograd.grad(compiled, inputs, d_output), torch.autograd.grad(uncompiled, inputs, d_output), strict=True
    ):
        assert (actual - expected).norm() < 0.005 * expected.norm()


def test_logits_whose_rounding_is_beyond_exp_leave_the_gradients_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [(100 * torch.randn(1, 2, 300, 64, generator=generator)).bfloat16().requires_grad_() for _ in range(3)]
    for gradient in torch.autograd.grad(_BlockedBackward.apply(*inputs).float().sum(), inputs):
        assert gradient.isfinite().all()


def test_logits_that_only_masked_pairs_overflow_leave_the_gradients_finite() -> None:
    query, value = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    key = torch.tensor([-1000.0, 1000.0])[None, None, :, None].expand(1, 1, 2, 8)
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    for gradient in torch.autograd.grad(_BlockedBackward.apply(*inputs).sum(), inputs):
        assert gradient.isfinite().all()
