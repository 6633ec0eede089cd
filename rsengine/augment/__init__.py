"""Augmentations of uint8 images, as operations on numpy arrays and as device functions that give the same bytes.

:func:`for_ffcv` makes FFCV's operations of them, which go after the decoder and before ``ToTensor`` in any
``ffcv.loader.Loader``, for RGB images of one size::

    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from rsengine.augment import AutoAugment, Cutout, HorizontalFlip, RandomCrop, for_ffcv

    augmentations = [RandomCrop(4), HorizontalFlip(), AutoAugment("cifar10"), Cutout(holes=4, size=4)]
    loader = Loader(
        "train.beton",
        batch_size=128,
        num_workers=2,
        order=OrderOption.RANDOM,
        pipelines={
            "image": [SimpleRGBImageDecoder(), *for_ffcv(augmentations), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    for epoch in range(10):
        for images, labels in loader:
            ...

Each pass of a loader augments an image differently, depending on the number of the pass. To resume a run at epoch 7,
set ``loader.next_epoch = 7``, which also determines FFCV's order of the images. Setting ``operation.epoch = 7`` of one
of FFCV's operations gives the next pass that number for this operation alone.

:class:`DeviceAugment` works on tensors on any device. Both draw from a counter-based generator keyed by (seed, epoch,
index of the image), so an image's augmentation does not depend on its batch, worker or position, and a run can be
stopped and resumed anywhere.

The operations are imported on first use: numba takes a second to import, and the device functions do not need it.
FFCV is imported by :func:`for_ffcv` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsengine.augment.device import DeviceAugment

if TYPE_CHECKING:
    from rsengine.augment.ffcv_operations import for_ffcv
    from rsengine.augment.operations import (
        AlternatingFlip,
        AugMix,
        AutoAugment,
        Cutout,
        HorizontalFlip,
        PolicyOperation,
        RandAugment,
        RandomCrop,
        SeededOperation,
        TrivialAugmentWide,
    )

__all__ = [
    "AlternatingFlip",
    "AugMix",
    "AutoAugment",
    "Cutout",
    "DeviceAugment",
    "HorizontalFlip",
    "PolicyOperation",
    "RandAugment",
    "RandomCrop",
    "SeededOperation",
    "TrivialAugmentWide",
    "for_ffcv",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsengine.cache import keep_compiled_code

    keep_compiled_code()  # before the first import of numba
    if name == "for_ffcv":
        from rsengine.augment import ffcv_operations as module
    else:
        from rsengine.augment import operations as module

    return getattr(module, name)
