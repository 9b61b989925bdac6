from __future__ import annotations

import itertools
import lzma
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents as module
from data.documents import cut_documents
from data.sources import SampleSource

texts = st.lists(
    st.sampled_from(["word", " ", "  ", "\n", "\n\n", "\n \n", "\t", "longer-word", "é", "\n\n\n\n"]), max_size=200
).map("".join)


def test_the_sample_is_cut_into_documents_of_about_two_thousand_words_at_paragraph_ends() -> None:
    for file in SampleSource().fetch(print).files:
        text = lzma.decompress(file.read_bytes()).decode()
        documents = list(cut_documents([text]))
        words = [len(document.split()) for document in documents]
        assert sum(words) == len(text.split())
        assert min(words[:-1]) >= 2000
        assert sorted(words)[len(words) // 2] < 2200
        place = 0
        for document in documents:  # nothing is lost between them but line feeds, two or more of them
            found = text.index(document, place)
            between = text[place:found]
            assert between.strip("\n") == ""
            assert place == 0 or len(between) >= 2
            place = found + len(document)
        assert text[place:].strip("\n") == ""


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
        assert "".join("".join(whole).split()) == "".join(text.split()), "no word is lost"
        assert all(document.strip() for document in whole)
    finally:
        patch.undo()


@pytest.mark.parametrize("unit", ["x", " ", "\n", "word ", "line of words\n"])
def test_text_without_paragraphs_is_cut_in_bounded_memory(unit: str) -> None:
    chunk = unit * (100_000 // len(unit))
    tracemalloc.start()
    longest = max((len(document) for document in cut_documents(chunk for _ in range(50))), default=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest < 100_000
    assert peak < 1_500_000


def test_white_space_alone_is_no_document() -> None:
    assert list(cut_documents(["\n\n \n", "\t\n\n"])) == []
