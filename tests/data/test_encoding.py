from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import encoding
from data.encoding import DocumentEncoder, pretokens
from data.sources import SampleSource
from data.tokenizers import Tokenizer, gpt2, train_bpe
from tests.data.test_tokenizers import CORPUS, texts

# ASCII text, dense in the special cases of GPT-2's pattern.
ascii_texts = st.text(alphabet=" \n\t\r'sdmtlvreSLx9,.!\x1c\x0b\0", max_size=40)


def expected(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    return [token for text in documents for token in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]]


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(documents=st.lists(ascii_texts | texts | st.text(max_size=12), max_size=6))
@example(documents=["don't I'll we've they're 'tis ''s '"])
@example(documents=["it's", "'s", "a'", "s", "'", "ll", "'l", "l", " 's", "\n's", "'S", "'ss", "'s's"])
@example(documents=["a \n ", " b", "  ", "", "c\n\n", "\nd"])
@example(documents=["caf\u00e9 5\u00a0 x'll\u2028 y", "\u00a0", " \u00a0b", "a \u00e9"])
def test_documents_in_bulk_have_the_ids_that_they_have_one_by_one(documents: list[str]) -> None:
    encoder = DocumentEncoder(gpt2())
    assert encoder.encode(documents).tolist() == expected(gpt2(), documents)
    assert encoder.encode(documents).tolist() == expected(gpt2(), documents), "from the cache"


@settings(deadline=None, max_examples=500)
@given(text=ascii_texts)
def test_pretokens_of_ascii_are_those_of_the_original_pattern(text: str) -> None:
    import regex

    original = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    # `regex` counts \x1c to \x1f as white space, which Unicode does not.
    original = original.replace(r"\s", r"\t\n\v\f\r ").replace(r"|\t\n\v\f\r +", r"|[\t\n\v\f\r ]+")
    original = original.replace(r"(?!\S)", r"(?![^\t\n\v\f\r ])")
    starts, foreign = pretokens(np.frombuffer(text.encode() + b"\xff", np.uint8))
    assert starts.tolist() == [match.start() for match in regex.finditer(original, text)] + [len(text)]
    assert not foreign.any()


def test_the_sample_has_the_ids_that_its_documents_have_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DocumentEncoder, "_ENTRIES", 20_000)  # so that the cache is cleared on the way
    encoder = DocumentEncoder(gpt2())
    for file in SampleSource().fetch(lambda _: None).files:
        text = lzma.decompress(file.read_bytes()).decode()[:1_000_000]
        documents = text.split("\n\n")
        for first in range(0, len(documents), 100):
            batch = documents[first : first + 100]
            assert encoder.encode(batch).tolist() == expected(gpt2(), batch)


def test_pretokens_that_fall_into_one_slot_do_not_take_each_others_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DocumentEncoder, "_SLOT_BITS", 2)
    encoder = DocumentEncoder(gpt2())
    documents = [CORPUS[start : start + 3000] for start in range(0, 60_000, 3000)]
    for _ in range(2):
        assert encoder.encode(documents).tolist() == expected(gpt2(), documents)


@pytest.mark.parametrize("length", range(7, 18))
def test_pretokens_are_told_apart_by_every_byte_and_by_length(length: int) -> None:
    word = "abcdefghijklmnopq"[:length]
    documents = [
        word,
        word[:-1],
        word[:-1] + "\0",
        word + "\0",
        *(word[:i] + "X" + word[i + 1 :] for i in range(length)),
    ]
    encoder = DocumentEncoder(gpt2())
    for _ in range(2):
        assert encoder.encode(documents).tolist() == expected(gpt2(), documents)


def test_a_trained_tokenizer_encodes_in_bulk_as_one_by_one(tmp_path: Path) -> None:
    tokenizer = train_bpe([CORPUS], 700, tmp_path)
    documents = CORPUS[:100_000].split("\n\n")
    assert DocumentEncoder(tokenizer).encode(documents).tolist() == expected(tokenizer, documents)


@pytest.mark.parametrize("text", ["中文字符处理。" * 20_000, "слово " * 20_000, "a" * 300_000, " " * 300_000, "’" * 10])
def test_texts_of_any_script_and_length_are_encoded_as_one_by_one(text: str) -> None:
    documents = [text, "plain", text[:100]]
    assert DocumentEncoder(gpt2()).encode(documents).tolist() == expected(gpt2(), documents)


@pytest.mark.parametrize("run", ["elephant" * 9_000, "elephant" * 20_000, "éléphant" * 9_000, "éléphant" * 20_000])
@pytest.mark.parametrize("before", ["x ", "words " * 10_001, "é\tb "])
def test_a_long_pretoken_has_the_same_ids_among_other_documents(before: str, run: str) -> None:
    documents = [before + run + " end", "plain words " * 100_000]
    assert DocumentEncoder(gpt2()).encode(documents).tolist() == expected(gpt2(), documents)


@pytest.mark.slow
def test_the_cache_stays_bounded() -> None:
    generator = np.random.default_rng(0)
    encoder = DocumentEncoder(gpt2())
    sizes = []
    for _ in range(30):
        letters = generator.integers(97, 123, (20_000, 7), dtype=np.uint8)
        letters[:, 0] = 32
        encoder.encode([letters.tobytes().decode() + " caf\u00e9" * 1000])
        sizes.append(len(encoder._entry))
    assert max(sizes) < encoding.DocumentEncoder._ENTRIES + 30_000
    assert min(sizes[10:]) < max(sizes), "it was emptied"
