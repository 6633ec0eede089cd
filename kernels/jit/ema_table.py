"""The table on the device that tells each program of the multi-tensor updates what to work on.

The lists are cut into chunks of at most ``block`` elements, one program each. A chunk's record holds the addresses of
its first elements, so that a program's data is one dependent load away. The table costs 68 bytes a chunk, 0.1 % of what
a step moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LISTS = ("params", "grads", "momentum_buffers", "shadow", "copies")
# A record: the addresses in the five lists (0 where there is none), the number of elements, the index of the first one
# in its tensor, and the layout: a row of the table of strides, or one of the two negative numbers.
COUNT, FIRST, LAYOUT, WORDS = 5, 6, 7, 8
ALIGNED = -2  # side by side in memory; each address a multiple of 16 bytes, the count a multiple of 16 elements
LINEAR = -1  # side by side in memory
MAX_DIMS = 4  # a row of strides has as many sizes, then as many strides for each list


class Layout(NamedTuple):
    """All that the table needs to know of a tensor."""

    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Table:
    """What one launch works on.

    records: (chunks, WORDS) int64. weight_decay: (chunks,) float32. strides: (rows, 6 * MAX_DIMS) int64, rows ≥ 1.
    dtypes: of the parameters, the gradients and the copies; the parameters' for a list that is absent.
    """

    records: Tensor
    weight_decay: Tensor
    strides: Tensor
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.records, self.weight_decay, self.strides

    @property
    def kind(self) -> tuple[object, ...]:
        """What two tables have in common of which one can take the other's place in memory."""
        return self.dtypes, *(t.shape for t in self.tensors)


def layouts_of(*lists: Sequence[Tensor]) -> tuple[tuple[Layout, ...], ...]:
    return tuple(tuple(Layout(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors) for tensors in lists)


_holders: list[list[Table]] = []  # one for each keep_tables() and capture_tables() that is open
_captures: list[_Capture] = []  # one for each capture_tables() that is open


class _Capture:
    """Room for the tables of one capture, and what to write into the tables that were taken."""

    def __init__(self, used: Sequence[Table]) -> None:
        self.spare = [Table(*map(torch.empty_like, table.tensors), table.dtypes) for table in used]
        self.taken: list[tuple[Table, Table]] = []

    def take(self, host: Table) -> Table:
        place = next((i for i, table in enumerate(self.spare) if table.kind == host.kind), None)
        if place is None:
            raise RuntimeError(
                "a CUDA graph capture met a list of tensors that no warm-up step had: their number, sizes, dtypes or "
                "alignment differ; run the step as it will be captured before the capture"
            )
        table = self.spare.pop(place)
        self.taken.append((table, host))
        return table

    def fill(self) -> None:
        for table, host in self.taken:
            for tensor, values in zip(table.tensors, host.tensors, strict=True):
                tensor.copy_(_staged(values, tensor.device), non_blocking=True)


@contextlib.contextmanager
def keep_tables() -> Iterator[list[Table]]:
    """Collect every table that a launch in the block uses, in a list for the caller to keep."""
    held: list[Table] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.pop()


@contextlib.contextmanager
def capture_tables(used: Sequence[Table]) -> Iterator[list[Table]]:
    """For the capture of a CUDA graph: as :func:`keep_tables`, with new tables for the launches in the block.

    What a captured step allocates, gradients among it, has addresses that are known during the capture only, when no
    table can be copied to the device. Nor can its memory come from the graph's pool, where it may have belonged to
    another tensor earlier in the step, which every replay writes again. So memory for tables like those of the warm-up
    is allocated first; a launch takes one of them; and what it has to hold is written when the block ends.

    Args:
        used: the tables of the warm-up, from :func:`keep_tables`.

    Yields:
        The tables of the capture. A graph reads them at every replay, so whoever captures has to keep them.
    """
    capture = _Capture(used)
    _captures.append(capture)
    try:
        with keep_tables() as held:
            yield held
    finally:
        _captures.pop()
    capture.fill()


def tables(
    device: torch.device, block: int, layouts: tuple[tuple[Layout, ...], ...], weight_decay: tuple[float, ...]
) -> tuple[Table, ...]:
    """The table of each launch, one for each combination of dtypes; built anew when a storage moves.

    Args:
        layouts: of the five lists, in the order of :data:`LISTS`; an absent list is empty.

    Raises:
        RuntimeError: inside CUDA graph capture, outside :func:`capture_tables` or with tensors unlike the warm-up's.
        ValueError: a tensor whose strides differ between the lists has too many dimensions or elements.
    """
    if _is_capturing(device):
        if not _captures:
            raise RuntimeError("the multi-tensor updates can be captured inside capture_tables() only")
        found = tuple(map(_captures[-1].take, _host_tables(block, layouts, weight_decay)))
    else:
        found = _cached_tables(device, block, layouts, weight_decay)
    for held in _holders:
        held.extend(found)
    return found


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)  # about 1 MB of device memory each for ResNet-RS-50
def _cached_tables(
    device: torch.device, block: int, layouts: tuple[tuple[Layout, ...], ...], weight_decay: tuple[float, ...]
) -> tuple[Table, ...]:
    return tuple(
        Table(*(_staged(t, device).to(device, non_blocking=True) for t in table.tensors), table.dtypes)
        for table in _host_tables(block, layouts, weight_decay)
    )


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor from where it goes to a GPU without a wait of the host, which pageable memory would make it do.

    PyTorch keeps pinned memory until the stream has passed the transfer.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _host_tables(
    block: int, layouts: tuple[tuple[Layout, ...], ...], weight_decay: tuple[float, ...]
) -> tuple[Table, ...]:
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype], list[int]] = {}
    params, grads, _, _, copies = layouts
    for i, p in enumerate(params):
        if p.shape.numel():
            dtypes = p.dtype, grads[i].dtype if grads else p.dtype, copies[i].dtype if copies else p.dtype
            groups.setdefault(dtypes, []).append(i)
    with torch.device("cpu"):  # whatever the caller's default device is
        return tuple(_build(block, layouts, weight_decay, dtypes, group) for dtypes, group in groups.items())


def _build(
    block: int,
    layouts: tuple[tuple[Layout, ...], ...],
    weight_decay: tuple[float, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    group: list[int],
) -> Table:
    present = [role for role, tensors in enumerate(layouts) if tensors]
    kinds, rows = [], []
    for i in group:
        dims = _merged_dims([layouts[role][i] for role in present])
        if len(dims) == 0 or (len(dims) == 1 and set(dims[0][1:]) == {1}):
            kinds.append(LINEAR)
            continue
        _check_walkable(dims, i, {LISTS[role]: layouts[role][i] for role in present})
        dims = [(1,) + (0,) * len(present)] * (MAX_DIMS - len(dims)) + dims
        row = [size for size, *_ in dims]
        for role in range(len(LISTS)):
            row += [dim[1 + present.index(role)] if role in present else 0 for dim in dims]
        kinds.append(len(rows))
        rows.append(row)

    addresses = torch.tensor([[tensors[i].address if tensors else 0 for tensors in layouts] for i in group])
    item_sizes = torch.tensor([tensors[group[0]].dtype.itemsize if tensors else 0 for tensors in layouts])
    numels = torch.tensor([layouts[0][i].shape.numel() for i in group])
    chunks = (numels + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(group)), chunks)  # a tensor's place in the group, for each chunk
    first = (torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]) * block
    count = (numels[owner] - first).clamp_max(block)
    layout = torch.tensor(kinds)[owner]
    # A strided chunk counts from its tensor's start, the others from their own.
    address = addresses[owner] + torch.where(layout == LINEAR, first, 0)[:, None] * item_sizes
    is_aligned = (layout == LINEAR) & (address % 16 == 0).all(dim=1) & (count % 16 == 0)
    layout = torch.where(is_aligned, ALIGNED, layout)
    return Table(
        torch.cat([address, torch.stack([count, first, layout], dim=1)], dim=1),
        torch.tensor([weight_decay[i] for i in group], dtype=torch.float32)[owner],
        torch.tensor(rows or [[0] * (1 + len(LISTS)) * MAX_DIMS]),
        dtypes,
    )


def _merged_dims(tensors: list[Layout]) -> list[tuple[int, ...]]:
    """``(size, stride in each tensor)``, in the first one's storage order, as few dimensions as all of them allow."""
    dims = [dim for dim in zip(tensors[0].shape, *(t.stride for t in tensors), strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: dim[1:], reverse=True)
    merged: list[tuple[int, ...]] = []
    for dim in dims:
        if merged and all(outer == dim[0] * inner for outer, inner in zip(merged[-1][1:], dim[1:], strict=True)):
            merged[-1] = (merged[-1][0] * dim[0], *dim[1:])
        else:
            merged.append(dim)
    return merged


def _check_walkable(dims: list[tuple[int, ...]], i: int, tensors: dict[str, Layout]) -> None:
    shape = tuple(tensors["params"].shape)
    if len(dims) > MAX_DIMS or tensors["params"].shape.numel() >= 2**31:
        strides = ", ".join(f"{name}[{i}] {layout.stride}" for name, layout in tensors.items())
        raise ValueError(
            f"params[{i}]: expected dense strides, the same in all lists, or at most {MAX_DIMS} dimensions to walk and "
            f"fewer than 2**31 elements; got shape {shape} with the strides {strides}"
        )
