"""Ranks and trials die with the process that started them.

A rank without its launcher waits for peers that never come, or joins a later job on the same port. This module imports
only the standard library: train.py calls it before the slow imports.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def in_joblib() -> bool:
    """Return whether this process is a worker of joblib, which runs trials side by side."""
    return multiprocessing.current_process().name.startswith("LokyProcess")


def die_with_launcher() -> None:
    """Have this process killed when its launcher dies: torchrun's agent, train.py, or the parent of a joblib worker.

    Any other process, such as a rank started by a shell, may outlive its parent. Does nothing on systems other than Linux.
    """
    if sys.platform != "linux" or not (in_joblib() or "TORCHELASTIC_RUN_ID" in os.environ):
        return
    # The kernel sends the signal when the thread that created this process ends. torch's agents create ranks in their main
    # thread; joblib creates workers there or in the thread that manages them and outlives them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid != os.getppid():  # the launcher died before that call
        os.kill(os.getpid(), signal.SIGKILL)
