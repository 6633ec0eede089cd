"""The augmentations as operations of FFCV's pipelines. Importing this module imports FFCV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Thread, current_thread
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numba as nb
import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.typed import typeddict

from rsengine.augment.operations import SeededOperation
from rsengine.device import preserved_threads

# Importing FFCV makes a typed dictionary, whose methods numba would compile in every process, in about three seconds.
# With caching they are compiled once per machine, like our own functions.
for _method in vars(typeddict).values():
    if isinstance(_method, Dispatcher):
        _method.enable_caching()

with preserved_threads():
    import ffcv  # noqa: F401  (first: ffcv.pipeline cannot be imported by itself)
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import os_cache
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State


class _ReadOnly:
    """A numba scalar type whose array types are read-only."""

    def __init__(self, dtype: nb.types.Type):
        self._dtype = dtype

    def __getitem__(self, layout: slice | tuple[slice, ...]) -> nb.types.Array:
        return self._dtype[layout].copy(readonly=True)


# FFCV's memory manager makes its array type read-only by writing to it. numba shares one object per type, so functions
# already compiled for such an array could no longer be found under their own key (KeyError at the next compilation).
# A type that is read-only from the start leaves that write without effect.
os_cache.nb = SimpleNamespace(types=nb.types, uint8=_ReadOnly(nb.uint8), uint64=nb.uint64)


class FfcvOperation(Operation):
    """One of :mod:`rsengine.augment.operations` in a pipeline of FFCV.

    The epoch is the loader's: FFCV counts the passes over its data in ``Loader.next_epoch``, which also decides the
    order of the images. Setting :attr:`epoch` gives the next pass that number, and later passes count on from it.
    """

    def __init__(self, operation: SeededOperation) -> None:
        super().__init__()
        self.operation = operation
        self._set = 0
        self._is_for_next_pass = False
        self._ahead_of_loader = 0
        # FFCV runs each pass in a thread of its own, and one that was abandoned may still be working on a batch.
        self._passes: WeakKeyDictionary[Thread, int] = WeakKeyDictionary()

    @property
    def epoch(self) -> int:
        """In the thread of a pass, the number of that pass; elsewhere the number last set, initially 0."""
        return self._passes.get(current_thread(), self._set)

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._set, self._is_for_next_pass = number, True

    def _begin_pass(self, iterator: EpochIterator) -> None:
        number = iterator.loader.next_epoch - 1  # counted up before the thread begins
        if self._is_for_next_pass:
            self._ahead_of_loader, self._is_for_next_pass = self._set - number, False
        self._passes[iterator] = number + self._ahead_of_loader

    def generate_code(self) -> Callable:
        def code(images: np.ndarray, memory: None, indices: np.ndarray) -> np.ndarray:
            iterator = current_thread()
            if isinstance(iterator, EpochIterator) and iterator not in self._passes:
                self._begin_pass(iterator)
            return self.operation.apply(images, np.asarray(indices, dtype=np.int64), self.epoch)

        code.with_indices = True  # asks FFCV for the indices of the batch
        return code

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False), None


def for_ffcv(operations: Sequence[SeededOperation]) -> list[FfcvOperation]:
    """The same operations for a pipeline of FFCV, between its decoder and ``ToTensor``."""
    return [FfcvOperation(operation) for operation in operations]
