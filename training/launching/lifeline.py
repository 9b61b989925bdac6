"""Ranks and trials die with the process that started them.

A rank without its launcher waits for peers that never come, or joins a later job on the same port. Imports the standard
library alone: train.py calls it before the imports that take seconds.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Have this process killed when its launcher dies: torchrun's agent, train.py's own, or the parent of a joblib worker.

    Any other process may outlive its parent, such as a rank that a shell has started, and on systems other than Linux
    all may.
    """
    in_joblib = multiprocessing.current_process().name.startswith("LokyProcess")
    if sys.platform != "linux" or not (in_joblib or "TORCHELASTIC_RUN_ID" in os.environ):
        return
    # The signal comes when the thread ends that created this process. torch's agents create ranks in their main thread;
    # joblib creates workers there or in the thread that manages them and ends after them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid != os.getppid():  # it died before that call
        os.kill(os.getpid(), signal.SIGKILL)
