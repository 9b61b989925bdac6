from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import head as head_module
from models.head import (
    CHUNK_ROWS,
    IGNORED,
    LossHead,
    _first_above,
    cross_entropy_sum,
    log_normalizer,
    plain_losses,
    rows_per_chunk,
    running_sum,
    sample_labels,
)

VOCAB_SIZE, PADDED, WIDTH = 300, 384, 16


def inputs(rows: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(1, rows, WIDTH, generator=generator)).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (1, rows), generator=generator)
    return hidden, weight, targets, torch.rand(1, rows, generator=generator)


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, retain_graph=True)


class TestChunkedLosses:
    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 40),
        ignored=st.sets(st.integers(0, 39)),
        undrawn=st.sets(st.integers(0, 39)),
        chunk_rows=st.integers(1, 50),
        asked=st.sampled_from(["targets", "labels", "both"]),
        seed=st.integers(0, 1000),
    )
    def test_losses_and_gradients_are_the_plain_ones(
        self, rows: int, ignored: set[int], undrawn: set[int], chunk_rows: int, asked: str, seed: int
    ) -> None:
        hidden, weight, all_targets, all_uniforms = inputs(rows, seed)
        all_targets[:, [i for i in ignored if i < rows]] = IGNORED
        all_uniforms[:, 0] = 0  # the smallest that draws a label
        all_uniforms[:, [i for i in (ignored if asked == "both" else undrawn) if i < rows]] = -1
        targets = all_targets if asked != "labels" else None
        uniforms = all_uniforms if asked != "targets" else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_module, "CHUNK_ROWS", dict.fromkeys(head_module.CHUNK_ROWS, chunk_rows))
            patch.setattr(head_module, "EAGER_ROWS", 7)
            loss_sum, sampled_loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, targets, uniforms)
        expected = plain_losses(hidden, weight, targets, uniforms, VOCAB_SIZE)
        # The order of the curvature pass: sampled labels first, then targets, through one forward pass.
        for actual, reference in ((sampled_loss_sum, expected[1]), (loss_sum, expected[0])):
            torch.testing.assert_close(actual, reference)
            if reference is not None:
                pairs = zip(gradients(actual, hidden, weight), gradients(reference, hidden, weight), strict=True)
                for gradient, wanted in pairs:
                    torch.testing.assert_close(gradient, wanted, atol=2e-5, rtol=1e-4)
                    assert not gradient[VOCAB_SIZE:].any() or gradient.shape == hidden.shape

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_the_buffer_of_the_logits_fits_each_chunk_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Torch makes a buffer fit that does not, and warns of it, by default once."""
        monkeypatch.setattr(head_module, "CHUNK_ROWS", dict.fromkeys(head_module.CHUNK_ROWS, 2))
        torch.set_warn_always(True)
        try:
            LossHead(VOCAB_SIZE)(*inputs(3))
        finally:
            torch.set_warn_always(False)

    def test_one_backward_of_a_combination_equals_the_sum_of_both(self) -> None:
        hidden, weight, targets, uniforms = inputs(30)
        loss_sum, sampled_loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, targets, uniforms)
        plain_sum, plain_sampled = plain_losses(hidden, weight, targets, uniforms, VOCAB_SIZE)
        actual = gradients(0.3 * loss_sum + 2 * sampled_loss_sum, hidden, weight)
        for gradient, wanted in zip(
            actual, gradients(0.3 * plain_sum + 2 * plain_sampled, hidden, weight), strict=True
        ):
            torch.testing.assert_close(gradient, wanted, atol=2e-5, rtol=1e-4)

    def test_a_second_backward_is_refused_with_the_order_that_works(self) -> None:
        hidden, weight, targets, uniforms = inputs(8)
        loss_sum, sampled_loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, targets, uniforms)
        gradients(loss_sum, hidden)
        with pytest.raises(RuntimeError, match=r"sampled_loss_sum\.backward\(retain_graph=True\) before"):
            gradients(sampled_loss_sum, hidden)

    @pytest.mark.parametrize("asked", ["targets", "labels", "both"])
    def test_a_graph_of_the_backward_pass_is_refused_and_leaves_the_gradients_to_use(self, asked: str) -> None:
        hidden, weight, targets, uniforms = inputs(8)
        losses = LossHead(VOCAB_SIZE)(
            hidden, weight, targets if asked != "labels" else None, uniforms if asked != "targets" else None
        )
        for loss in (losses[1], losses[0]):
            if loss is not None:
                with pytest.raises(RuntimeError, match=r"inside model\.maths_attention\(\)"):
                    torch.autograd.grad(loss, (hidden, weight), create_graph=True, retain_graph=True)
                assert all(gradient.any() for gradient in gradients(loss, hidden, weight))

    @pytest.mark.parametrize("differentiable", [True, False])
    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("target", [-1, -99, -101])
    def test_a_negative_target_other_than_the_ignored_one_has_no_finite_loss_or_gradient(
        self, target: int, labelled: bool, differentiable: bool
    ) -> None:
        """The other negative ones: nanoGPT's is -1, and torch's cross entropy raises."""
        hidden, weight, targets, uniforms = inputs(8)
        targets[0, 2], targets[0, 3] = IGNORED, target
        uniforms[0, 2] = -1
        arguments = hidden, weight, targets, uniforms if labelled else None
        with torch.set_grad_enabled(differentiable):
            losses = [LossHead(VOCAB_SIZE)(*arguments)[0], plain_losses(*arguments, VOCAB_SIZE)[0]]
        for loss_sum in losses:
            assert loss_sum.isnan()
            if differentiable:
                assert all(gradient.isnan().any() for gradient in gradients(loss_sum, hidden, weight))

    def test_a_batch_without_a_label_to_draw_has_a_sampled_loss_of_zero(self) -> None:
        hidden, weight, _, uniforms = inputs(30)
        _, sampled_loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, None, torch.full_like(uniforms, -1))
        assert sampled_loss_sum == 0
        gradient_of_hidden, gradient_of_weight = gradients(sampled_loss_sum, hidden, weight)
        assert not gradient_of_hidden.any()
        assert not gradient_of_weight.any()

    @pytest.mark.parametrize("change", ["a target without a label", "a label without a target"])
    def test_labels_at_other_positions_than_the_targets_have_no_finite_loss_or_gradient(self, change: str) -> None:
        hidden, weight, targets, uniforms = inputs(30)
        if change == "a target without a label":
            uniforms[0, 3] = -1
        else:
            targets[0, 3] = IGNORED
        loss_sum, sampled_loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, targets, uniforms)
        torch.testing.assert_close(loss_sum, plain_losses(hidden, weight, targets, None, VOCAB_SIZE)[0])
        assert sampled_loss_sum.isnan()
        assert all(gradient.isnan().any() for gradient in gradients(sampled_loss_sum, hidden, weight))
        assert all(gradient.isfinite().all() for gradient in gradients(loss_sum, hidden, weight))

    def test_without_gradients_the_losses_are_the_same_and_none_are_computed(self) -> None:
        hidden, weight, targets, uniforms = inputs(30)
        head = LossHead(VOCAB_SIZE)
        expected = head(hidden, weight, targets, uniforms)
        with torch.no_grad():
            losses = head(hidden, weight, targets, uniforms)
        torch.testing.assert_close(losses, tuple(loss.detach() for loss in expected))
        assert not any(loss.requires_grad for loss in losses)

    def test_a_sure_prediction_has_its_gradient_to_full_relative_precision_in_bf16(self) -> None:
        # softmax - onehot of a token with probability 1 - 1e-3: bf16's spacing near 1 is 4e-3.
        weight = torch.zeros(PADDED, WIDTH, requires_grad=True)
        with torch.no_grad():
            weight[5, 0] = 1.0
        logit = torch.tensor(999.0 * (VOCAB_SIZE - 1)).log()
        hidden = torch.zeros(1, 1, WIDTH)
        hidden[0, 0, 0] = logit.bfloat16()
        hidden.requires_grad_()
        probability = 1 / (1 + (VOCAB_SIZE - 1) * (-hidden[0, 0, 0].detach()).exp())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_sum, _ = LossHead(VOCAB_SIZE)(hidden, weight, torch.tensor([[5]]), None)
        (gradient,) = gradients(loss_sum, hidden)
        assert gradient[0, 0, 0].item() == pytest.approx(probability.item() - 1, rel=1e-2)

    @pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])  # of the logits: from almost uniform to confident
    def test_the_loss_at_bf16_is_of_exponentials_in_fp32(self, scale: float) -> None:
        hidden, weight, targets, _ = inputs(4000, scale=scale / WIDTH**0.5)
        head = LossHead(VOCAB_SIZE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_sum, _ = head(hidden, weight, targets, None)
            with torch.no_grad():  # without a gradient nothing is stored, so nothing is rounded
                exact, _ = head(hidden, weight, targets, None)
        assert loss_sum.item() == pytest.approx(exact.item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_losses_are_fp32_and_gradients_have_the_dtypes_of_their_tensors_under_autocast(
        self, dtype: torch.dtype
    ) -> None:
        hidden, weight, targets, uniforms = inputs(30)
        hidden = hidden.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = LossHead(VOCAB_SIZE)(hidden, weight, targets, uniforms)
        expected = plain_losses(hidden.float(), weight, targets, None, VOCAB_SIZE)[0]
        assert [loss.dtype for loss in losses] == [torch.float32] * 2
        for gradient, wanted, tensor in zip(
            gradients(losses[0], hidden, weight), gradients(expected, hidden, weight), (hidden, weight), strict=True
        ):
            assert gradient.dtype == tensor.dtype
            assert ((gradient - wanted).norm() / wanted.norm()).item() < 0.02

    def test_at_bf16_the_gradient_of_the_weight_is_added_up_in_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of few rows are as exact as one chunk."""
        hidden, weight, targets, _ = inputs(1024)
        exact = gradients(plain_losses(hidden, weight, targets, None, VOCAB_SIZE)[0], weight)[0]
        errors = []
        for chunk_rows in (1024, 8):
            monkeypatch.setattr(head_module, "CHUNK_ROWS", dict.fromkeys(head_module.CHUNK_ROWS, chunk_rows))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss_sum, _ = LossHead(VOCAB_SIZE)(hidden, weight, targets, None)
            errors.append((gradients(loss_sum, weight)[0] - exact).norm())
        assert errors[1] < 1.2 * errors[0]

    @given(rows=st.integers(1, 100_000), device=st.sampled_from(["cpu", "cuda"]))
    def test_chunks_are_of_about_the_size_that_is_meant_and_the_last_is_no_shorter(
        self, rows: int, device: str
    ) -> None:
        size, meant = rows_per_chunk(rows, device), CHUNK_ROWS[device]
        assert 2048 <= meant <= 8192
        assert min(rows, 0.75 * meant) <= size <= 1.5 * meant
        chunks = -(-rows // size)
        assert rows - (chunks - 1) * size > size - chunks

    def test_no_logits_of_the_whole_batch_and_none_in_fp32_are_held(self) -> None:
        rows, width, padded, chunk_rows = 64, 4, 4096, 16
        sizes: list[int] = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                sizes.extend(
                    t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)
                )
                return out

        hidden = torch.randn(1, rows, width, requires_grad=True)
        weight = torch.randn(padded, width, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16), Watch():
            patch.setattr(head_module, "CHUNK_ROWS", dict.fromkeys(head_module.CHUNK_ROWS, chunk_rows))
            patch.setattr(head_module, "EAGER_ROWS", 4)
            LossHead(padded - 20)(hidden, weight, torch.zeros(1, rows, dtype=torch.long), torch.rand(1, rows))
        assert max(sizes) == chunk_rows * padded * 2 > padded * width * 4


class TestSampling:
    @settings(max_examples=100, deadline=None)
    @given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 500), uniform=st.floats(0, 1, width=32))
    def test_a_label_is_the_first_whose_cumulative_probability_exceeds_the_uniform(
        self, seed: int, vocab_size: int, uniform: float
    ) -> None:
        logits = 3 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed))
        label = int(sample_labels(logits, torch.tensor([uniform])))
        cumulative = logits.double().softmax(-1)[0].cumsum(0)
        slack = 1e-6  # fp32's rounding of the cumulative sum
        assert cumulative[label] >= uniform - slack
        assert label == 0 or cumulative[label - 1] <= uniform + slack

    @pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 300])
    @pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
    def test_the_ends_of_the_range_draw_tokens_that_have_probability(self, vocab_size: int, uniform: float) -> None:
        logits = torch.full((1, vocab_size), -torch.inf)
        likely = vocab_size // 2
        logits[0, likely] = 0.0
        assert int(sample_labels(logits, torch.tensor([uniform]))) == likely

    def test_equal_logits_are_drawn_by_equal_shares_of_the_range(self) -> None:
        uniforms = (torch.arange(VOCAB_SIZE) + 0.5) / VOCAB_SIZE
        assert torch.equal(sample_labels(torch.zeros(VOCAB_SIZE, VOCAB_SIZE), uniforms), torch.arange(VOCAB_SIZE))

    def test_a_negative_uniform_draws_no_label(self) -> None:
        labels = sample_labels(torch.zeros(3, VOCAB_SIZE), torch.tensor([0.5, -1.0, 0.2]))
        assert labels.tolist() == [150, IGNORED, 60]

    def test_padding_is_never_drawn(self) -> None:
        hidden = torch.zeros(1, 64, WIDTH)
        hidden[..., 0] = 1.0
        weight = torch.zeros(PADDED, WIDTH)
        weight[VOCAB_SIZE:, 0] = 100.0
        uniforms = torch.linspace(0, 1, 64)[None]
        _, loss_sum = LossHead(VOCAB_SIZE)(hidden, weight, None, uniforms)
        assert loss_sum.item() == pytest.approx(64 * torch.tensor(float(VOCAB_SIZE)).log().item(), rel=1e-5)

    def test_rounding_of_the_cumulative_sum_draws_no_token_without_probability(self) -> None:
        cumulative, mass = torch.tensor([[0.5, 0.5000001, 1.0]]), torch.tensor([[0.5, 0.0, 0.5]])
        assert _first_above(cumulative, mass, torch.tensor([[0.5]])).item() == 2

    def test_the_sums_that_a_deterministic_gpu_takes_are_the_cumulative_ones(self) -> None:
        values = torch.rand(3, 393, generator=torch.Generator().manual_seed(0))
        on_a_gpu = SimpleNamespace(type="cuda")
        torch.use_deterministic_algorithms(True)
        try:
            with mock.patch.object(Tensor, "device", on_a_gpu):
                sums = running_sum(values)
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(sums, values.double().cumsum(dim=-1).float())

    def test_logits_far_from_zero_draw_the_labels_of_logits_near_it(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randint(-16, 16, (60, VOCAB_SIZE), generator=generator) / 8
        uniforms = torch.rand(60, generator=generator)
        for offset in (-1000, 1000):
            assert torch.equal(sample_labels(logits + offset, uniforms), sample_labels(logits, uniforms))

    def test_how_a_batch_is_split_changes_no_label(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(60, VOCAB_SIZE, generator=generator)
        uniforms = torch.rand(60, generator=generator)
        whole = sample_labels(logits, uniforms)
        for size in (1, 7, 30):
            parts = [sample_labels(*part) for part in zip(logits.split(size), uniforms.split(size), strict=True)]
            assert torch.equal(torch.cat(parts), whole)

    def test_labels_are_drawn_from_fp32_probabilities_under_autocast(self) -> None:
        # A vocabulary of 50,000 near-equal tokens: sums of such probabilities in bf16 stop growing at 2^-8.
        vocab_size, rows = 50_000, 512
        weight = torch.zeros(vocab_size, 1)
        uniforms = (torch.arange(rows)[None] + 0.5) / rows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            labels = sample_labels(F.linear(torch.ones(1, rows, 1), weight)[0], uniforms[0])
        assert torch.allclose(labels / vocab_size, uniforms[0], atol=1e-4)


def test_log_normalizer_is_finite_for_large_logits() -> None:
    logits = torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]])
    torch.testing.assert_close(log_normalizer(logits), logits.logsumexp(-1))


def test_the_plain_cross_entropy_is_torchs_with_both_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, direction = (3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([4, IGNORED, 0, 10, IGNORED, 4])
    results = []
    for loss_sum in (cross_entropy_sum, partial(F.cross_entropy, reduction="sum", ignore_index=IGNORED)):
        leaf = logits.clone().requires_grad_()
        loss = loss_sum(leaf, targets)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append((loss, first, *torch.autograd.grad(first, leaf, direction)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)
