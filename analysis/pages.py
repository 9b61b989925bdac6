"""Generated parts of a page: the text between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

from pathlib import Path

from data.files import write_atomically


def read_part(page: Path, name: str) -> str:
    """Return the part `name` of a page.

    Raises:
        ValueError: the page has no such part.
    """
    return _split(page, name)[1].strip()


def write_part(page: Path, name: str, content: str) -> None:
    """Replace the part `name` of a page.

    Raises:
        ValueError: the page has no such part.
    """
    before, _, after = _split(page, name)
    write_atomically(page, f"{before}\n{content.strip()}\n{after}")


def _split(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    content, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no part between {begin} and {end}: add these two lines")
    return before + begin, content, end + after
