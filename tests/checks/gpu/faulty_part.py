"""A part whose rows go wrong in every way that the runner has to survive."""

import ctypes
import os
import signal
import time


def measure(row, setup):
    if row == "hangs":
        time.sleep(600)
    if row == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if row == "crashes":
        ctypes.string_at(0)
    if row == "exits":
        print("the last words", flush=True)
        os._exit(3)
    if row == "raises":
        raise ValueError("no\nmore")
    if row == "prints":
        print("x" * 2**20)
    if row == "breaks the device":
        setup.device.synchronize = lost  # every row after it in this process would fail as well
        raise RuntimeError("an illegal memory access")
    if row == "hides a broken device":
        setup.device.synchronize = lost
        return {"pid": os.getpid(), "wrong": ["one case failed"]}
    if getattr(setup.device.synchronize, "__name__", "") == "lost":
        raise RuntimeError("this row ran in a process whose device is lost")
    return {"pid": os.getpid(), "given": setup.seconds, "wrong": []}


def lost():
    raise RuntimeError("the device is lost")
