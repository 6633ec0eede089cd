"""The device augmentations give the bytes of the FFCV operations, whose own tests say what is right."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from rsengine.augment import Cutout, DeviceAugment, HorizontalFlip, RandomCrop
from rsengine.augment import device as on_device
from rsengine.augment.generator import draw, key, mix

INDICES = np.array([0, 1, 5, 49_999, 2**31, 2**40 + 3, *range(100, 350)])
FILL = (125, 0, 255)  # three different ones, at both ends of the range
# Odd and unequal sides; one pixel; one row; sides above the Cutout, and below it.
SIZES = [(32, 32), (9, 7), (1, 1), (1, 8), (33, 5)]


def pictures(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (len(INDICES), *size, 3), dtype=np.uint8)


def augmented(images, epoch, **options):
    augment = DeviceAugment(images.shape[1:3], **options)
    before = images.copy()
    out = augment(torch.from_numpy(images), torch.from_numpy(INDICES), torch.tensor(epoch))
    assert (images == before).all(), "the data set itself must stay as it is"
    assert out.dtype == torch.uint8 and out.is_contiguous()
    return out.numpy()


def applied(operation, images, epoch):
    operation.epoch = epoch
    return operation.apply(images.copy(), None, INDICES)


def test_mix_equals_the_generators_on_words_with_every_bit_pattern():
    words = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    words[:6] = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    expected = np.array([mix(word) for word in words])
    assert (on_device.mix(torch.from_numpy(words.view(np.int64))).numpy().view(np.uint64) == expected).all()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("epoch", [0, 7, 100_000])
def test_draws_equal_the_generators(seed, epoch):
    plan = [(1, 0, 9), (1, 1, 9), (2, 0, 2), (3, 0, 32), (3, 7, 1), (77, 1000, 2**31)]
    draws = on_device.Draws(plan, seed)(torch.from_numpy(INDICES), torch.tensor(epoch))
    for j, (stream, counter, bound) in enumerate(plan):
        expected = [draw(np.uint64(key(seed, epoch, index, stream)), counter, bound) for index in INDICES]
        assert draws[:, j].tolist() == expected


def test_streams_are_those_of_the_operations():
    assert RandomCrop.stream == on_device.CROP_STREAM
    assert HorizontalFlip.stream == on_device.FLIP_STREAM
    assert Cutout.stream == on_device.CUTOUT_STREAM


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", [1, 4])
def test_crop(size, padding):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(RandomCrop(padding, seed=5), images, epoch)
        assert (augmented(images, epoch, crop_padding=padding, seed=5) == expected).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flip(size):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(HorizontalFlip(seed=5), images, epoch)
        assert (augmented(images, epoch, flip=True, seed=5) == expected).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
# Even and odd squares (their centres differ), several that overlap, one larger than most images.
@pytest.mark.parametrize(("holes", "side"), [(1, 8), (1, 1), (4, 3), (3, 16), (1, 41)])
def test_cutout(size, holes, side):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(Cutout(holes, side, FILL, seed=5), images, epoch)
        out = augmented(images, epoch, cutout_holes=holes, cutout_size=side, fill=FILL, seed=5)
        assert (out == expected).all()


def test_holes_reach_over_every_border():
    """Otherwise the test above would not show that they are clipped as FFCV's are."""
    blank = augmented(np.full((len(INDICES), 9, 7, 3), 77, np.uint8), 0, cutout_holes=1, cutout_size=5)[..., 0] == 0
    clipped = blank.sum(axis=(1, 2)) < 25
    edges = [blank[clipped][:, 0], blank[clipped][:, -1], blank[clipped][:, :, 0], blank[clipped][:, :, -1]]
    assert all(edge.any(axis=1).sum() > 10 for edge in edges)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_three_in_order(size):
    images = pictures(size)
    expected = images
    for operation in (RandomCrop(4, seed=9), HorizontalFlip(seed=9), Cutout(2, 5, FILL, seed=9)):
        expected = applied(operation, expected, 11)
    options = {"crop_padding": 4, "flip": True, "cutout_holes": 2, "cutout_size": 5, "fill": FILL, "seed": 9}
    assert (augmented(images, 11, **options) == expected).all()


def test_without_any_of_them_images_stay_as_they_are():
    images = pictures((9, 7))
    assert (augmented(images, 0) == images).all()


def test_importing_them_needs_neither_ffcv_nor_numba():
    code = (
        "import sys, rsengine.resident; from rsengine.augment import DeviceAugment; "
        "heavy = {'ffcv', 'numba', 'cv2', 'rsengine.augment.operations'} & set(sys.modules); assert not heavy, heavy; "
        "from rsengine.augment import Cutout; assert 'ffcv' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
