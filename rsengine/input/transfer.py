"""Copies batches from the loader to a GPU, each transfer overlapping the step before it.

A slot is a pinned buffer on the host and a buffer on the device. Three things may go wrong with it: the host writes a
pinned buffer that is still being copied, a copy lands in a device buffer that a step still reads, or a step reads one
whose copy has not arrived. A wait on an event prevents each of these, and no wait here stops the device or the loop.
:class:`Feeder` makes the waits through an abstract :class:`Lanes`, so that a test can run them in every legal order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MAIN, COPY = "main", "copy"  # the lane the steps run in, and the lane of the transfers
Batch = tuple[Tensor, Tensor]  # images (N, H, W, 3) uint8, labels (N,) int64


class Buffers(Protocol):
    """The memory of one slot."""

    def write(self, batch: Batch) -> None:
        """Copy a batch into the pinned half, on the host, before this call returns."""

    def upload(self) -> None:
        """Queue the copy from the pinned half to the device's."""

    def inputs(self) -> Batch:
        """The device's half, as large as the batch last written."""


class Lanes(Protocol):
    """Two queues of a device. Each keeps its own order; between them, and towards the host, only events order anything.

    Events are CUDA's: waiting means for the latest recording made before the wait was queued, and an event never
    recorded holds nobody up.
    """

    def new_event(self) -> Any: ...
    def new_buffers(self) -> Buffers: ...
    def record(self, event: Any, lane: str) -> None: ...
    def wait(self, event: Any, lane: str) -> None:
        """What is queued in ``lane`` from now on starts after ``event``. Does not hold up the host."""

    def wait_on_host(self, event: Any) -> None: ...
    def upload(self, buffers: Buffers) -> None:
        """``buffers.upload()`` in the lane COPY."""


class _Slot(NamedTuple):
    buffers: Buffers
    copied: Any  # event: the pinned half may be written again, and the device's half holds the batch
    released: Any  # event: nothing queued so far reads the device's half any more


class Feeder:
    """Hands out batches on the device. Steps are to be queued in the lane MAIN, the current stream.

    Args:
        slots: two let one batch travel while the step before it runs. The host gets at most twice as many steps ahead
            of the device, so that no queue grows without end.
    """

    def __init__(self, lanes: Lanes, slots: int = 2) -> None:
        self.lanes = lanes
        self._slots = [_Slot(lanes.new_buffers(), lanes.new_event(), lanes.new_event()) for _ in range(slots)]
        for slot in self._slots:
            # The memory may have been freed by something still queued in MAIN: its order means nothing to COPY.
            lanes.record(slot.released, MAIN)

    def feed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Each batch on the device, to be read by what the caller queues before it asks for the next one."""
        lanes = self.lanes
        for slot, batch in zip(itertools.cycle(self._slots), batches, strict=False):
            lanes.wait_on_host(slot.copied)  # the pinned half's last transfer, two batches ago, is over
            slot.buffers.write(batch)
            lanes.wait(slot.released, COPY)  # so is the step that read the device's half
            lanes.upload(slot.buffers)
            lanes.record(slot.copied, COPY)
            lanes.wait(slot.copied, MAIN)  # and this batch is there before its step starts
            try:
                yield slot.buffers.inputs()
            finally:  # a caller that stops early has queued a step all the same
                lanes.record(slot.released, MAIN)


class TensorBuffers:
    """A slot's memory.

    Args:
        batch_size, image_size: of the largest batch; (height, width) in pixels.
        pinned: page-locked host memory, which alone can be copied while the host goes on.
    """

    def __init__(self, batch_size: int, image_size: tuple[int, int], device: torch.device, pinned: bool = True) -> None:
        shapes = ((batch_size, *image_size, 3), torch.uint8), ((batch_size,), torch.int64)
        self.host = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in shapes]
        self.device = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self.count = 0

    def write(self, batch: Batch) -> None:
        """Raises ``ValueError`` for a batch that is larger, or of other images, than the slot is made for."""
        self.count = len(batch[1])
        for name, buffer, given in zip(("images", "labels"), self.host, batch, strict=True):
            fits = given.shape[1:] == buffer.shape[1:] and given.dtype == buffer.dtype
            if not fits or len(given) != self.count or self.count > len(buffer):
                raise ValueError(
                    f"{name}: expected {buffer.dtype} {tuple(buffer.shape)}, or fewer rows; "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
            buffer[: self.count].copy_(given)

    def upload(self) -> None:
        for target, source in zip(self.device, self.host, strict=True):
            target[: self.count].copy_(source[: self.count], non_blocking=True)

    def inputs(self) -> Batch:
        images, labels = self.device
        return images[: self.count], labels[: self.count]


class CudaLanes:
    """:class:`Lanes` of one GPU: MAIN is the current stream at each call, COPY a stream of its own."""

    def __init__(self, batch_size: int, image_size: tuple[int, int], device: torch.device) -> None:
        self._shape, self._device = (batch_size, image_size), device
        self._copy_stream = torch.cuda.Stream(device)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(blocking=True)  # a host that waits leaves its core to the loader

    def new_buffers(self) -> TensorBuffers:
        return TensorBuffers(*self._shape, self._device)

    def record(self, event: torch.cuda.Event, lane: str) -> None:
        event.record(self._stream(lane))

    def wait(self, event: torch.cuda.Event, lane: str) -> None:
        self._stream(lane).wait_event(event)

    def wait_on_host(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def upload(self, buffers: Buffers) -> None:
        with torch.cuda.stream(self._copy_stream):
            buffers.upload()

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return self._copy_stream if lane == COPY else torch.cuda.current_stream(self._device)


def feeder_for(device: torch.device, batch_size: int, image_size: tuple[int, int]) -> Feeder | None:
    """A feeder to ``device``, or ``None`` for the CPU, which needs no transfer."""
    return Feeder(CudaLanes(batch_size, image_size, device)) if device.type == "cuda" else None
