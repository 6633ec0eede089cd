"""The augmentations against plain numpy, and their random numbers against their definition."""

import numpy as np
import pytest

from rsengine.augment import Cutout, HorizontalFlip, RandomCrop
from rsengine.augment.generator import draw, key

RNG = np.random.default_rng(0)
INDICES = np.arange(500)


def images(n=500, height=9, width=7):
    return RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_generator_is_splitmix64():
    """The first outputs of splitmix64 from state 0, published with its reference implementation, top 32 bits."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [draw(np.uint64(0), i, 2**32) for i in range(3)] == [value >> 32 for value in expected]


def test_draws_are_uniform_and_differ_with_every_part_of_the_key():
    keys = [key(0, 0, index, 1) for index in range(20_000)]
    counts = np.bincount([draw(np.uint64(k), 0, 9) for k in keys], minlength=9)
    assert len(counts) == 9
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001
    base = key(1, 2, 3, 4)
    assert len({int(k) for k in (base, key(2, 2, 3, 4), key(1, 3, 3, 4), key(1, 2, 4, 4), key(1, 2, 3, 5))}) == 5


def test_crop_equals_padding_and_slicing():
    operation, x = RandomCrop(padding=2, seed=3), images()
    operation.epoch = 5
    out = operation.apply(x, None, INDICES)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = set()
    for i in range(len(x)):
        windows = {(top, left): padded[i, top : top + 9, left : left + 7] for top in range(5) for left in range(5)}
        found = [offset for offset, window in windows.items() if (window == out[i]).all()]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 25  # every offset occurs


def test_flip_mirrors_about_half_of_the_images():
    x = images()
    out = HorizontalFlip(seed=1).apply(x.copy(), None, INDICES)
    mirrored = (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (out == x).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all() and 200 < mirrored.sum() < 300


@pytest.mark.parametrize(("holes", "size"), [(1, 3), (4, 4), (1, 5), (2, 30)])
def test_cutout_blanks_clipped_squares_with_the_fill(holes, size):
    x, fill = np.full((500, 9, 7, 3), 200, np.uint8), (1, 2, 3)
    out = Cutout(holes, size, fill, seed=2).apply(x.copy(), None, INDICES)
    blank = (out == np.array(fill)).all(axis=-1)
    assert ((out == 200).all(axis=-1) | blank).all()
    areas = blank.sum(axis=(1, 2))
    assert areas.min() >= min(((size + 1) // 2) ** 2, 63) * (size < 9) and areas.max() <= min(holes * size**2, 63)
    if holes == 1:
        for square in blank:
            rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
            assert square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one rectangle
        assert len(np.unique(areas)) > 1 or size == 30  # some are clipped at the border


@pytest.mark.parametrize("operation", [RandomCrop(2, seed=7), HorizontalFlip(seed=7), Cutout(2, 3, seed=7)], ids=str)
def test_an_image_is_augmented_the_same_in_any_batch_and_differently_in_each_epoch_and_seed(operation):
    x = images()
    whole = operation.apply(x.copy(), None, INDICES)
    chosen = np.array([400, 3, 77])
    assert (operation.apply(x[chosen].copy(), None, chosen) == whole[chosen]).all()
    operation.epoch = 1
    assert (operation.apply(x.copy(), None, INDICES) != whole).any()
    operation.epoch, operation.seed = 0, 8
    assert (operation.apply(x.copy(), None, INDICES) != whole).any()
