"""Processes that share training steps, each bound to its part of the cores as ``--processes`` binds them, started once
and kept: what is timed in turn begins warm."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from bench.baselines import CLASSES, MEAN, STD
from bench.measure import seconds
from rsengine.config import Recipe
from rsengine.device import choose_execution, keep_freed_memory
from rsengine.engine.build import build_step
from rsengine.engine.step import TrainStep
from rsengine.parallel.launch import LAUNCHED, bind_to_cores
from rsengine.parallel.ranks import Ranks, join

SETTLE_SECONDS = 0.02  # the threads of the previous step spin for a few milliseconds before they sleep


@dataclass(frozen=True)
class Network:
    """A training step to share.

    Attributes:
        side: pixels a side, to which the step resizes 32x32 images, as a run of the recipe does.
        steps: that one timing takes.
    """

    name: str
    recipe: Recipe
    side: int
    steps: int

    @property
    def batch(self) -> int:
        return self.recipe.train.batch_size


@dataclass(frozen=True)
class Timing:
    """Of some steps in one process.

    Attributes:
        seconds: of a step.
        reductions: seconds of each step's all-reduce, with waiting for the other processes.
        nbytes: of the gradients, and 0 in one process.
    """

    seconds: float
    reductions: tuple[float, ...]
    nbytes: int


class Group:
    """``size`` processes on this machine's cores, which run the same steps at once.

    Args:
        sockets: have gloo send the gradients even though the processes share memory.
    """

    def __init__(self, size: int, sockets: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent does
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._environment(rank, size), sockets), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def _environment(self, rank: int, size: int) -> dict[str, str]:
        found = {LAUNCHED: "", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}  # bound as by --processes
        if size == 1:  # as a run without it
            return found
        names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": self._store.port}
        found |= {name: str(value) for name, value in names.items()}
        return found | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def prepare(self, network: Network) -> None:
        """Build the step in place of another one, and run it twice."""
        self._call("prepare", network)

    def run(self, steps: int) -> list[Timing]:
        """Time ``steps`` steps. By rank."""
        time.sleep(SETTLE_SECONDS)
        return self._call("run", steps)

    def _call(self, name: str, argument: Any) -> list[Any]:
        try:
            for pipe in self._pipes:
                pipe.send((name, argument))
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{name}: one of {len(self._pipes)} processes ended") from error

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()


class _Member:
    """One process of a group."""

    def __init__(self, ranks: Ranks, sockets: bool) -> None:
        self.ranks, self.sockets = ranks, sockets
        self.step: TrainStep | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.reductions: list[float] = []
        keep_freed_memory()  # as the training command does

    def prepare(self, network: Network) -> None:
        self.step = None  # its memory is used again
        torch.manual_seed(0)
        ranks = replace(self.ranks, backend="sockets") if self.sockets else self.ranks
        self.step = build_step(network.recipe, CLASSES, MEAN, STD, choose_execution("cpu"), 1000, ranks=ranks)
        if network.side != 32:
            self.step.image_size = (network.side, network.side)
        images = torch.randint(0, 256, (network.batch, 32, 32, 3), dtype=torch.uint8)
        self.inputs = self.ranks.part(images).contiguous(), self.ranks.part(torch.arange(network.batch) % CLASSES)
        if self.step.update.reduction is not None:
            self.step.update.reduction.reduce = self._timed(self.step.update.reduction.reduce)
        self.run(2)

    def run(self, steps: int) -> Timing:
        self.reductions.clear()
        spent = seconds(lambda: [self.step(*self.inputs) for _ in range(steps)]) / steps
        reduction = self.step.update.reduction
        return Timing(spent, tuple(self.reductions), 0 if reduction is None else reduction.nbytes)

    def _timed(self, reduce: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.reductions.append(seconds(reduce))


def _serve(pipe: Connection, environment: dict[str, str], sockets: bool) -> None:
    os.environ.update(environment)
    bind_to_cores()
    ranks = join("cpu")
    member = _Member(ranks, sockets)
    try:
        while True:
            name, argument = pipe.recv()
            pipe.send(getattr(member, name)(argument))
    except EOFError:  # closed at the other end: done
        ranks.leave()


def last_reductions(timings: Sequence[Timing]) -> list[float]:
    """Of each step, the seconds of the all-reduce in the process that came last and so did not wait."""
    return [min(each) for each in zip(*(timing.reductions for timing in timings), strict=True)]
