"""sophia.random: the published vectors of Philox, and numbers that depend on their index alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia import random


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in random.philox4x32((c0, c1, c2, c3), key)) == expected


@given(start=st.integers(0, 200), length=st.integers(0, 200), step=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_normals_of_a_slice_are_the_slice_of_the_normals(start: int, length: int, step: int) -> None:
    whole = random.normals(3, step, "wte", 0, start + length)
    assert torch.equal(random.normals(3, step, "wte", start, start + length), whole[start:])
    assert torch.equal(random.normals_at(3, step, "wte", torch.arange(start, start + length)), whole[start:])


def test_normals_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random.normals(0, 1, "w", 3, 999)
    monkeypatch.setattr(random, "_CHUNK", {"cpu": 7})
    assert torch.equal(random.normals(0, 1, "w", 3, 999), whole)


@pytest.mark.slow
@given(start=st.integers(0, 50), length=st.integers(1, 3000), step=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_compiled_normals_have_the_same_bits(start: int, length: int, step: int) -> None:
    compiled = random.normals(1, step, "w", start, start + length, compile=True)
    assert torch.equal(compiled, random.normals(1, step, "w", start, start + length, compile=False))


def test_many_normals_are_compiled_without_being_asked_to_and_keep_their_bits() -> None:
    count = random._COMPILED_FROM + 5
    assert torch.equal(random.normals(1, 2, "w", 3, count), random.normals(1, 2, "w", 3, count, compile=False))


def test_without_a_compiler_normals_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "_compiled_words", lambda device: None)
    assert torch.equal(random.normals(1, 2, "w", 3, 99, compile=True), random.normals(1, 2, "w", 3, 99))


def test_streams_of_other_seeds_steps_names_and_kinds_are_uncorrelated() -> None:
    n = 20_000
    position = torch.arange(n)
    streams = [
        random.normals(0, 1, "a", 0, n),
        random.normals(1, 1, "a", 0, n),
        random.normals(0, 2, "a", 0, n),
        random.normals(0, 1 + 2**32, "a", 0, n),
        random.normals(0, 1, "b", 0, n),
        random.uniforms(0, 1, position) - 0.5,
        random.uniforms(0, 2, position) - 0.5,
    ]
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    # 21 pairs, each N(0, 1/n): a false alarm has probability 21 · 2Φ(-5) = 1e-5 over the choice of streams.
    assert correlation.abs().max() < 5 / math.sqrt(n)


def distance_from_uniform(values: Tensor) -> float:
    """The largest distance of the share of values below x from x."""
    ordered, share = values.sort().values, torch.arange(len(values) + 1) / len(values)
    return max(float((share[1:] - ordered).max()), float((ordered - share[:-1]).max()))


def test_uniforms_and_normals_have_their_distributions() -> None:
    uniform = random.uniforms(0, 1, torch.arange(100_000))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    normal = random.normals(0, 1, "w", 0, 100_000)
    # Kolmogorov and Smirnov's distance is above x / √n with probability 2 exp(-2x²): 1e-4 for x = 2.23.
    for values in (uniform.double(), torch.special.ndtr(normal.double())):
        assert distance_from_uniform(values) < 2.23 / math.sqrt(100_000)


def test_normals_like_follows_the_flat_index_of_the_tensor() -> None:
    param = torch.empty(7, 5)
    assert torch.equal(random.normals_like(param, 0, 1, "w").flatten(), random.normals(0, 1, "w", 0, 35))


def test_an_empty_or_backward_range_is_told_apart() -> None:
    assert random.normals(0, 1, "w", 5, 5).shape == (0,)
    with pytest.raises(ValueError, match="start = 6 and stop = 5"):
        random.normals(0, 1, "w", 6, 5)


def test_the_numbers_are_frozen() -> None:
    # A change here changes the labels and the noise of every run: records made before could not be paired with later ones.
    whole = [(random.uniforms(0, 1, torch.tensor([0, 1, 2**40])) * 2**24).tolist()]
    whole.append((random.uniforms(2**63, 2**40 + 3, torch.tensor([7]), "other") * 2**24).tolist())
    assert whole == [[11323007, 10298069, 15914368], [13706454]]
    drawn = torch.cat([random.normals(0, 1, "wte", 2, 5), random.normals(5, 2**33 + 1, "wte", 2**34 - 1, 2**34 + 1)])
    expected = [1.2399677, -0.39932704, 0.09602678, 1.4976220, 0.39460671]
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("word", "uniform", "largest"), [(0, 0.0, 6.77), (2**32 - 1, 1 - 2**-24, 0.0)])
def test_the_outermost_words_give_uniforms_below_1_and_finite_normals(
    monkeypatch: pytest.MonkeyPatch, word: int, uniform: float, largest: float
) -> None:
    monkeypatch.setattr(random, "_words", lambda *_: (torch.tensor([word]),) * 4)
    assert random.uniforms(0, 1, torch.arange(1)).item() == uniform
    assert all(abs(z) <= largest for z in random.normals(0, 1, "w", 0, 4).tolist())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_indices_of_any_integer_dtype_have_the_same_numbers(dtype: torch.dtype) -> None:
    index = torch.arange(200)
    assert torch.equal(random.uniforms(0, 1, index.to(dtype)), random.uniforms(0, 1, index))
    assert torch.equal(random.normals_at(0, 1, "w", index.to(dtype)), random.normals_at(0, 1, "w", index))
