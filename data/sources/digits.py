"""scikit-learn's handwritten digits: 1,797 real scans of 8×8 pixels, available without a network."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from rsengine.data.errors import DataError
from rsengine.data.sources.base import Source, split_by_hash
from rsengine.data.sources.images import ArraySplit

SIDE = 32
WHITE = 16  # the digits have 17 grey levels


def open_digits(*, test_fraction: float, seed: int) -> Source:
    """The digits as 32×32 RGB pictures (bilinear), a share of every class set aside for testing.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; run: pip install scikit-learn") from error
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / WHITE)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    large = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for each in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    chosen = split_by_hash(labels, [str(i) for i in range(len(labels))], test_fraction, seed, "digits")
    return Source(
        name="digits",
        form="scikit-learn's handwritten digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=ArraySplit(images[~chosen], labels[~chosen], "digits train"),
        test=ArraySplit(images[chosen], labels[chosen], "digits test"),
        own_test=False,
        checksum=hashlib.sha256(grey.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
    )
