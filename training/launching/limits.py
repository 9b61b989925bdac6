"""Limits of the process (ulimit) under which a run cannot begin, found before they end it in an obscure way.

Imported before torch, which cannot be loaded under the first of them.
"""

import resource

#: torch's libraries, and the smallest model on a CPU.
ADDRESS_SPACE = 1280 << 20
#: Files that a process which starts ranks has open: its own, and those of each rank. With fewer it waits for ever.
DESCRIPTORS, DESCRIPTORS_OF_RANK = 32, 16


def address_space_failure() -> str | None:
    """Why torch cannot be loaded, or None."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft >= ADDRESS_SPACE:
        return None
    return (
        f"this process may have {soft >> 20} MiB of address space and PyTorch needs at least {ADDRESS_SPACE >> 20}; "
        "raise the limit, for example with ulimit -v unlimited"
    )


def descriptors_failure(ranks: int) -> str | None:
    """Why so many ranks cannot be started from here, or None. A soft limit that is too low is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS + DESCRIPTORS_OF_RANK * ranks
    if soft >= needed:
        return None
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return None
    return (
        f"this process may have {hard} files open and {ranks} ranks need {needed}; raise the limit: ulimit -n {needed}"
    )
