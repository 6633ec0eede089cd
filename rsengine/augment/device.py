"""Pad-and-crop, horizontal flip and Cutout of a whole batch as a tensor program, for any device.

The same bytes as the FFCV operations of :mod:`rsengine.augment.operations` for the same (seed, epoch, index): the
random numbers are those of :mod:`rsengine.augment.generator`, computed in int64, where PyTorch's products and sums wrap
around as uint64 ones do and only the shifts and the last product need care. All of it is integer arithmetic, so that no
device rounds it differently. Nothing here imports FFCV or numba.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
CROP_STREAM, FLIP_STREAM, CUTOUT_STREAM = 1, 2, 3  # of the FFCV operations


def signed(word: int) -> int:
    """The int64 with the bits of ``word`` modulo 2**64."""
    return (word + 2**63) % 2**64 - 2**63


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 words of any shape, as bits."""
    x = (x ^ _shift_right(x, 30)) * signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros from the left; ``>>`` alone would shift in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Draws:
    """Several random integers an image: draw ``j`` is below ``bounds[j]``, as ``generator.draw`` would give it.

    Args:
        plan: (stream, counter, bound) of each draw, the bound from 1 to 2**31.
    """

    def __init__(self, plan: Sequence[tuple[int, int, int]], seed: int, device: torch.device | str = "cpu") -> None:
        def table(words: list[int]) -> Tensor:
            return torch.tensor([signed(word) for word in words], dtype=torch.int64, device=device)

        self.streams = table([stream + _GOLDEN for stream, _, _ in plan])
        self.counters = table([_GOLDEN * (counter + 1) for _, counter, _ in plan])
        self.bounds = table([bound for _, _, bound in plan])
        self.state = mix(table([seed + _GOLDEN]))  # (1,); of the key's four rounds the one that is the same for all

    def __call__(self, indices: Tensor, epoch: Tensor) -> Tensor:
        """``indices``: (N,) int64, places in the data set; ``epoch``: () int64. Returns (N, len(plan)) int64."""
        state = mix(self.state ^ (epoch + signed(_GOLDEN)))
        state = mix(state ^ (indices + signed(_GOLDEN)))
        keys = mix(state.unsqueeze(1) ^ self.streams)
        bits = _shift_right(mix(keys + self.counters), 32)
        return (bits * self.bounds) >> 32  # below 2**63: no wrap-around


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pad every side by ``padding`` black pixels and cut out a window of the old size at (``top``, ``left``).

    Args:
        images: (N, H, W, C) uint8.
        top, left: (N,) int64 from 0 to ``2 * padding``, in the padded image.
    """
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # a view: every window
    return windows[torch.arange(count, device=images.device), top, left]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left to right where ``chosen``, (N,) bool. ``images``: (N, H, W, C) uint8."""
    count = images.shape[0]
    both = torch.cat((images, images.flip(2)))  # copying whole images is several times as fast as torch.where on a CPU
    return both.index_select(0, torch.arange(count, device=images.device) + count * chosen)


def cutout(images: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """Fill squares of ``size`` x ``size`` pixels whose centres lie in the image, clipped at its border.

    Args:
        images: (N, H, W, C) uint8.
        top, left: (N, holes) int64, the first row and column of each square: its centre's, less ``size // 2``.
        fill: (C,) uint8.
    """
    count, height, width, _ = images.shape
    span = torch.arange(size, device=images.device)
    # A coordinate beyond the border becomes the border's, which the square covers because its centre is in the image.
    rows = (top.unsqueeze(-1) + span).clamp(0, height - 1)
    columns = (left.unsqueeze(-1) + span).clamp(0, width - 1)
    each = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    out = images.clone()
    out[each, rows.unsqueeze(3), columns.unsqueeze(2)] = (
        fill  # (N, holes, size, size) pixels; some twice, with the same colour
    )
    return out


class DeviceAugment:
    """The augmentations of a recipe, in its order. ``augment(images, indices, epoch)`` leaves its input as it is.

    Args:
        size: (height, width) of the images.
        crop_padding: 0 for no crop.
        cutout_holes: 0 for no Cutout.
        fill: uint8 colour of the Cutout squares.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        crop_padding: int = 0,
        flip: bool = False,
        cutout_holes: int = 0,
        cutout_size: int = 8,
        fill: Sequence[int] = (0, 0, 0),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        height, width = size
        self.crop_padding, self.flip = crop_padding, flip
        self.cutout_holes, self.cutout_size = cutout_holes, cutout_size
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device)
        offsets = 2 * crop_padding + 1
        plan = [(CROP_STREAM, 0, offsets), (CROP_STREAM, 1, offsets), (FLIP_STREAM, 0, 2)]
        plan += [(CUTOUT_STREAM, 2 * hole, height) for hole in range(cutout_holes)]
        plan += [(CUTOUT_STREAM, 2 * hole + 1, width) for hole in range(cutout_holes)]
        # In one go, with the columns of crop and flip even where only one is used: launches cost time, numbers do not.
        self.draws = Draws(plan, seed, device) if crop_padding or flip or cutout_holes else None

    def __call__(self, images: Tensor, indices: Tensor, epoch: Tensor) -> Tensor:
        """``images``: (N, H, W, 3) uint8; ``indices``: (N,) int64, places in the data set; ``epoch``: () int64."""
        if self.draws is None:
            return images
        draws = self.draws(indices, epoch)
        if self.crop_padding:
            images = crop(images, draws[:, 0], draws[:, 1], self.crop_padding)
        if self.flip:
            images = flip(images, draws[:, 2] == 1)
        if self.cutout_holes:
            top, left = (draws[:, 3:] - self.cutout_size // 2).tensor_split(2, dim=1)
            images = cutout(images, top, left, self.cutout_size, self.fill)
        return images
