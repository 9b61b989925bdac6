"""The GPUs of a machine, divided between the trials that joblib runs side by side."""

import functools
import itertools
import os
import socket
from collections.abc import Sequence

from training.launching.lifeline import in_joblib

_claims: list[socket.socket] = []  # this process's, one for each of its GPUs


def take_gpus(ranks: int) -> None:
    """Let a worker of joblib see only `ranks` GPUs, those that the fewest workers on this machine have taken.

    Otherwise every trial would train on the first GPU. A worker keeps its GPUs from trial to trial, because CUDA reads
    CUDA_VISIBLE_DEVICES once in a process, until one has another number of ranks. Does nothing in other processes.
    """
    gpus = _visible() if in_joblib() else ()
    size = min(ranks, len(gpus))
    if len(_claims) == size:
        return
    while _claims:
        _claims.pop().close()
    groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
    for turn in itertools.count():
        for group in groups:
            if _claim([f"{gpu}-{turn}" for gpu in group]):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(group)
                return


@functools.cache
def _visible() -> tuple[str, ...]:
    """Return the GPUs that the process saw when it started, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # seconds, which a refused command does not wait for

    count = torch.cuda.device_count()  # asks the driver's library: CUDA is not initialised
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(name.strip() for name in given.split(",")[:count]) if given else tuple(map(str, range(count)))


def _claim(names: Sequence[str]) -> bool:
    """Claim all names or none. A claim is an abstract socket of Linux: it leaves no file and ends with the process."""
    for name in names:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sophia-trial-gpu-{name}")
        except OSError:
            claim.close()
            while _claims:
                _claims.pop().close()
            return False
        _claims.append(claim)
    return True
