"""Generated parts of a page: the text between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

from pathlib import Path

from data.files import write_atomically


def write_part(page: Path, name: str, content: str) -> None:
    """Replace the part `name` of a page.

    Raises:
        ValueError: the page has no such part.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no part between {begin} and {end}: add these two lines")
    write_atomically(page, f"{before}{begin}\n{content.strip()}\n{end}{after}")
