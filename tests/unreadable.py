"""Files that cannot be read, on a disk that can: the tests run as root, whom no permission stops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Have the operating system refuse to open `path`, and all below it, with an error of this number."""
    open_file = os.open

    def refusing(name: Any, *arguments: Any, **named: Any) -> int:
        if path == Path(name) or path in Path(name).parents:
            raise OSError(number, os.strerror(number), str(name))
        return open_file(name, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
