"""Augmentation of a batch in PyTorch operations: the CPU's path, and any GPU's where the Triton kernel does not fit.

Nothing here reads a tensor on the host, except on the CPU, where nothing is captured and an operation then runs on the
images that need it alone. Integers wherever Pillow has integers; the floating-point steps are products and sums of
their own, each rounded, as Pillow's are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment_tables import (
    AFFINE,
    AUTOCONTRAST,
    COLOR,
    CONTRAST,
    CROP_STREAM,
    EQUALIZE,
    IDENTITY,
    LOOKUP,
    SHARPNESS,
)
from .dispatch import may_read

_LOW = 2**32 - 1
_ONE = 65536  # the sum of AugMix's weights


def augment_eager(
    images, indices, epoch, seed, crop_padding, crop_reflect, flip, chains, bilinear, policy_fill,
    cutout_holes, cutout_size, cutout_fill, policy, scale, shift, dtype,
) -> Tensor:  # fmt: skip
    """See :func:`rsengine.kernels.augment_batch`; ``flip`` is a place in :data:`FLIPS`."""
    _, height, width, _ = images.shape
    batch = images.index_select(0, indices)
    cutout_blocks = (cutout_holes + 1) // 2
    slots = policy.first.shape[1] if policy is not None else 0
    words = _words(indices, epoch, seed, flip == 2, cutout_blocks, 1 + slots + chains if slots else 0)
    if crop_padding:
        offsets = below(words[:, 0, :2], 2 * crop_padding + 1)
        batch = crop(batch, offsets[:, 0], offsets[:, 1], crop_padding, crop_reflect)
    if flip:
        chosen = below(words[:, 1, 0], 2)
        batch = mirror(batch, ((chosen + epoch) & 1 if flip == 2 else chosen) == 1)
    if policy is not None:
        options = policy, bilinear, _colour(policy_fill, batch)
        batch = run_policy(batch, words[:, 2 + cutout_blocks :], chains, *options)
    if cutout_holes:
        draws = words[:, 2 : 2 + cutout_blocks].reshape(len(indices), 2 * cutout_blocks, 2)[:, :cutout_holes]
        top, left = below(draws[..., 0], height), below(draws[..., 1], width)
        batch = cutout(batch, top - cutout_size // 2, left - cutout_size // 2, cutout_size, _colour(cutout_fill, batch))
    if scale is None:
        return batch
    return (batch.float() * scale + shift).permute(0, 3, 1, 2).to(dtype)


# --- random numbers ---------------------------------------------------------------------------------------------------


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) of 32-bit counters in int64, broadcast: (..., 4) words below 2**32."""
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap around as uint64 would; the bits are the same
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def below(words: Tensor, bound: int | Tensor) -> Tensor:
    """Integers below ``bound``, at most 2**31, from 32-bit words."""
    return (words * bound) >> 32


def _words(indices: Tensor, epoch: Tensor, seed: int, alternating: bool, cutout: int, policy: int) -> Tensor:
    """(N, 2 + cutout + policy, 4): the blocks of crop, flip, Cutout and the policy, in this order."""
    block = torch.arange(2 + cutout + policy, device=indices.device)
    after_crop, after_flip, after_cutout = ((block >= start).long() for start in (1, 2, 2 + cutout))
    stream = CROP_STREAM + after_crop + after_flip + after_cutout
    number = block - after_crop - after_flip - after_cutout * cutout
    epochs = epoch.expand(block.shape) & _LOW
    if alternating:
        epochs = epochs * (block != 1)
    return philox((indices & _LOW).unsqueeze(1), epochs, stream, number, seed)


def _colour(fill: Sequence[int], like: Tensor) -> Tensor:
    return torch.stack([torch.full((), value, dtype=torch.uint8, device=like.device) for value in fill])


# --- crop, flip, Cutout -----------------------------------------------------------------------------------------------


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int, reflect: bool) -> Tensor:
    """Pad every side of (N, H, W, C) images and cut out a window of the old size at (``top``, ``left``), (N,) each."""
    count, height, width, _ = images.shape
    if reflect:
        rows, columns = (_mirrored(side, padding, images.device) for side in (height, width))
        padded = images.index_select(1, rows).index_select(2, columns)
    else:
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # a view: every window
    return windows[torch.arange(count, device=images.device), top, left]


def _mirrored(side: int, padding: int, device: torch.device) -> Tensor:
    places = torch.arange(-padding, side + padding, device=device).abs()
    return side - 1 - (side - 1 - places).abs()


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left to right where ``chosen``, (N,) bool."""
    count = images.shape[0]
    both = torch.cat((images, images.flip(2)))  # copying whole images is several times as fast as torch.where on a CPU
    return both.index_select(0, torch.arange(count, device=images.device) + count * chosen)


def cutout(images: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """Fill squares at (N, holes) first rows and columns, clipped; their centres lie in the image. In place."""
    count, height, width, _ = images.shape
    span = torch.arange(size, device=images.device)
    # A coordinate beyond the border becomes the border's, which the square covers because its centre is in the image.
    rows = (top.unsqueeze(-1) + span).clamp(0, height - 1)
    columns = (left.unsqueeze(-1) + span).clamp(0, width - 1)
    each = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    images[each, rows.unsqueeze(3), columns.unsqueeze(2)] = fill  # some pixels twice, with the same colour
    return images


# --- policies ---------------------------------------------------------------------------------------------------------


def run_policy(images, words, chains, policy, bilinear, fill) -> Tensor:
    """``words``: (N, 1 + slots + chains, 4), the policy's blocks."""
    groups, slots, _ = policy.first.shape
    group = below(words[:, 0, 0], groups)
    if not chains:
        for slot in range(slots):
            images = _run_slot(images, words[:, 1 + slot], group, slot, None, policy, bilinear, fill)
        return images
    depth = slots // chains
    share = below(words[:, 0, 1], _ONE + 1)
    drawn = policy.exponentials[below(words[:, 1 + slots :, 1], len(policy.exponentials))]
    weights = share.unsqueeze(1) * drawn // drawn.sum(1, keepdim=True)
    lengths = 1 + below(words[:, 1 + slots :, 0], depth)
    left, mixed = share, images * (_ONE - share).view(-1, 1, 1, 1)
    for chain in range(chains):
        changed = images
        for step in range(depth):
            slot = chain * depth + step
            within = lengths[:, chain] > step
            changed = _run_slot(changed, words[:, 1 + slot], group, slot, within, policy, bilinear, fill)
        weight = left if chain == chains - 1 else weights[:, chain]
        left = left - weight
        mixed = mixed + changed * weight.view(-1, 1, 1, 1)
    return (mixed >> 16).to(torch.uint8)


def _run_slot(images, words, group, slot, wanted, policy, bilinear, fill) -> Tensor:
    """One slot of the policy. ``words``: (N, 4); ``wanted``: (N,) bool, or None for every image."""
    choice = below(words[:, 0], policy.first.shape[2])
    applied = words[:, 1] < policy.gates[group, slot, choice]
    if wanted is not None:
        applied = applied & wanted
    level = below(words[:, 2], policy.levels[group, slot, choice])
    setting = policy.first[group, slot, choice] + 2 * level + below(words[:, 3], 2)
    kind = policy.kinds[setting] * applied
    if may_read(images):
        out = images.clone()
        for present in kind.unique().tolist():
            if present != IDENTITY:
                rows = (kind == present).nonzero().view(-1)
                changed = _KINDS[present](images.index_select(0, rows), setting[rows], policy, bilinear, fill)
                out.index_copy_(0, rows, changed)
        return out
    out = images
    for present, operation in _KINDS.items():
        chosen = (kind == present).view(-1, 1, 1, 1)
        out = torch.where(chosen, operation(images, setting, policy, bilinear, fill), out)
    return out


def _look_up(images, setting, policy, bilinear, fill) -> Tensor:
    tables = policy.tables[policy.lookups[setting]]
    return tables.gather(1, images.flatten(1).long()).view_as(images)


def _affine(images, setting, policy, bilinear, fill) -> Tensor:
    count, height, width, _ = images.shape
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device).unsqueeze(1)
    if bilinear:
        return _affine_bilinear(images, policy.matrices[setting], x, y, fill)
    a, b, c, d, e, f = policy.fixed[setting].long().view(count, 6, 1, 1).unbind(1)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside.unsqueeze(-1), _pixels(images, row, column), fill)


def _pixels(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(N, H, W, 3): the pixel at (N, H, W) places, moved into the image where they are outside."""
    _, height, width, channels = images.shape
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    place = place.flatten(1).unsqueeze(2).expand(-1, -1, channels)
    return images.flatten(1, 2).gather(1, place).view_as(images)


def _affine_bilinear(images, matrix, x, y, fill) -> Tensor:
    count, height, width, _ = images.shape
    a, b, c, d, e, f = matrix.view(count, 6, 1, 1).unbind(1)
    x, y = x.double() + 0.5, y.double() + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = u - 0.5, v - 0.5
    left, top = u.floor(), v.floor()
    du, dv = (u - left).unsqueeze(-1), (v - top).unsqueeze(-1)
    left, top = left.long(), top.long()

    def row(places: Tensor) -> Tensor:
        near, far = (_pixels(images, places, left + step).double() for step in (0, 1))
        return near + (far - near) * du

    upper = row(top)
    lower = torch.where((top + 1 < height).unsqueeze(-1), row(top + 1), upper)
    value = upper + (lower - upper) * dv
    return torch.where(inside.unsqueeze(-1), value.to(torch.uint8), fill)


def _blend(images: Tensor, degenerate: Tensor, setting: Tensor, policy) -> Tensor:
    """PIL's ``Image.blend`` in float32, cut and truncated. ``degenerate``: float32."""
    factor = policy.factors[setting].view(-1, 1, 1, 1)
    mixed = degenerate + factor * (images.float() - degenerate)
    return mixed.clamp(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """(N, H, W) int32."""
    red, green, blue = images.int().unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _color(images, setting, policy, bilinear, fill) -> Tensor:
    return _blend(images, _luma(images).unsqueeze(-1).float(), setting, policy)


def _contrast(images, setting, policy, bilinear, fill) -> Tensor:
    pixels = images.shape[1] * images.shape[2]
    mean = (2 * _luma(images).sum((1, 2), dtype=torch.int64) + pixels) // (2 * pixels)
    return _blend(images, mean.float().view(-1, 1, 1, 1), setting, policy)


def _sharpness(images, setting, policy, bilinear, fill) -> Tensor:
    _, height, width, _ = images.shape
    if min(height, width) < 3:
        return images
    x = images.int()
    total = 4 * x[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + x[:, row : height - 2 + row, column : width - 2 + column]
    out = images.clone()
    smooth = ((total + 6) // 13).float()
    out[:, 1:-1, 1:-1] = _blend(images[:, 1:-1, 1:-1], smooth, setting, policy)
    return out


def _by_channel(images: Tensor, tables: Tensor) -> Tensor:
    """``tables``: (N, 3, 256) uint8."""
    values = images.flatten(1, 2).transpose(1, 2).long()  # (N, 3, H * W)
    return tables.gather(2, values).transpose(1, 2).contiguous().view_as(images)  # else the batch would lie by channels


def _autocontrast(images, setting, policy, bilinear, fill) -> Tensor:
    low, high = (extreme.double().unsqueeze(-1) for extreme in (images.amin((1, 2)), images.amax((1, 2))))
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # a number over a tensor would be rounded twice
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = (values * scale + -low * scale).clamp(0, 255).to(torch.uint8)
    return _by_channel(images, torch.where(high > low, stretched, values.to(torch.uint8)))


def _equalize(images, setting, policy, bilinear, fill) -> Tensor:
    count, height, width, channels = images.shape
    values = images.flatten(1, 2).transpose(1, 2).long()
    counts = torch.zeros((count, channels, 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (height * width - last) // 255  # 0 too where all pixels are the same
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    same = torch.arange(256, device=images.device)
    return _by_channel(images, torch.where(step > 0, table, same).to(torch.uint8))


_KINDS = {
    LOOKUP: _look_up,
    AFFINE: _affine,
    COLOR: _color,
    CONTRAST: _contrast,
    SHARPNESS: _sharpness,
    AUTOCONTRAST: _autocontrast,
    EQUALIZE: _equalize,
}
