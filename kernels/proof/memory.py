"""The strict interpreter's model of memory: who may access it, who accessed it last, how many bytes moved.

For :mod:`.interpreter`; the addresses are NumPy arrays, and nothing here loops over the lanes of an instruction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TAG_BIT = 48  # a user-space address has 47 bits; above them a pointer carries the number of the argument it came from
ADDRESS = np.uint64(2**TAG_BIT - 1)
VERBS = {"load": "loads", "store": "stores", "atomic": "updates"}
SEVERAL = -1  # in a history: touched by more than one program
# What each access must not meet in the history of its addresses when another program left it there ...
CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
# ... and when its own program did, since its last barrier: other threads of the program may have been the ones.
UNORDERED = {("load", "store"), ("load", "atomic"), ("store", "atomic"), ("atomic", "store")}


class RaceError(RuntimeError):
    """The result of a kernel depends on the order in which a GPU happens to run its programs, threads or lanes."""


class Memory(NamedTuple):
    """Bytes [low, high) that a kernel may touch, in the storage that begins at ``storage`` and ends at ``end``."""

    low: int
    high: int
    storage: int
    end: int

    @classmethod
    def of_storage(cls, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        low, high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return cls(low, high, low, high)

    @classmethod
    def of_view(cls, tensor: Tensor) -> Memory:
        """From the tensor's first to its last element, which may be less than its storage."""
        whole = cls.of_storage(tensor)
        if tensor.numel() == 0:
            return whole._replace(low=0, high=0)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return whole._replace(low=tensor.data_ptr(), high=tensor.data_ptr() + (last + 1) * tensor.element_size())


class Shadow:
    """What the current launch did to one storage: for each granule, the epoch of its last load, store and atomic.

    Epochs count the beginnings of programs and their barriers, so one number tells both the program and whether a
    barrier came since. 0 is never.
    """

    def __init__(self, memory: Memory, granule: int) -> None:
        self.origin = memory.storage - memory.storage % 16
        self.extent = memory.end - self.origin
        self.granule = granule
        self.history: dict[str, np.ndarray] = {}

    def lanes(self, addresses: np.ndarray, nbytes: int) -> slice | np.ndarray:
        """The granules under accesses of ``nbytes``; a slice where they are one run, which is far faster to index."""
        if nbytes < self.granule:
            self.history = {kind: np.repeat(past, self.granule // nbytes) for kind, past in self.history.items()}
            self.granule = nbytes
        first = (addresses - self.origin) // self.granule
        each = nbytes // self.granule
        if (first[1:] - first[:-1] == each).all():
            return slice(int(first[0]), int(first[-1]) + each)
        return first if each == 1 else (first[:, None] + np.arange(each)).reshape(-1)

    def past(self, kind: str) -> np.ndarray:
        if kind not in self.history:
            self.history[kind] = np.zeros(-(-self.extent // self.granule), np.int32)
        return self.history[kind]


class Launch:
    """One launch: its arguments' memory, the order of its programs, and what they touched so far."""

    def __init__(self, kernel: str, allowed: dict[int, Memory]) -> None:
        self.kernel = kernel
        self.arguments: list[Memory] = []
        self.allowed = dict(allowed)
        self.bounds: tuple[np.ndarray, list[Memory]] | None = None
        self.order = np.zeros(0, np.int64)
        self.device_functions: set[Callable] = set()
        self.shadows: dict[int, Shadow] = {}
        self.epoch = 0
        self.starts: list[int] = []
        self.programs: list[tuple[int, ...]] = []
        self.loaded: list[int] = []  # bytes, by program

    def begin_program(self, program: tuple[int, ...]) -> None:
        self.epoch += 1
        self.starts.append(self.epoch)
        self.programs.append(program)
        self.loaded.append(0)

    def add_argument(self, tensor: Tensor) -> int:
        """The tag of pointers into ``tensor``."""
        memory = Memory.of_storage(tensor)
        self.allowed[memory.storage] = memory
        self.arguments.append(Memory.of_view(tensor))
        return len(self.arguments) << TAG_BIT

    def locate(self, pointers: np.ndarray) -> Iterator[tuple[Memory | None, np.ndarray]]:
        """Addresses grouped by the memory they were meant for; ``None`` where that is unknown."""
        tags = pointers >> np.uint64(TAG_BIT)
        addresses = (pointers & ADDRESS).view(np.int64)
        if (tags == tags[0]).all():
            yield from self._locate(int(tags[0]), addresses)
            return
        for tag in np.unique(tags):
            yield from self._locate(int(tag), addresses[tags == tag])

    def _locate(self, tag: int, addresses: np.ndarray) -> Iterator[tuple[Memory | None, np.ndarray]]:
        if tag:
            yield self.arguments[tag - 1] if tag <= len(self.arguments) else None, addresses
            return
        if self.bounds is None:  # the address came out of memory: from a pointer table
            memories = sorted(memory for memory in self.allowed.values() if memory.high > memory.low)
            # The last row owns nothing; it represents every address below the first.
            self.bounds = np.array([[memory.low, memory.high] for memory in memories] + [[0, 0]]), memories
        bounds, memories = self.bounds
        owner = np.searchsorted(bounds[:-1, 0], addresses, side="right") - 1
        owner = np.where(addresses < bounds[owner, 1], owner, -1)
        for index in (owner[:1] if (owner == owner[0]).all() else np.unique(owner)).tolist():
            yield memories[index] if index >= 0 else None, addresses[owner == index]

    def access(self, kind: str, memory: Memory | None, addresses: np.ndarray, nbytes: int) -> None:
        """Check one access and put it into the history."""
        if int(np.bitwise_or.reduce(addresses)) % nbytes:
            raise IndexError(
                f"{self.where()} {VERBS[kind]} {nbytes} bytes at an address that is no multiple of {nbytes}"
            )
        if memory is None:
            raise IndexError(
                f"{self.where()} {VERBS[kind]} out of bounds: {addresses.size} lanes outside every argument and "
                "everything that allow() names"
            )
        if addresses.min() < memory.low or addresses.max() + nbytes > memory.high:
            outside = (addresses < memory.low) | (addresses + nbytes > memory.high)
            raise IndexError(f"{self.where()} {VERBS[kind]} out of bounds: {outside.sum()} lanes outside their tensor")
        shadow = self.shadows.get(memory.storage)
        if shadow is None:
            shadow = self.shadows[memory.storage] = Shadow(memory, nbytes)
        lanes = shadow.lanes(addresses, nbytes)
        for other in CONFLICTS[kind]:
            if other in shadow.history:
                self.compare(kind, other, shadow.history[other][lanes])
        past = shadow.past(kind)
        last = past[lanes]
        past[lanes] = self.epoch if kind == "store" else np.where(self.foreign(last), SEVERAL, self.epoch)

    def compare(self, kind: str, other: str, when: np.ndarray) -> None:
        foreign = self.foreign(when)
        if foreign.any():
            epoch = int(when[foreign][0])
            who = "several programs" if epoch == SEVERAL else self.programs[bisect_right(self.starts, epoch) - 1]
            raise RaceError(f"race: {self.where()} {VERBS[kind]} {foreign.sum()} addresses after a {other} by {who}")
        if (kind, other) in UNORDERED and (when == self.epoch).any():
            raise RaceError(
                f"missing barrier: {self.where()} {VERBS[kind]} addresses after its own {other}, "
                "with no tl.debug_barrier() in between"
            )

    def foreign(self, when: np.ndarray) -> np.ndarray:
        return (when != 0) & (when < self.starts[-1])

    def where(self) -> str:
        return f"{self.kernel} program {self.programs[-1]}"


class Traffic:
    """Bytes that kernels loaded and stored, by storage; a lane counts once for every instruction it takes part in.

    longest: of each launch, in order, the bytes that the program with the most of them loaded.
    """

    def __init__(self) -> None:
        self.longest: list[int] = []
        self._bytes: dict[tuple[str, int], int] = defaultdict(int)
        self._kept: dict[int, torch.UntypedStorage] = {}  # an address counted once must not be given to another tensor

    def read(self, tensor: Tensor) -> int:
        return self._bytes["load", tensor.untyped_storage().data_ptr()]

    def written(self, tensor: Tensor) -> int:
        return self._bytes["store", tensor.untyped_storage().data_ptr()]

    def keep(self, tensor: Tensor) -> None:
        self._kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def count(self, kind: str, storage: int, nbytes: int) -> None:
        for direction in ("load", "store") if kind == "atomic" else (kind,):
            self._bytes[direction, storage] += nbytes
