"""How the threads of OpenMP, with which PyTorch and the C passes compute, wait for each other.

A thread that has run out of work checks many times for more before it sleeps. Alone on the machine that is fastest,
because waking a thread takes time. Beside other work it is slow, because the waiting thread occupies a processor that
another could use. GNU's OpenMP checks far less often while it has more threads than there are processors, so rsengine
gives it sleeping threads for as long as other work goes on. Results do not depend on any of this
(``docs/performance.md``).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from rsengine.processor import LOOKS, OtherWork, usable_cpus

PERIOD = 1.0  # seconds from one look at the machine to the next
IN_THE_WAY = 0.3  # of a processor, used by others where there is none to spare
CALM = 3  # looks in a row that find no other work, after which it has ended


@contextlib.contextmanager
def beside_others(threads: int) -> Iterator[None]:
    """Let ``threads`` threads that compute wait as suits the machine, alone or beside other work, until the end.

    This does nothing for one thread, where the environment says how threads wait, or without the C passes.
    """
    if threads < 2 or not _is_ours() or not _can_shorten():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(threads, ended), name="waiting", daemon=True)
    watches = _started(watch)
    try:
        yield
    finally:
        ended.set()
        if watches:
            watch.join()


def _is_ours() -> bool:
    return os.environ.get("GOMP_SPINCOUNT") == str(LOOKS) and "OMP_WAIT_POLICY" not in os.environ


def _can_shorten() -> bool:
    from rsengine.kernels.native.library import load

    return load()[0] is not None


def _started(thread: threading.Thread) -> bool:
    """Whether the system lets it begin. Without it threads wait as before, and the run goes on."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _watch(threads: int, ended: threading.Event) -> None:
    calm, short, others = 0, None, OtherWork()
    try:
        while not ended.wait(PERIOD):
            calm = 0 if others.used() + threads > len(usable_cpus()) + IN_THE_WAY else calm + 1
            if short is None and not calm:
                short = _Short(threads)
            elif short is not None and calm == CALM:
                short = short.end()
    finally:
        if short is not None:
            short.end()


class _Short:
    """While it lasts, threads that wait sleep almost at once."""

    def __init__(self, threads: int) -> None:
        import torch

        from rsengine.kernels.native.library import run

        self.ended = torch.zeros(1, dtype=torch.int32)
        arguments = {"computing": threads, "ended": self.ended}
        self.holder = threading.Thread(target=run, args=("waiting_shorten",), kwargs=arguments, daemon=True)
        self.lasts = _started(self.holder)

    def end(self) -> None:
        self.ended.fill_(1)
        if self.lasts:
            self.holder.join()
