"""Sums over the processes of one machine, in memory that all of them see.

gloo sends tensors through sockets, also to a process beside it, and each byte is then copied several times. Here every
process keeps its tensor where the others can read and write it. Each of them adds up its part of the chunks over all
processes, and writes the sum into the tensor of every one: a pass over the tensors, most of it in the cache of a core.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from rsengine.parallel.ranks import Ranks

CHUNK = 2**16  # values; those of two processes in float32 are half a megabyte, less than the cache of a core


class SharedSum:
    """The sum over all processes of a tensor that each of them has; see :func:`shared_sum`.

    Attributes:
        tensor: (length,), this process's.
    """

    def __init__(self, tensors: Sequence[Tensor], ranks: Ranks) -> None:
        self.tensor, self._ranks = tensors[ranks.rank], ranks
        self._mine = ranks.part(list(zip(*(each.split(CHUNK) for each in tensors), strict=True)))
        self._nothing = torch.zeros(1)
        _SUMS[id(self)] = self

    def sum_(self) -> None:
        """Make ``tensor`` the sum over the processes, added up in the order of the ranks. All get the same bits."""
        _sum(self.tensor, id(self))

    def _add_up(self) -> None:
        self._meet()  # all have written what is to be summed
        for first, *others in self._mine:
            for other in others:
                first.add_(other)
            for other in others:
                other.copy_(first)
        self._meet()  # all have their sums

    def _meet(self) -> None:
        """Wait until every process is here: none gets this sum before all have given theirs."""
        self._ranks.sum_(self._nothing)


_SUMS: weakref.WeakValueDictionary[int, SharedSum] = weakref.WeakValueDictionary()


@torch.library.custom_op("rsengine::shared_sum_", mutates_args={"tensor"})
def _sum(tensor: Tensor, number: int) -> None:
    """One operator: to what records a step, each process changes its own tensor, and none those of the others."""
    _SUMS[number]._add_up()


def shared_sum(length: int, dtype: torch.dtype, ranks: Ranks) -> SharedSum | None:
    """A sum of (length,) zeros in each process, or None where the processes do not see each other's memory: those of
    several machines or containers, and all but Linux. All processes must call it, and get the same answer.

    The memory has no name, in ``/dev/shm`` or elsewhere, and ends with the last process that has it.
    """
    size = max(length * dtype.itemsize, 1)
    with contextlib.ExitStack() as held:  # the file of this process, until all the others have opened it
        found = _opened(ranks.all_of(_made(size, held)), size)
        (failed,) = ranks.most(found is None)
    if failed:
        return None
    return SharedSum([torch.frombuffer(memory, dtype=dtype, count=length) for memory in found], ranks)


def _made(size: int, held: contextlib.ExitStack) -> tuple[str, str] | None:
    """A file in memory: where the processes of this machine find it, and what it is there. None: there are none."""
    if not hasattr(os, "memfd_create"):
        return None
    name = f"rsengine-{uuid.uuid4().hex}"
    file = os.memfd_create(name)
    held.callback(os.close, file)
    os.ftruncate(file, size)
    return f"/proc/{os.getpid()}/fd/{file}", f"/memfd:{name}"


def _opened(files: Sequence[tuple[str, str] | None], size: int) -> list[mmap.mmap] | None:
    """The memory behind each of ``files``, or None where one of them is not on this machine."""
    found = []
    for each in files:
        if each is None:
            return None
        path, name = each
        try:
            # Another machine has other files there, under the same numbers.
            if not os.readlink(path).startswith(name):
                return None
            file = os.open(path, os.O_RDWR)
        except OSError:
            return None
        with contextlib.closing(os.fdopen(file, "r+b", buffering=0)):
            found.append(mmap.mmap(file, size))
    return found
