"""Augmentation of a whole batch of uint8 images: gather, crop, flip, policy, Cutout, normalise, in one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .augment_eager import augment_eager
from .augment_tables import FLIPS, PolicyTables, check_colour, check_crop_padding
from .dispatch import check_memory, choose

TRITON_PIXELS = 4096  # the largest image that one program of the Triton kernel holds


def augment_batch(
    images: Tensor,
    indices: Tensor,
    epoch: Tensor,
    seed: int,
    *,
    crop_padding: int = 0,
    crop_reflect: bool = False,
    flip: str = "none",
    policy: PolicyTables | None = None,
    chains: int = 0,
    bilinear: bool = False,
    policy_fill: Sequence[int] = (0, 0, 0),
    cutout_holes: int = 0,
    cutout_size: int = 8,
    cutout_fill: Sequence[int] = (0, 0, 0),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Gather images of a data set and augment each, by Philox numbers from (seed, epoch, its place in the set) alone.

    The order is crop, flip, policy, Cutout. Pixels are Pillow's, byte for byte, on every device.

    Args:
        images: (M, H, W, 3) uint8, the data set.
        indices: (N,) int64, places in it.
        epoch: () int64.
        seed: from 0 to 2**63 - 1.
        crop_padding: each side is padded by so many pixels, black or (``crop_reflect``) mirrored; 0: no crop.
        flip: ``"none"``, ``"random"``, or ``"alternating"``: each image in every other epoch.
        policy: with ``chains``, ``bilinear`` and ``policy_fill`` (uint8 colour) as its program says.
        cutout_holes: squares of ``cutout_size`` pixels filled with the uint8 colour ``cutout_fill``; 0: no Cutout.
        scale, shift: (3,) float32, ``pixel * scale + shift``; ``None`` leaves uint8.
        dtype: of what is normalised.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``. The Triton kernel takes images of up to 4,096 pixels and no
            chains (AugMix): with those ``"auto"`` runs eager on every device.

    Returns:
        (N, H, W, 3) uint8; with ``scale``, (N, 3, H, W) of ``dtype`` in channels_last memory format. New tensors.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names the argument.
        RuntimeError: ``impl="triton"`` where it cannot run.
    """
    _check(images, indices, epoch, seed, flip, cutout_holes, cutout_size, scale, shift)
    check_crop_padding("crop_padding", crop_padding, images.shape[1:3], reflect=crop_reflect)
    check_colour("policy_fill", policy_fill)
    check_colour("cutout_fill", cutout_fill)
    if policy is None:
        chains = 0
    mode = FLIPS.index(flip)
    numbers = crop_padding, crop_reflect, mode, chains, bilinear, list(policy_fill)
    cutout = cutout_holes, cutout_size, list(cutout_fill)
    unfit = _unfit(images, chains)
    if unfit and impl == "triton":
        raise RuntimeError(f"impl: 'triton' cannot run augment_batch here, because {unfit}; use 'auto' or 'eager'")
    if (not unfit or impl not in ("auto", "eager")) and choose("augment_batch", impl, images) == "triton":
        tables = list(policy) if policy is not None else []
        return torch.ops.rsengine.augment_batch(
            images, indices, epoch, seed, *numbers, *cutout, tables, scale, shift, dtype
        )
    return augment_eager(images, indices, epoch, seed, *numbers, *cutout, policy, scale, shift, dtype)


def _unfit(images: Tensor, chains: int) -> str:
    """Why the Triton kernel cannot take this, or nothing."""
    if chains:
        return "the kernel mixes no chains (AugMix)"
    if images.shape[1] * images.shape[2] > TRITON_PIXELS:
        return f"images of {images.shape[1]}x{images.shape[2]} have more than {TRITON_PIXELS} pixels"
    return ""


def _check(images, indices, epoch, seed, flip, holes, size, scale, shift) -> None:
    if images.dim() != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(f"images: expected contiguous uint8 (M, H, W, 3); got {images.dtype} {tuple(images.shape)}")
    for name, tensor, dims in (("indices", indices, 1), ("epoch", epoch, 0)):
        if tensor.dim() != dims or tensor.dtype != torch.int64 or tensor.device != images.device:
            raise ValueError(
                f"{name}: expected int64 of {dims} dimensions on {images.device}; "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    check_memory(images=images, indices=indices, epoch=epoch, scale=scale, shift=shift)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1; got {seed}")
    if flip not in FLIPS:
        raise ValueError(f"flip: expected one of {', '.join(FLIPS)}; got {flip!r}")
    if holes < 0 or size < 1:
        raise ValueError(f"cutout_holes, cutout_size: expected >= 0 and >= 1; got {holes}, {size}")
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: expected both or none")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and (tensor.shape != (3,) or tensor.dtype != torch.float32):
            raise ValueError(f"{name}: expected float32 (3,); got {tensor.dtype} {tuple(tensor.shape)}")


@torch.library.custom_op("rsengine::augment_batch", mutates_args=())
def _augment(
    images: Tensor,
    indices: Tensor,
    epoch: Tensor,
    seed: int,
    crop_padding: int,
    crop_reflect: bool,
    flip: int,
    chains: int,
    bilinear: bool,
    policy_fill: list[int],
    cutout_holes: int,
    cutout_size: int,
    cutout_fill: list[int],
    policy: list[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The Triton kernel."""
    from .jit import augment

    tables = PolicyTables(*policy) if policy else None
    numbers = crop_padding, crop_reflect, flip, bilinear, policy_fill, cutout_holes, cutout_size, cutout_fill
    return augment.augment(images, indices, epoch, seed, *numbers, tables, scale, shift, dtype)


@_augment.register_fake
def _(images, indices, *options):
    scale, _, dtype = options[-3:]
    batch = images.new_empty(indices.shape[0], *images.shape[1:])
    return batch if scale is None else batch.to(dtype).permute(0, 3, 1, 2)
