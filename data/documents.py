"""Text files → documents: a stream of text is cut at paragraph ends into pieces of about two thousand words.

A novel or a concatenation of years of speeches is one file and many sequences long; as one document it would fall
whole into train or validation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE_WORDS = 2000

# The longest paragraph that is kept whole, in characters: about three pieces of English. A piece ends at this length
# too, so that text without paragraphs, lines or spaces between words is cut all the same, in bounded memory.
_LONGEST_PARAGRAPH = 1 << 15
_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*+\n)++")


def cut_documents(chunks: Iterable[str], words: int = PIECE_WORDS) -> Iterator[str]:
    """Cut a stream of text into documents of `words` words or, up to the end of a paragraph, a little more.

    Where the stream is cut into chunks makes no difference. Line feeds at the two ends of a document are dropped, and
    so are documents of white space alone.
    """
    paragraphs: list[str] = []
    found, characters = 0, 0
    for paragraph in _paragraphs(chunks):
        paragraphs.append(paragraph)
        found += len(paragraph.split())
        characters += len(paragraph)
        if found >= words or characters >= _LONGEST_PARAGRAPH:
            if found:
                yield "".join(paragraphs).strip("\n")
            paragraphs, found, characters = [], 0, 0
    if found:
        yield "".join(paragraphs).strip("\n")


def _paragraphs(chunks: Iterable[str]) -> Iterator[str]:
    """The text's paragraphs, each with the blank lines after it; longer ones are cut at a line, a word or anywhere."""
    stream = iter(chunks)
    text, start, ended = "", 0, False
    while True:
        if len(text) - start < _LONGEST_PARAGRAPH and not ended:
            chunk = next(stream, None)
            ended = chunk is None
            text, start = text[start:] + (chunk or ""), 0
            continue
        if start == len(text):
            return
        limit = min(start + _LONGEST_PARAGRAPH, len(text))
        match = _PARAGRAPH_END.search(text, start, limit)
        if match:
            stop = match.end()
        elif limit == len(text) and ended:
            stop = limit
        else:
            stop = (text.rfind("\n", start, limit) + 1) or (text.rfind(" ", start, limit) + 1) or limit
        yield text[start:stop]
        start = stop
