"""The device augmentations give the bytes of the operations, whose own tests say what is right."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from rsengine.augment import AlternatingFlip, Cutout, DeviceAugment, HorizontalFlip, RandomCrop, device, from_recipe
from rsengine.augment.fills import FILLS
from rsengine.augment.from_recipe import training_augmentations
from rsengine.augment.generator import philox
from rsengine.config import AugmentSection
from rsengine.kernels import augment_batch, augment_eager
from rsengine.kernels.dispatch import eager_only
from rsengine.model.preprocess import Preprocess

INDICES = np.array([0, 1, 5, 49_999, 2**31, 2**40 + 3, *range(100, 350)])
FILL = (125, 0, 255)  # three different ones, at both ends of the range
# Odd and unequal sides; one pixel; one row; sides above the Cutout, and below it.
SIZES = [(32, 32), (9, 7), (1, 1), (1, 8), (33, 5)]


def pictures(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (len(INDICES), *size, 3), dtype=np.uint8)


MEAN = (125 / 255, 0.0, 1.0)  # of which FILL is the colour
PLAIN = {"crop_padding": 0, "flip": False}


def section(**settings):
    return AugmentSection(**{**PLAIN, **settings})


def augmented(images, epoch, seed=5, **settings):
    """What the operator makes of ``images``, whose places in the data set are INDICES: most of them do not exist."""
    augment = DeviceAugment(section(**settings), images.shape[1:3], MEAN, seed=seed)
    before = images.copy()
    # The set has a row for each of INDICES only, so that the gather is done here and undone by giving the rows their
    # places: the numbers come from the places, the pixels from the rows.
    out = augment_rows(augment, torch.from_numpy(images), epoch)
    assert (images == before).all(), "the data set itself must stay as it is"
    assert out.dtype == torch.uint8 and out.is_contiguous()
    return out.numpy()


class Rows(torch.Tensor):
    """Images whose ``index_select`` gives all of them, whatever the places: a data set of 2**40 images without them."""

    def index_select(self, dim, index):
        return self.as_subclass(torch.Tensor).clone() if dim == 0 else super().index_select(dim, index)


def augment_rows(augment, images, epoch):
    return augment(images.as_subclass(Rows), torch.from_numpy(INDICES), torch.tensor(epoch))


def applied(operation, images, epoch):
    return operation.apply(images.copy(), INDICES, epoch)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("epoch", [0, 7, 100_000])
def test_words_equal_the_generators(seed, epoch):
    counters = [torch.from_numpy(INDICES % 2**32), torch.tensor(epoch), torch.tensor(4), torch.tensor(9)]
    words = augment_eager.philox(*counters, seed)
    expected = [philox(seed, index, epoch, 4, 9) for index in INDICES]
    assert words.tolist() == [[int(word) for word in four] for four in expected]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", [1, 4])
def test_crop(size, padding):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(RandomCrop(padding, seed=5), images, epoch)
        assert (augmented(images, epoch, crop_padding=padding) == expected).all()
        if padding < min(size):
            expected = applied(RandomCrop(padding, mode="reflect", seed=5), images, epoch)
            assert (augmented(images, epoch, crop_padding=padding, crop_mode="reflect") == expected).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flip(size):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(HorizontalFlip(seed=5), images, epoch)
        assert (augmented(images, epoch, flip=True) == expected).all()
        expected = applied(AlternatingFlip(seed=5), images, epoch)
        assert (augmented(images, epoch, flip=True, alternating_flip=True) == expected).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
# Even and odd squares (their centres differ), several that overlap, one larger than most images.
@pytest.mark.parametrize(("holes", "side"), [(1, 8), (1, 1), (4, 3), (3, 16), (1, 41)])
def test_cutout(size, holes, side):
    images = pictures(size)
    for epoch in (0, 3):
        expected = applied(Cutout(holes, side, FILL, seed=5), images, epoch)
        out = augmented(images, epoch, cutout_holes=holes, cutout_size=side)
        assert (out == expected).all()


def test_holes_reach_over_every_border():
    """Otherwise the test above would not show that they are clipped as the operations' are."""
    blank = augmented(np.full((len(INDICES), 9, 7, 3), 77, np.uint8), 0, cutout_holes=1, cutout_size=5)[..., 1] == 0
    clipped = blank.sum(axis=(1, 2)) < 25
    edges = [blank[clipped][:, 0], blank[clipped][:, -1], blank[clipped][:, :, 0], blank[clipped][:, :, -1]]
    assert all(edge.any(axis=1).sum() > 10 for edge in edges)


POLICIES = [
    {"policy": "autoaugment"},
    {"policy": "autoaugment-imagenet", "policy_interpolation": "bilinear"},
    {"policy": "autoaugment-svhn", "policy_fill": "mean"},
    {"policy": "randaugment"},
    {"policy": "randaugment", "randaugment_increasing": True, "randaugment_std": 0.5},
    {"policy": "trivialaugment", "policy_interpolation": "bilinear", "policy_fill": "mean"},
    {"policy": "augmix"},
]


def pipelines():
    """Every policy on odd and unequal sides, every size with a policy of one operation and with one of two; the
    other pairs are thorough."""
    for policy, size in product(POLICIES, [*SIZES, (2, 2)]):
        is_short = size == (9, 7) or policy in (POLICIES[0], POLICIES[5])
        name = "-".join(map(str, (*policy.values(), size)))
        yield pytest.param(policy, size, id=name, marks=() if is_short else pytest.mark.thorough)


@pytest.mark.parametrize(("settings", "size"), pipelines())
def test_the_whole_pipeline(settings, size):
    """All four in order, and every byte the operations'."""
    wanted = AugmentSection(crop_padding=4, flip=True, cutout_holes=2, cutout_size=5, cutout_fill="zero", **settings)
    images = pictures(size)
    images[::2] = images[::2] // 3 + 60  # low contrast: equalize and autocontrast have something to do
    for epoch in (0, 11):
        expected = images.copy()
        for operation in training_augmentations(wanted, MEAN, 9):
            expected = operation.apply(expected, INDICES, epoch)
        out = augment_rows(DeviceAugment(wanted, size, MEAN, seed=9), torch.from_numpy(images), epoch).numpy()
        assert (out == expected).all()


@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_form_for_devices_equals_the_form_for_the_cpu(settings, monkeypatch):
    """On a GPU every operation runs on every image and one is kept, because nothing may be read on the host."""
    images = torch.from_numpy(pictures((12, 10)) // 2)
    indices = torch.arange(200)
    augment = DeviceAugment(section(**settings), (12, 10), MEAN, seed=3)
    expected = augment(images, indices, torch.tensor(2))
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # only the CPU's form reads where the images are
    normalised = DeviceAugment(section(**settings), (12, 10), MEAN, seed=3, preprocess=Preprocess(MEAN, (0.2,) * 3))
    with eager_only(host_reads=False):
        out = augment(images, indices, torch.tensor(2))
        assert torch.equal(out, expected) and out.is_contiguous()
        out = normalised(images, indices, torch.tensor(2))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert augment(images, indices[:0], torch.tensor(2)).shape == (0, 12, 10, 3)


def test_a_batch_can_be_made_again_alone():
    images = torch.from_numpy(pictures((12, 10)))
    augment = DeviceAugment(AugmentSection(policy="autoaugment", cutout_holes=1), (12, 10), MEAN)
    whole = augment(images, torch.arange(200), torch.tensor(4))
    assert torch.equal(augment(images, torch.tensor([150, 3]), torch.tensor(4)), whole[[150, 3]])
    assert augment(images, torch.arange(0), torch.tensor(4)).shape == (0, 12, 10, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_images_are_those_of_preprocess(dtype):
    images, preprocess = torch.from_numpy(pictures((12, 10))), Preprocess((0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    wanted = AugmentSection(policy="autoaugment")
    pixels = DeviceAugment(wanted, (12, 10), MEAN)(images, torch.arange(50), torch.tensor(0))
    augment = DeviceAugment(wanted, (12, 10), MEAN, preprocess=preprocess, dtype=dtype)
    out = augment(images, torch.arange(50), torch.tensor(0))
    assert out.shape == (50, 3, 12, 10) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, preprocess(pixels).to(dtype))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": torch.zeros(4, 8, 8, 3)}, "images: expected contiguous uint8"),
        ({"images": torch.zeros(4, 8, 8, 3, dtype=torch.uint8).transpose(1, 2)}, "images: expected contiguous"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, "indices: expected int64"),
        ({"epoch": torch.zeros(1, dtype=torch.int64)}, "epoch: expected int64 of 0 dimensions"),
        ({"seed": -1}, "seed: expected 0"),
        ({"flip": "both"}, "none, random, alternating; got 'both'"),
        ({"crop_padding": 8, "crop_reflect": True}, "crop_padding: expected 0 to 7 to mirror images of 8x8; got 8"),
        ({"crop_padding": -1}, "crop_padding: expected 0 to 16383; got -1"),
        ({"policy_fill": (0, 0, 256)}, "policy_fill: expected three numbers from 0 to 255"),
        ({"cutout_fill": (0, 0)}, "cutout_fill: expected three numbers from 0 to 255"),
        ({"scale": torch.ones(3)}, "scale, shift: expected both"),
        ({"scale": torch.ones(3), "shift": torch.ones(3).double()}, "shift: expected float32"),
        ({"impl": "cuda"}, "impl: expected one of auto, triton, eager"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    given = {"images": images, "indices": torch.zeros(2, dtype=torch.int64), "epoch": torch.tensor(0), "seed": 0}
    with pytest.raises(ValueError, match=says):
        augment_batch(**{**given, **change})


def test_a_recipe_that_mirrors_more_than_there_is_is_refused_at_once():
    wanted = section(crop_padding=7, crop_mode="reflect")
    with pytest.raises(ValueError, match="augment.crop_padding: expected 0 to 6 to mirror images of 9x7; got 7"):
        DeviceAugment(wanted, (9, 7), MEAN)


@pytest.mark.parametrize("fill", FILLS)
def test_a_recipes_colours_are_the_same_in_both_forms(fill, monkeypatch):
    """Both ask the one function that knows the colours."""
    wanted = section(policy="autoaugment", policy_fill=fill, cutout_holes=1, cutout_fill=fill)
    expected = {"zero": (0, 0, 0), "mean": FILL}[fill]
    policy, cutout = training_augmentations(wanted, MEAN, 0)
    options = DeviceAugment(wanted, (9, 7), MEAN).options
    assert tuple(policy.fill) == tuple(cutout.fill) == expected
    assert options["policy_fill"] == options["cutout_fill"] == expected
    for module in (device, from_recipe):
        monkeypatch.setattr(module, "fill_colour", lambda name, mean: (1, 2, 3))
    policy, cutout = training_augmentations(wanted, MEAN, 0)
    options = DeviceAugment(wanted, (9, 7), MEAN).options
    assert tuple(policy.fill) == tuple(cutout.fill) == options["policy_fill"] == options["cutout_fill"] == (1, 2, 3)


def test_triton_says_what_it_cannot_take():
    large = torch.zeros(1, 65, 64, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="65x64 have more than 4096 pixels"):
        augment_batch(large, torch.tensor([0]), torch.tensor(0), 0, impl="triton")
    assert augment_batch(large, torch.tensor([0]), torch.tensor(0), 0).shape == (1, 65, 64, 3)


def test_without_any_of_them_images_stay_as_they_are():
    images = pictures((9, 7))
    assert (augmented(images, 0) == images).all()


def test_importing_them_needs_neither_ffcv_nor_numba():
    code = (
        "import sys, rsengine.input.resident; from rsengine.augment import DeviceAugment; "
        "heavy = {'ffcv', 'numba', 'cv2', 'rsengine.augment.operations'} & set(sys.modules); assert not heavy, heavy; "
        "from rsengine.augment import Cutout; assert 'numba' in sys.modules and 'ffcv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
