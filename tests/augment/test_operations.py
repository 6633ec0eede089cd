"""The augmentations against plain numpy, and their random numbers against their definition."""

import numpy as np
import pytest

from rsengine.augment import (
    AlternatingFlip,
    AugMix,
    AutoAugment,
    Cutout,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    TrivialAugmentWide,
)
from rsengine.augment.from_recipe import training_augmentations
from rsengine.augment.generator import below, philox
from rsengine.config import AugmentSection

RNG = np.random.default_rng(0)
INDICES = np.arange(500)


def images(n=500, height=9, width=7):
    return RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("seed", "words", "expected"),
    [  # kat_vectors of Random123, the generator's authors' library
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_generator_is_philox(seed, words, expected):
    assert philox(np.uint64(seed), *words) == expected


def test_draws_are_uniform_and_differ_with_every_part_of_the_key():
    words = np.array([philox(0, index, 0, 1, 0) for index in range(20_000)])
    for column in words.T:
        counts = np.bincount([below(word, 9) for word in column], minlength=9)
        assert len(counts) == 9
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001
    parts = [(1, 2, 3, 4, 5), (2, 2, 3, 4, 5), (1, 3, 3, 4, 5), (1, 2, 4, 4, 5), (1, 2, 3, 5, 5), (1, 2, 3, 4, 6)]
    assert len({philox(*part)[0] for part in [*parts, (1 + 2**32, 2, 3, 4, 5)]}) == 7


@pytest.mark.parametrize(("mode", "numpys"), [("zero", "constant"), ("reflect", "reflect")])
def test_crop_equals_padding_and_slicing(mode, numpys):
    operation, x = RandomCrop(padding=2, mode=mode, seed=3), images()
    out = operation.apply(x.copy(), INDICES, 5)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=numpys)
    offsets = set()
    for i in range(len(x)):
        windows = {(top, left): padded[i, top : top + 9, left : left + 7] for top in range(5) for left in range(5)}
        found = [offset for offset, window in windows.items() if (window == out[i]).all()]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 25  # every offset occurs


def test_flip_mirrors_about_half_of_the_images():
    x = images()
    out = HorizontalFlip(seed=1).apply(x.copy(), INDICES)
    mirrored = (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (out == x).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all() and 200 < mirrored.sum() < 300


def test_alternating_flip_mirrors_each_image_in_every_other_epoch():
    operation, x = AlternatingFlip(seed=1), images()
    mirrored = []
    for epoch in range(4):
        out = operation.apply(x.copy(), INDICES, epoch)
        mirrored.append((out == x[:, :, ::-1]).all(axis=(1, 2, 3)))
        assert (mirrored[-1] | (out == x).all(axis=(1, 2, 3))).all()
    assert 200 < mirrored[0].sum() < 300
    assert (mirrored[1] == ~mirrored[0]).all() and (mirrored[2] == mirrored[0]).all()
    assert (mirrored[3] == mirrored[1]).all()


@pytest.mark.parametrize(("holes", "size"), [(1, 3), (4, 4), (1, 5), (2, 30)])
def test_cutout_blanks_clipped_squares_with_the_fill(holes, size):
    x, fill = np.full((500, 9, 7, 3), 200, np.uint8), (1, 2, 3)
    out = Cutout(holes, size, fill, seed=2).apply(x.copy(), INDICES)
    blank = (out == np.array(fill)).all(axis=-1)
    assert ((out == 200).all(axis=-1) | blank).all()
    areas = blank.sum(axis=(1, 2))
    assert areas.min() >= min(((size + 1) // 2) ** 2, 63) * (size < 9) and areas.max() <= min(holes * size**2, 63)
    if holes == 1:
        for square in blank:
            rows, columns = np.flatnonzero(square.any(axis=1)), np.flatnonzero(square.any(axis=0))
            assert square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one rectangle
        assert len(np.unique(areas)) > 1 or size == 30  # some are clipped at the border


OPERATIONS = [
    RandomCrop(2, seed=7),
    RandomCrop(2, mode="reflect", seed=7),
    HorizontalFlip(seed=7),
    AlternatingFlip(seed=7),
    Cutout(2, 3, seed=7),
    AutoAugment(seed=7),
    AutoAugment("imagenet", interpolation="bilinear", seed=7),
    AutoAugment("svhn", fill=(9, 8, 7), seed=7),
    RandAugment(seed=7),
    RandAugment(3, 5, magnitude_std=0.5, increasing=True, seed=7),
    TrivialAugmentWide(seed=7),
    AugMix(seed=7),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: type(operation).__name__)
def test_an_image_is_augmented_the_same_in_any_batch_and_differently_in_each_epoch_and_seed(operation):
    x = images()
    whole = operation.apply(x.copy(), INDICES)
    chosen = np.array([400, 3, 77])
    assert (operation.apply(x[chosen].copy(), chosen) == whole[chosen]).all()
    assert (operation.apply(x.copy(), INDICES, 1) != whole).any()
    operation.seed = 8
    assert (operation.apply(x.copy(), INDICES) != whole).any()
    operation.seed = 7
    assert (operation.apply(x.copy(), INDICES) == whole).all()


def test_no_images_are_augmented_to_no_images():
    for operation in OPERATIONS:
        assert operation.apply(images(0), INDICES[:0]).shape == (0, 9, 7, 3)


def test_one_operation_serves_images_of_several_sizes():
    """As one pipeline may in turn: the tables hang on the size."""
    operation = AutoAugment(seed=7)
    small, large = images(height=9), images(height=30)
    expected = operation.apply(small.copy(), INDICES)
    operation.apply(large.copy(), INDICES)
    assert (operation.apply(small.copy(), INDICES) == expected).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RandomCrop(-1), "padding >= 0; got -1"),
        (lambda: RandomCrop(4, mode="edge"), "zero or reflect; got 'edge'"),
        (
            lambda: RandomCrop(7, mode="reflect").apply(images(), INDICES),
            "padding: expected 0 to 6 to",
        ),
        (lambda: Cutout(0), "holes >= 1"),
        (lambda: Cutout(fill=(0, 0, 300)), "three numbers from 0 to 255"),
        (lambda: AutoAugment("mnist"), "cifar10, imagenet, svhn; got 'mnist'"),
        (lambda: AutoAugment(interpolation="cubic"), "nearest or bilinear; got 'cubic'"),
        (lambda: RandAugment(magnitude=40), "magnitude from 0 to 30"),
        (lambda: AugMix(severity=0), "severity from 1 to 10"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_recipe_gives_its_operations_in_order():
    section = AugmentSection(policy="autoaugment", policy_fill="mean", cutout_holes=4, cutout_fill="zero")
    crop, flip, policy, cutout = training_augmentations(section, (0.5, 0.25, 1.0), 5)
    assert (crop.padding, crop.mode, type(flip), cutout.holes, crop.seed) == (4, "zero", HorizontalFlip, 4, 5)
    assert policy.fill.tolist() == [128, 64, 255] and cutout.fill.tolist() == [0, 0, 0]
    x = images(height=32, width=32)
    alone = AutoAugment(fill=(128, 64, 255), seed=5)
    assert (policy.apply(x.copy(), INDICES) == alone.apply(x.copy(), INDICES)).all()
    section = AugmentSection(crop_padding=0, alternating_flip=True)
    assert [type(operation) for operation in training_augmentations(section, (0, 0, 0), 0)] == [AlternatingFlip]
