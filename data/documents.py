"""Text files → documents: texts parted by <|endoftext|>, and long ones cut at paragraph ends into pieces.

A novel or a play is many sequences long; as one document it would fall whole into train or validation. So a text is
cut into pieces of about two thousand words, and each of these is a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Written in a text file, it ends a document, as is usual in collections of texts in one file.
SEPARATOR = "<|endoftext|>"

PIECE_WORDS = 2000

#: How texts are cut, for the manifest: tokens that were cut by another rule are other tokens.
CUTTING = {"separator": SEPARATOR, "words": PIECE_WORDS}

# The longest paragraph that is kept whole, in characters: about three pieces of English. A piece ends at this length
# too, so that text without paragraphs, lines or spaces between words is cut all the same, in bounded memory.
_LONGEST_PARAGRAPH = 1 << 15
_PARAGRAPH_END = re.compile(rf"\n(?:[ \t]*+\n)++|(?P<separator>{re.escape(SEPARATOR)})")


def cut_documents(chunks: Iterable[str], words: int = PIECE_WORDS) -> Iterator[str]:
    """Cut a stream of text into documents: at each separator, and before that, if `words` words have been passed, at
    the end of the paragraph.

    Where the stream is cut into chunks makes no difference. Line feeds at the two ends of a document are dropped, and
    so are documents of white space alone.
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
    """The text's paragraphs, each with the blank lines after it, and whether a separator (which is dropped) followed.

    Longer ones are cut at a line, a word or, for want of these, anywhere.
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
