"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends, however it ends. Linux only; elsewhere this does nothing.

    A rank whose torchrun agent was killed would otherwise train on, hold its run folder, and keep the run from starting again.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we had said so
        os.kill(os.getpid(), signal.SIGKILL)
