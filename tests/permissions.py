"""Permissions that bind root, too: without two capabilities of Linux the bits of files count as for everybody else."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# capability.h
VERSION_3, DAC_OVERRIDE, DAC_READ_SEARCH = 0x20080522, 1 << 1, 1 << 2


class NoCapabilitiesError(RuntimeError):
    """This system has none, or does not let them be laid down."""


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """The bits of files count for this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, in two halves
    if not hasattr(libc, "capget") or libc.capget(header, sets):
        raise NoCapabilitiesError("no capabilities here to be laid down")
    before = sets[0]
    sets[0] &= ~(DAC_OVERRIDE | DAC_READ_SEARCH)
    if libc.capset(header, sets):
        raise NoCapabilitiesError("capabilities cannot be laid down here")
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)
