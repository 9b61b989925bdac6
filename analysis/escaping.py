"""Escape text from records for Markdown, links and figures.

Jinja escapes HTML, and `training.recording.terminal` escapes terminal control sequences.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote


def href(path: Path, location: Path) -> str:
    """Return the link from a page in the directory `location` to a path: relative and percent-encoded."""
    return quote(Path(os.path.relpath(path, location)).as_posix())


def markdown(text: str) -> str:
    """Escape text as one line of Markdown, without tags, link targets and control characters.

    Only markup is changed: "< 0.001" and "[0.76, 0.82]" stay as they are.
    """
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", _shown(" ".join(text.split()))).replace("](", r"]\(")


def figure(text: str) -> str:
    """Escape text for a figure: dollar signs do not start mathematics."""
    return _shown(text).replace("$", r"\$")


def _shown(text: str) -> str:
    """Replace control characters by a visible one."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)
