from __future__ import annotations

import base64
import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from data import DataError
from data import tokenizers as project
from data.tokenizers import Tokenizer, TokenizerSpec, gpt2, train_bpe

SAMPLE = Path(project.__file__).parent / "sample"
CORPUS = lzma.decompress((SAMPLE / "austen.txt.xz").read_bytes()).decode()[:400_000]

# Text near what real corpora hold: words, white space of all sorts, contractions, other scripts, specials, controls.
FRAGMENTS = (
    *("the", " a", "'s", "'ll", "'", "1984", "!?", "-----", "<|endoftext|>"),
    *("é", "中文", "🙂", "Ġ", "ﬁ", "ß"),
    *("\n", "\n\n", "  ", "\t", "\r\n", "\u00a0", "\u2028", "\x1c", "\x85", "\ufeff", "\0"),
)
texts = st.text() | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)


def test_ids_are_those_of_openai() -> None:
    # Both hashes are pinned by tiktoken: the first of r50k_base.tiktoken (GPT-2's vocabulary under another name), the
    # second of OpenAI's encoder.json, whose content the ids determine.
    tokenizer = gpt2()
    assert tokenizer.sha256 == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    character = {byte: character for character, byte in project._byte_of_character().items()}
    encoder = {"".join(character[byte] for byte in token): rank for token, rank in tokenizer._ranks.items()}
    encoder["<|endoftext|>"] = tokenizer.end_of_text
    assert (
        hashlib.sha256(json.dumps(encoder).encode()).hexdigest()
        == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )


def test_known_ids() -> None:
    tokenizer = gpt2()
    assert tokenizer.encode("hello world").tolist() == [31373, 995]  # tiktoken's documented example
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """The encoding that tiktoken's own plugin would build, with its pattern."""
    return tiktoken.Encoding(
        "reference",
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2()._ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


@settings(deadline=None)
@given(text=texts)
@example(text=CORPUS[:20_000])
def test_text_is_encoded_as_by_tiktoken_and_decodes_to_itself(reference: tiktoken.Encoding, text: str) -> None:
    ids = gpt2().encode(text)
    assert ids.tolist() == reference.encode_ordinary(text)
    assert gpt2().decode(ids) == text


def test_the_end_of_text_written_in_a_document_does_not_end_it() -> None:
    assert gpt2().end_of_text not in gpt2().encode("a<|endoftext|>b")
    assert gpt2().decode(gpt2().encode("a<|endoftext|>b")) == "a<|endoftext|>b"


@settings(deadline=None, max_examples=300)
@given(text=texts, size=st.integers(1, 12))
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(text: str, size: int) -> None:
    patch = pytest.MonkeyPatch()
    whole = gpt2().encode(text)
    patch.setattr(project, "_PIECE_CHARACTERS", size)
    try:
        pieces = list(project._pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece) <= 2 * size + 1 for piece in pieces)
        if all(len(piece) < 2 * size for piece in pieces):  # no piece was cut at its maximum length
            assert gpt2().encode(text).tolist() == whole.tolist()
        assert gpt2().decode(gpt2().encode(text)) == text
    finally:
        patch.undo()


def test_long_runs_without_a_place_to_cut_are_encoded_all_the_same() -> None:
    for unit in (" ", "a", "\n", "中", "x" * 999 + "\t"):
        text = "start " + unit * (400_000 // len(unit)) + " end"
        assert gpt2().decode(gpt2().encode(text)) == text


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert gpt2().decode(gpt2().encode("a\ud800b")) == "a\ufffdb"


def test_a_changed_vocabulary_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "vocab.bpe"
    other.write_bytes((SAMPLE / "gpt2_vocab.bpe").read_bytes().replace(b"h e\n", b"e h\n", 1))
    monkeypatch.setattr(project, "_VOCAB_BPE", other)
    with pytest.raises(DataError, match=r"is not GPT-2's vocab.bpe.*restore it"):
        gpt2.__wrapped__()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    directory = tmp_path_factory.mktemp("bpe")
    return train_bpe([CORPUS], 1000, directory), directory


def test_a_trained_tokenizer_has_the_size_asked_for_and_is_lossless(trained: tuple[Tokenizer, Path]) -> None:
    tokenizer, _ = trained
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (1000, 999)
    ids = tokenizer.encode(CORPUS)
    assert ids.max() < 999
    assert tokenizer.decode(ids) == CORPUS
    assert ids.size < 0.45 * len(CORPUS.encode())
    assert tokenizer.decode(tokenizer.encode("中🙂\0")) == "中🙂\0", "bytes that the corpus never had"


def test_training_depends_on_the_texts_alone(
    trained: tuple[Tokenizer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = train_bpe(iter([CORPUS]), 1000, tmp_path)
    assert tokenizer.sha256 == trained[0].sha256
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained[1] / "tokenizer.json").read_bytes()


@settings(deadline=None)
@given(text=texts.filter(lambda text: "<|endoftext|>" not in text))
@example(text=CORPUS[:50_000])
def test_a_trained_tokenizer_means_the_same_to_the_tokenizers_library(
    trained: tuple[Tokenizer, Path], text: str
) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(trained[1] / "tokenizer.json"))
    assert library.get_vocab_size() == 1000
    assert library.token_to_id("<|endoftext|>") == 999
    assert library.encode(text).ids == trained[0].encode(text).tolist()


def test_a_vocabulary_too_large_for_the_corpus_is_refused_with_the_largest_possible(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=5000 is too large .* choose at most (\d+)"):
        train_bpe(["so short a corpus, so short"], 5000, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("spec", [("gpt3", None), ("bpe", None), ("bpe", 257), ("bpe", "many")])
def test_unknown_tokenizers_are_refused(spec: tuple[str, int | None]) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        TokenizerSpec(*spec)


def test_the_hash_is_that_of_the_tiktoken_file(trained: tuple[Tokenizer, Path]) -> None:
    tokenizer = trained[0]
    lines = [base64.b64encode(tokenizer._encoding.decode_single_token_bytes(i)) + b" %d\n" % i for i in range(999)]
    assert tokenizer.sha256 == hashlib.sha256(b"".join(lines)).hexdigest()


def test_ids_come_as_unsigned_integers() -> None:
    assert gpt2().encode("a").dtype == np.uint32
    assert [gpt2().encode(text).tolist() for text in ("hello", "", " world")] == [[31373], [], [995]]
