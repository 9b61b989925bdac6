"""Detect process limits (ulimit) too low for a run, before they cause an obscure failure.

This module is imported before torch, which cannot be loaded if address space is too small.
"""

import resource

#: Bytes for torch's libraries and the smallest model on a CPU.
ADDRESS_SPACE = 1280 << 20
#: Open files of a process that starts ranks: its own, and those for each rank. With fewer it hangs.
DESCRIPTORS, DESCRIPTORS_OF_RANK = 32, 16


def address_space_failure() -> str | None:
    """Return why torch cannot be loaded, or None."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft >= ADDRESS_SPACE:
        return None
    return (
        f"the address space is limited to {soft >> 20} MiB, but PyTorch needs at least {ADDRESS_SPACE >> 20}; "
        "raise the limit, for example with ulimit -v unlimited"
    )


def descriptors_failure(ranks: int) -> str | None:
    """Return why this process cannot start that many ranks, or None. Raises a soft limit that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS + DESCRIPTORS_OF_RANK * ranks
    if soft >= needed:
        return None
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return None
    return f"open files are limited to {hard}, but {ranks} ranks need {needed}; raise the limit: ulimit -n {needed}"
