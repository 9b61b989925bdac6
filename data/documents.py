"""Text files → documents: texts separated by <|endoftext|>, long ones cut into pieces at the ends of paragraphs.

As one document, a whole novel would fall into train or validation. So each text is cut into pieces of about two
thousand words, and each piece is a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Ends a document inside a text file.
SEPARATOR = "<|endoftext|>"

PIECE_WORDS = 2000

#: Recorded in the manifest: another cutting rule gives different tokens.
CUTTING = {"separator": SEPARATOR, "words": PIECE_WORDS}

# The longest paragraph that is kept whole, in characters: about three pieces of English. A piece also ends at this
# length, so that text without paragraphs, lines or spaces is cut too, in bounded memory.
_LONGEST_PARAGRAPH = 1 << 15
_PARAGRAPH_END = re.compile(rf"\n(?:[ \t]*+\n)++|(?P<separator>{re.escape(SEPARATOR)})")


def cut_documents(chunks: Iterable[str], words: int = PIECE_WORDS) -> Iterator[str]:
    """Cut a stream of text into documents: at each separator, and at the first paragraph end after `words` words.

    The chunking of the stream does not matter. Newlines at both ends of a document are stripped; documents that are
    only white space are dropped.
    """
    paragraphs: list[str] = []
    found, characters = 0, 0
    for paragraph, separated in _paragraphs(chunks):
        paragraphs.append(paragraph)
        found += len(paragraph.split())
        characters += len(paragraph)
        if separated or found >= words or characters >= _LONGEST_PARAGRAPH:
            if found:
                yield "".join(paragraphs).strip("\n")
            paragraphs, found, characters = [], 0, 0
    if found:
        yield "".join(paragraphs).strip("\n")


def _paragraphs(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Paragraphs with the blank lines after them, each with whether a separator followed (which is dropped).

    Paragraphs longer than the limit are cut at a line, else at a space, else at the limit.
    """
    stream = iter(chunks)
    text, start, ended = "", 0, False
    needed = _LONGEST_PARAGRAPH + len(SEPARATOR)
    while True:
        if len(text) - start < needed and not ended:
            chunk = next(stream, None)
            ended = chunk is None
            text, start = text[start:] + (chunk or ""), 0
            continue
        if start == len(text):
            return
        match = _PARAGRAPH_END.search(text, start, start + needed)
        if match is None:
            limit = start + _LONGEST_PARAGRAPH
            if limit >= len(text):
                stop = len(text)
            else:
                stop = (text.rfind("\n", start, limit) + 1) or (text.rfind(" ", start, limit) + 1) or limit
            yield text[start:stop], False
            start = stop
        elif match["separator"]:
            yield text[start : match.start()], True
            start = match.end()
        else:
            yield text[start : match.end()], False
            start = match.end()
