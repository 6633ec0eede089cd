"""The table on the device that tells each program of the multi-tensor updates what to work on.

The lists are cut into chunks of at most ``block`` elements, one program each. A chunk's record holds the addresses of
its first elements, so that a program's data is one dependent load away. The table costs 60 bytes a chunk, 0.1 % of what
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

LISTS = ("params", "grads", "momentum_buffers", "shadow")
# A record: the addresses in the four lists (0 where there is none), the number of elements, the index of the first one
# in its tensor, and the layout: a row of the table of strides, or one of the two negative numbers.
COUNT, FIRST, LAYOUT, WORDS = 4, 5, 6, 7
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

    records: (chunks, WORDS) int64. weight_decay: (chunks,) float32. strides: (rows, 5 * MAX_DIMS) int64, rows ≥ 1.
    dtypes: of the parameters and of the gradients.
    """

    records: Tensor
    weight_decay: Tensor
    strides: Tensor
    dtypes: tuple[torch.dtype, torch.dtype]


def layouts_of(*lists: Sequence[Tensor]) -> tuple[tuple[Layout, ...], ...]:
    return tuple(tuple(Layout(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors) for tensors in lists)


_holders: list[list[tuple[Table, ...]]] = []  # one for each keep_tables() that is open


@contextlib.contextmanager
def keep_tables() -> Iterator[list[tuple[Table, ...]]]:
    """Collect every table that a launch in the block uses, in a list for the caller to keep.

    A captured graph reads its tables at every replay, so whoever captures has to own them: the cache of
    :func:`tables` drops the ones that were used longest ago.
    """
    held: list[tuple[Table, ...]] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.pop()


def tables(
    device: torch.device, block: int, layouts: tuple[tuple[Layout, ...], ...], weight_decay: tuple[float, ...]
) -> tuple[Table, ...]:
    """The table of each launch, one for each combination of dtypes; built anew when a storage moves.

    Args:
        layouts: of the four lists; an absent list is empty.

    Raises:
        RuntimeError: inside CUDA graph capture, where the tables are not in the cache.
        ValueError: a tensor whose strides differ between the lists has too many dimensions or elements.
    """
    found = _cached_tables(device, block, layouts, weight_decay)
    for held in _holders:
        held.append(found)
    return found


@lru_cache(maxsize=64)  # about 1 MB of device memory each for ResNet-RS-50
def _cached_tables(
    device: torch.device, block: int, layouts: tuple[tuple[Layout, ...], ...], weight_decay: tuple[float, ...]
) -> tuple[Table, ...]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph capture met tensors whose table of addresses is not on the device yet, and copying it there "
            "cannot be captured; call once before the capture with these very tensors (gradients too: keep them in "
            "place, zeroed and not set to None)"
        )
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    params, grads, *_ = layouts
    for i, p in enumerate(params):
        if p.shape.numel():
            groups.setdefault((p.dtype, grads[i].dtype if grads else p.dtype), []).append(i)
    with torch.device("cpu"):  # whatever the caller's default device is: the table is computed on the host
        return tuple(_build(device, block, layouts, weight_decay, dtypes, group) for dtypes, group in groups.items())


def _build(
    device: torch.device,
    block: int,
    layouts: tuple[tuple[Layout, ...], ...],
    weight_decay: tuple[float, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
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
        _upload(torch.cat([address, torch.stack([count, first, layout], dim=1)], dim=1), device),
        _upload(torch.tensor([weight_decay[i] for i in group], dtype=torch.float32)[owner], device),
        _upload(torch.tensor(rows or [[0] * (1 + len(LISTS)) * MAX_DIMS]), device),
        dtypes,
    )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to ``device``; the host does not wait for a GPU, which a copy from pageable memory would make it do.

    PyTorch keeps the pinned copy until the stream has passed the transfer.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
