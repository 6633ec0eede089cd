"""Launcher, block size and compile cases of the batch augmentation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import triton
from torch import Tensor

from .augment_kernels import _augment_kernel
from .case import Budget, CompileCase, Stream
from .guard import on_operands_device

WARP_PIXELS = 256  # eight pixels a thread, each in three registers


@on_operands_device
def augment(
    images, indices, epoch, seed, crop_padding, crop_reflect, flip, bilinear, policy_fill,
    cutout_holes, cutout_size, cutout_fill, policy, scale, shift, dtype,
) -> Tensor:  # fmt: skip
    """:func:`rsengine.kernels.augment_batch` in one launch, without chains; ``flip`` is 0, 1 or 2 as in ``FLIPS``."""
    count, (_, height, width, _) = len(indices), images.shape
    out = images.new_empty((count, height, width, 3), dtype=images.dtype if scale is None else dtype)
    if count:
        block = triton.next_power_of_2(height * width)
        tables = [None] * 9 if policy is None else policy[:9]
        groups, slots, choices = (0, 0, 0) if policy is None else policy.first.shape
        _augment_kernel[(count,)](
            images,
            indices.contiguous(),
            epoch,
            out,
            *tables,
            scale,
            shift,
            seed,
            _packed(policy_fill),
            _packed(cutout_fill),
            HEIGHT=height,
            WIDTH=width,
            BLOCK=block,
            PADDING=crop_padding,
            IS_REFLECTED=crop_reflect,
            FLIP=flip,
            GROUPS=groups,
            SLOTS=slots,
            CHOICES=choices,
            IS_BILINEAR=bilinear,
            HOLES=cutout_holes,
            HOLE_SIZE=cutout_size,
            IS_NORMALISED=scale is not None,
            num_warps=min(max(block // WARP_PIXELS, 1), 8),
            enable_fp_fusion=False,  # Pillow rounds products and sums by themselves
        )
    return out if scale is None else out.permute(0, 3, 1, 2)


def _packed(colour) -> int:
    red, green, blue = colour
    return red | green << 8 | blue << 16


def compile_cases() -> list[CompileCase]:
    """CIFAR's size, with what recipes ask for: no policy, AutoAugment's shape of tables, RandAugment's, bilinear."""
    plain = {"crop_padding": 4, "flip": 1}
    whole = {**plain, "slots": (25, 2, 1), "holes": 4}
    return [
        _case("gather, uint8", torch.uint8),
        _case("gather, bfloat16", torch.bfloat16),
        _case("crop, flip, Cutout, bfloat16", torch.bfloat16, **plain, holes=4),
        _case("crop, flip, AutoAugment, Cutout, bfloat16", torch.bfloat16, **whole),
        _case("crop, flip, AutoAugment, Cutout, float32", torch.float32, **whole),
        _case("crop, flip, RandAugment, uint8", torch.uint8, **plain, slots=(1, 2, 14)),
        _case(
            "crop, flip, TrivialAugment bilinear, bfloat16", torch.bfloat16, **plain, slots=(1, 1, 14), bilinear=True
        ),
    ]


def _case(name, dtype, *, crop_padding=0, flip=0, slots=None, bilinear=False, holes=0) -> CompileCase:
    def launch(n: int) -> dict[str, Stream]:
        images = torch.empty((n, 32, 32, 3), dtype=torch.uint8)
        indices, epoch = torch.arange(n), torch.zeros((), dtype=torch.int64)
        normalise = None if dtype == torch.uint8 else torch.zeros(3)
        policy = None if slots is None else _identity_tables(*slots)
        out = augment(
            images, indices, epoch, 0, crop_padding, False, flip, bilinear, (0, 0, 0), holes, 4, (125, 123, 114),
            policy, normalise, normalise, dtype,
        )  # fmt: skip
        streams = {"images out": Stream([out], 0, 1)}
        # A crop reads less of an image the further it reaches over the border: how much is not fixed.
        return streams if crop_padding else {"images in": Stream([images], 1, 0), **streams}

    def eager(kernels: ModuleType, n: int) -> Callable[[], object]:
        images = torch.zeros((n, 32, 32, 3), dtype=torch.uint8)
        indices, epoch = torch.arange(n), torch.zeros((), dtype=torch.int64)
        normalise = None if dtype == torch.uint8 else torch.zeros(3)
        policy = None if slots is None else _identity_tables(*slots)
        options = {"crop_padding": crop_padding, "flip": "random" if flip else "none", "bilinear": bilinear}
        options |= {"cutout_holes": holes, "cutout_size": 4, "scale": normalise, "shift": normalise, "dtype": dtype}
        return lambda: kernels.augment_batch(images, indices, epoch, 0, policy=policy, **options, impl="eager")

    # Bytes are gathered one at a time: three channels side by side, at the places that crop and flip give.
    store = torch.empty((), dtype=dtype).element_size()
    registers = 64 if slots is None else 168 if bilinear else 128  # bilinear: float64 coordinates and weights
    budget = Budget(registers=registers, shared=8 << 10, vector_bytes=1, store_bytes=store)
    return CompileCase(f"augment, {name}, (N, 32, 32, 3)", launch, 256, 3, {"_augment_kernel": budget}, eager)


def _identity_tables(groups: int, slots: int, choices: int):
    """Tables of the right shapes whose one setting, with either sign, does nothing."""
    from ..augment_tables import PolicyTables

    shape = groups, slots, choices
    return PolicyTables(
        kinds=torch.zeros(2, dtype=torch.int32),
        factors=torch.zeros(2),
        lookups=torch.zeros(2, dtype=torch.int32),
        tables=torch.zeros((1, 256), dtype=torch.uint8),
        fixed=torch.zeros((2, 6), dtype=torch.int32),
        matrices=torch.zeros((2, 6), dtype=torch.float64),
        first=torch.zeros(shape, dtype=torch.int32),
        levels=torch.zeros(shape, dtype=torch.int32),
        gates=torch.zeros(shape, dtype=torch.int64),
        exponentials=torch.zeros(1, dtype=torch.int64),
    )
