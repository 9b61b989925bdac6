"""Text from records for the pages and pictures that show it: a name there is a name, whatever its characters mean elsewhere.

HTML is escaped by Jinja, and what a terminal would obey by `training.recording.terminal`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote


def href(path: Path, location: Path) -> str:
    """The link from a page in the directory `location` to a path: relative, and percent-encoded, so without a scheme."""
    return quote(Path(os.path.relpath(path, location)).as_posix())


def markdown(text: str) -> str:
    """Text in Markdown, on one line: it begins neither a tag nor the target of a link, and holds no control characters.

    Only what would be markup is changed: "< 0.001" and "[0.76, 0.82]" stay as they are.
    """
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", _shown(" ".join(text.split()))).replace("](", r"]\(")


def figure(text: str) -> str:
    """Text in a figure: dollar signs are no mathematics."""
    return _shown(text).replace("$", r"\$")


def _shown(text: str) -> str:
    """Control characters as one that can be seen."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)
