"""The Triton augmentation against the eager one, whose own tests hold it to Pillow: identical bytes."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsengine.augment import DeviceAugment
from rsengine.config import AugmentSection
from rsengine.kernels import augment_batch
from rsengine.model.preprocess import Preprocess

MEAN = (0.5, 0.4, 0.3)
SIZES = [(32, 32), (33, 21), (1, 1), (2, 2), (1, 9), (3, 40)]
POLICIES = [
    {"policy": "autoaugment"},
    {"policy": "autoaugment-imagenet", "policy_interpolation": "bilinear"},
    {"policy": "autoaugment-svhn", "policy_fill": "mean"},
    {"policy": "randaugment", "randaugment_ops": 3, "randaugment_std": 2.0},
    {"policy": "randaugment", "randaugment_increasing": True, "randaugment_std": 0.5},
    {"policy": "trivialaugment"},
    {"policy": "trivialaugment", "policy_interpolation": "bilinear", "policy_fill": "mean"},
]


def pictures(count, size, device):
    """Images of all sorts: noise, low contrast, few levels, constant."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    images[1::4] = images[1::4] // 4 + 90
    images[2::4] = images[2::4] // 100 * 100
    images[3::8] = images[3::8, :1, :1]
    return torch.from_numpy(images).to(device)


def both(section, images, indices, epoch=3, seed=7, **normalise):
    """The same call with either implementation."""
    size = tuple(images.shape[1:3])
    augment = DeviceAugment(section, size, MEAN, seed=seed, device=images.device, **normalise)
    given = images, indices.to(images.device), torch.tensor(epoch, device=images.device), seed
    options = {"policy": augment.policy, **augment.options, **augment.normalise}
    return [augment_batch(*given, **options, impl=impl) for impl in ("triton", "eager")]


def policies():
    """Every policy on odd and unequal sides, every size with a policy that interpolates and one that does not; the
    other pairs are thorough."""
    for policy, size in product(POLICIES, SIZES):
        is_short = size == (33, 21) or policy in (POLICIES[0], POLICIES[6])
        name = "-".join(map(str, (*policy.values(), size)))
        yield pytest.param(policy, size, id=name, marks=() if is_short else pytest.mark.thorough)


@pytest.mark.parametrize(("settings", "size"), policies())
def test_policies(settings, size, device):
    images = pictures(48, size, device)
    section = AugmentSection(crop_padding=2, cutout_holes=3, cutout_size=3, **settings)
    triton, eager = both(section, images, torch.randperm(48))
    assert triton.dtype == torch.uint8 and triton.shape == (48, *size, 3)
    assert torch.equal(triton, eager)


PLAIN = [
    {"crop_padding": 0, "flip": False},
    {"crop_padding": 4},
    {"crop_padding": 40, "flip": False},  # most windows lie outside altogether
    {"crop_mode": "reflect"},
    {"crop_padding": 0, "alternating_flip": True},
    {"cutout_holes": 1, "cutout_size": 5},
    {"cutout_holes": 4, "cutout_size": 50, "cutout_fill": "zero"},
]
EPOCHS = [0, 1, 2**31 + 5]


def crops_flips_and_cutouts():
    """Everything in the last epoch, whose number needs more than 31 bits, and on odd and unequal sides in each epoch;
    the others are thorough."""
    for chosen, size, epoch in product(PLAIN, SIZES, EPOCHS):
        is_short = epoch == EPOCHS[-1] or size == (33, 21)
        name = f"{epoch}-{chosen}-{size}"
        yield pytest.param(chosen, size, epoch, id=name, marks=() if is_short else pytest.mark.thorough)


@pytest.mark.parametrize(("settings", "size", "epoch"), crops_flips_and_cutouts())
def test_crop_flip_and_cutout(settings, size, epoch, device):
    if settings.get("crop_mode") == "reflect":
        settings = {**settings, "crop_padding": min(size) - 1}
    triton, eager = both(AugmentSection(**settings), pictures(12, size, device), torch.arange(12), epoch)
    assert torch.equal(triton, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_and_cast(dtype, device):
    preprocess = Preprocess(MEAN, (0.2, 0.3, 0.1), device)
    section = AugmentSection(policy="autoaugment", cutout_holes=1)
    images = pictures(20, (9, 7), device)
    triton, eager = both(section, images, torch.arange(20), preprocess=preprocess, dtype=dtype)
    assert triton.dtype == dtype and triton.shape == (20, 3, 9, 7) and triton.stride() == eager.stride()
    assert triton.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(triton, eager)  # product and sum are rounded by themselves in both


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_large_seeds_and_the_largest_image(seed, device):
    triton, eager = both(
        AugmentSection(policy="autoaugment"), pictures(4, (64, 64), device), torch.arange(4), seed=seed
    )
    assert torch.equal(triton, eager)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_any_size_seed_and_epoch(height, width, seed, epoch, device):
    section = AugmentSection(policy="trivialaugment", cutout_holes=1, cutout_size=4)
    triton, eager = both(section, pictures(8, (height, width), device), torch.arange(8), epoch, seed)
    assert torch.equal(triton, eager)


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(count, device):
    triton, eager = both(AugmentSection(policy="autoaugment"), pictures(3, (8, 8), device), torch.arange(count))
    assert triton.shape == (count, 8, 8, 3) and torch.equal(triton, eager)


def test_a_batch_can_be_made_again_alone(device):
    images = pictures(30, (10, 10), device)
    section = AugmentSection(policy="randaugment", cutout_holes=2)
    whole, _ = both(section, images, torch.arange(30))
    alone, _ = both(section, images, torch.tensor([21, 4]))
    assert torch.equal(alone, whole[[21, 4]])
    again, _ = both(section, images, torch.arange(30), epoch=4)
    assert not torch.equal(again, whole)


def test_opcheck(device):
    images, section = pictures(6, (8, 8), device), AugmentSection(policy="autoaugment")
    augment = DeviceAugment(section, (8, 8), MEAN, device=device)
    scale = torch.ones(3, device=device)
    numbers = 4, False, 1, 0, False, [0, 0, 0], 1, 4, [9, 9, 9], list(augment.policy)
    arguments = images, torch.arange(4, device=device), torch.tensor(1, device=device), 5, *numbers
    for normalise in ((None, None, torch.float32), (scale, scale, torch.bfloat16)):
        torch.library.opcheck(torch.ops.rsengine.augment_batch.default, (*arguments, *normalise))
