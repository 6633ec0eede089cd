"""A training step in a process of its own, so that its memory, its threads and what it compiles are as its users have
them: how the C library allocates memory is one setting for a whole process, and rsengine changes it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import torch

from bench.baselines import BASELINES, Case, rsengine_step
from bench.measure import seconds
from rsengine.waiting import beside_others

OURS = "rsengine"
SETTLE_SECONDS = 0.02  # the threads of the previous step spin for a few milliseconds before they sleep


class OwnProcess:
    """Steps of :data:`OURS` or of one of :data:`bench.baselines.BASELINES` on a case, timed in a process of its own.

    Args:
        environment: variables of the process, in place of this one's; ``None`` for one that it does not have.
        watches: whether threads wait as in a run, where the turns of other processes are other work.
    """

    def __init__(
        self, name: str, case: Case, environment: Mapping[str, str | None] | None = None, watches: bool = False
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, case, watches))
        before = dict(os.environ)
        for variable, value in (environment or {}).items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def step(self) -> float:
        """Seconds of one step. Raises RuntimeError where the process has ended."""
        time.sleep(SETTLE_SECONDS)
        try:
            self.pipe.send(True)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name}: its process ended") from error

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, name: str, case: Case, watches: bool) -> None:
    run = rsengine_step(case)[0] if name == OURS else BASELINES[name](case)
    waits = beside_others(torch.get_num_threads()) if watches else contextlib.nullcontext()
    with waits, contextlib.suppress(EOFError):  # closed at the other end: done
        while pipe.recv():
            pipe.send(seconds(run))
