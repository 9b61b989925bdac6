"""This package's exception."""

from __future__ import annotations


class DataError(Exception):
    """A corpus or token directory cannot be used; the message names the file, the fault and the remedy."""
