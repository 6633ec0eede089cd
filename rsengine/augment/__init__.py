"""Augmentations of uint8 images, as FFCV operations and as device functions that give the same bytes.

The FFCV operations go after the decoder and before ``ToTensor``, in any ``ffcv.loader.Loader``, for RGB images of one
size::

    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from rsengine.augment import AutoAugment, Cutout, HorizontalFlip, RandomCrop

    augmentations = [RandomCrop(4), HorizontalFlip(), AutoAugment("cifar10"), Cutout(holes=4, size=4)]
    loader = Loader(
        "train.beton",
        batch_size=128,
        num_workers=2,
        order=OrderOption.RANDOM,
        pipelines={
            "image": [SimpleRGBImageDecoder(), *augmentations, ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    for epoch in range(10):
        for images, labels in loader:
            ...

Each pass of a loader augments an image differently, depending on the number of the pass. To resume a run at epoch 7,
set ``loader.next_epoch = 7``, which also determines FFCV's order of the images. Setting ``operation.epoch = 7``
gives the next pass that number for this operation alone.

:class:`DeviceAugment` works on tensors on any device. Both draw from a counter-based generator keyed by (seed, epoch,
index of the image), so an image's augmentation does not depend on its batch, worker or position, and a run can be
stopped and resumed anywhere.

The operations are imported on first use: FFCV takes seconds to import, and the device functions do not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsengine.augment.device import DeviceAugment

if TYPE_CHECKING:
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
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsengine.cache import keep_compiled_code

    keep_compiled_code()  # before the first import of numba
    from rsengine.augment import operations

    return getattr(operations, name)
