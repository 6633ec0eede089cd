"""Augmentations of uint8 images as FFCV operations. Put them after the decoder and before ``ToTensor``.

Each draws from a counter-based generator keyed by (seed, epoch, index of the image), so that an image's augmentation
does not depend on the batch, the worker or the order it comes in, and a run can be stopped and resumed anywhere.
"""

from rsengine.augment.operations import Cutout, HorizontalFlip, RandomCrop, SeededOperation

__all__ = ["Cutout", "HorizontalFlip", "RandomCrop", "SeededOperation"]
