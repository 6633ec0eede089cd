"""Augmentations of uint8 images, as FFCV operations and as device functions that give the same bytes.

The FFCV operations go after the decoder and before ``ToTensor``. :class:`DeviceAugment` works on a batch of tensors.

Each draws from a counter-based generator keyed by (seed, epoch, index of the image), so that an image's augmentation
does not depend on the batch, the worker or the order it comes in, and a run can be stopped and resumed anywhere.

The operations are imported when first asked for: FFCV takes seconds to import, and the device functions do not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsengine.augment.device import DeviceAugment

if TYPE_CHECKING:
    from rsengine.augment.operations import Cutout, HorizontalFlip, RandomCrop, SeededOperation

__all__ = ["Cutout", "DeviceAugment", "HorizontalFlip", "RandomCrop", "SeededOperation"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsengine.augment import operations

    return getattr(operations, name)
