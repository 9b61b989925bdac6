"""The one exception of this package."""

from __future__ import annotations


class DataError(Exception):
    """A corpus or a token directory that cannot be used; the message names the file, what is wrong and the remedy."""
