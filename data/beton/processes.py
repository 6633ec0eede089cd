"""Helpers for the child processes of the scan and the writer."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import BaseContext

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def fork_context() -> BaseContext:
    """The fork context, which FFCV's writer uses too. It spares the children a second start of Python.

    The children only decode pictures and write files; they touch neither torch nor a GPU.
    """
    return multiprocessing.get_context("fork")


def follow_parent(parent: int, number: int) -> None:
    """Ask the system to send this process signal `number` when its parent, process `parent`, dies.

    Without it a `kill -9` of the program would leave children that wait on a queue forever. Linux only; elsewhere it
    does nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)


def start_worker(parent: int) -> None:
    """First call in a worker process: leave Ctrl-C to the parent, end on SIGTERM, and die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    follow_parent(parent, signal.SIGKILL)
