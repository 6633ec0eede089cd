"""Turns Ctrl-C and SIGTERM into a request that a loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """``signal``: the number of the signal that asked for a stop, or 0."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """In this block the first Ctrl-C or SIGTERM is only noted; a second Ctrl-C interrupts at once.

    Only the main thread may say what a signal does, so in another one signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
