from __future__ import annotations

import itertools
import lzma
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents as module
from data.documents import SEPARATOR, cut_documents
from data.sources import SampleSource

texts = st.lists(
    st.sampled_from(["word", " ", "  ", "\n", "\n\n", "\n \n", "\t", "longer-word", "é", "\n\n\n\n", "<|endoftext|>"]),
    max_size=200,
).map("".join)


@pytest.mark.slow
def test_the_sample_is_cut_into_documents_of_about_two_thousand_words_at_paragraph_ends() -> None:
    parts_of = {"austen.txt.xz": 6, "shakespeare.txt.xz": 38, "sotu.txt.xz": 249}
    for file in SampleSource().fetch(print).files:
        parts = lzma.decompress(file.read_bytes()).decode().split(SEPARATOR)
        assert len(parts) == parts_of[file.name]
        documents = list(cut_documents([SEPARATOR.join(parts)]))
        assert documents == [document for part in parts for document in cut_documents([part])]
        for part in parts:
            pieces = list(cut_documents([part]))
            words = [len(piece.split()) for piece in pieces]
            assert sum(words) == len(part.split())
            assert all(count >= 2000 for count in words[:-1])
            assert max(words) < 6000
            place = 0
            for piece in pieces:  # only line feeds, two or more, are lost between them
                found = part.index(piece, place)
                between = part[place:found]
                assert between.strip("\n") == ""
                assert place == 0 or len(between) >= 2
                place = found + len(piece)
            assert part[place:].strip("\n") == ""
        typical = sorted(len(document.split()) for document in documents)[len(documents) // 2]
        assert 1900 < typical < 2200


def test_a_separator_ends_a_document_wherever_it_stands() -> None:
    text = f"one\n{SEPARATOR}\ntwo{SEPARATOR}three\n\nfour\n{SEPARATOR}{SEPARATOR}\n"
    assert list(cut_documents([text])) == ["one", "two", "three\n\nfour"]
    long = "x" * (module._LONGEST_PARAGRAPH - 5) + SEPARATOR + "y"
    assert list(cut_documents([long])) == ["x" * (module._LONGEST_PARAGRAPH - 5), "y"]


@settings(deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 1000)), words=st.integers(1, 30))
def test_where_the_stream_is_chunked_makes_no_difference(text: str, cuts: list[int], words: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_LONGEST_PARAGRAPH", 50)
    try:
        whole = list(cut_documents([text], words))
        bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
        chunks = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
        assert list(cut_documents(chunks, words)) == whole
        assert "".join("".join(whole).split()) == "".join(text.replace(SEPARATOR, "").split()), "no word is lost"
        assert all(document.strip() for document in whole)
        parts = [list(cut_documents([part], words)) for part in text.split(SEPARATOR)]
        assert whole == [document for part in parts for document in part]
    finally:
        patch.undo()


@pytest.mark.parametrize("unit", ["x", " ", "\n", "word ", "line of words\n"])
@pytest.mark.slow
def test_text_without_paragraphs_is_cut_in_bounded_memory(unit: str) -> None:
    chunk = unit * (100_000 // len(unit))
    tracemalloc.start()
    longest = max((len(document) for document in cut_documents(chunk for _ in range(50))), default=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest < 100_000
    assert peak < 1_500_000


def test_white_space_alone_is_not_a_document() -> None:
    assert list(cut_documents(["\n\n \n", "\t\n\n"])) == []
