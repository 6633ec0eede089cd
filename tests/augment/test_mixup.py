"""Mixup and cutmix against versions with loops and slices, from the drawn numbers alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from rsengine.augment.mixup import Mix, outside_box, soft_targets, symmetric_beta

ALPHAS = [(0.2, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.3), (0.4, 1.0)]
SIZES = [(16, 16), (9, 14), (1, 1)]  # square; odd and oblong; a box of no pixels


def batch(seed=0, n=6, height=9, width=14):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (n,), generator=generator)


def beta_by_hand(alpha, u, v):
    odds = (u ** (-1 / alpha) - 1) * math.cos(2 * math.pi * v) ** 2
    return 0.5 + math.copysign(0.5, math.cos(2 * math.pi * v)) / math.sqrt(1 + 1 / odds)


def mix_by_hand(images, labels, mixup_alpha, cutmix_alpha, classes=10):
    """The next batch of ``Mix(mixup_alpha, cutmix_alpha)`` with its soft targets, taking the same draws."""
    n, height, width, _ = images.shape
    pick, u, v, row, column = torch.rand(5).tolist()
    use_mixup = mixup_alpha > 0 and (cutmix_alpha == 0 or pick < 0.5)
    share = beta_by_hand(mixup_alpha if use_mixup else cutmix_alpha, u, v)
    mixed, targets = images.double(), torch.zeros(n, classes, dtype=torch.float64)
    if use_mixup:
        for i in range(n):
            mixed[i] = share * images[i].double() + (1 - share) * images[i - 1].double()
    else:  # the authors' rand_bbox, and their correction of the share
        half_height, half_width = int(height * math.sqrt(1 - share)) // 2, int(width * math.sqrt(1 - share)) // 2
        top, left = int(height * row) - half_height, int(width * column) - half_width
        bottom, right = min(top + 2 * half_height, height), min(left + 2 * half_width, width)
        top, left = max(top, 0), max(left, 0)
        for i in range(n):
            mixed[i, top:bottom, left:right] = images[i - 1, top:bottom, left:right].double()
        share = 1 - (bottom - top) * (right - left) / (height * width)
    for i in range(n):
        targets[i, labels[i]] += share
        targets[i, labels[i - 1]] += 1 - share
    return mixed.float(), targets.float()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("alphas", ALPHAS)
def test_batches_and_targets_equal_the_version_by_hand(alphas, height, width):
    for seed in range(25):
        images, labels = batch(seed, height=height, width=width)
        torch.manual_seed(seed)
        expected, targets = mix_by_hand(images, labels, *alphas)
        torch.manual_seed(seed)
        mixed, share = Mix(*alphas)(images)
        assert mixed.shape == images.shape and mixed.dtype == torch.float32 and share.shape == ()
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=2e-3)
        actual = soft_targets(labels, labels.roll(1, 0), share, 10)
        torch.testing.assert_close(actual, targets, rtol=1e-5, atol=1e-5)


def test_mixup_shows_the_share_it_reports():
    images, _ = batch()
    mixed, share = Mix(1.0, 0.0)(images)
    own, other = images.float(), images.roll(1, 0).float()
    differs = (own - other).abs() > 20
    recovered = (mixed - other)[differs] / (own - other)[differs]
    torch.testing.assert_close(recovered, share.expand_as(recovered), rtol=0, atol=1e-4)


def test_cutmix_takes_one_box_and_reports_its_exact_area():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 9, 14, 3).contiguous()
    mix, areas, at_edge = Mix(0.0, 1.0), set(), 0
    for _ in range(60):
        mixed, share = mix(images)
        taken = (mixed != images)[..., 0]
        assert (taken == taken[0]).all() and ((mixed == images) | (mixed == images.roll(1, 0))).all()
        rows, columns = taken[0].any(dim=1), taken[0].any(dim=0)
        assert torch.equal(taken[0], rows[:, None] & columns)  # a rectangle
        for line in (rows, columns):
            assert not line.any() or line.nonzero().diff(dim=0).eq(1).all()  # in one piece
        assert float(share) == pytest.approx(1 - float(taken[0].float().mean()), abs=1e-6)
        areas.add(int(taken[0].sum()))
        at_edge += bool(rows[0] or rows[-1] or columns[0] or columns[-1])
    assert len(areas) > 10 and at_edge > 5


def test_boxes_reach_every_pixel_and_the_ends():
    corner = outside_box(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.999), 8, 8)
    assert corner[:4, 3:].sum() == 0 and corner.sum() == 64 - 4 * 5  # eight pixels a side about pixel (0, 7)
    middle = outside_box(torch.tensor(0.0), torch.tensor(0.5), torch.tensor(0.5), 8, 8)
    assert middle.sum() == 0
    assert outside_box(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.5), 8, 8).sum() == 64


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 3.0, 50.0])
def test_shares_follow_the_beta_distribution(alpha):
    generator = torch.Generator().manual_seed(1)
    u, v = torch.rand(2, 40000, generator=generator)
    ours = np.sort(symmetric_beta(alpha, u, v).double().numpy())
    theirs = np.sort(np.random.default_rng(2).beta(alpha, alpha, 200000))
    assert ours.min() >= 0 and ours.max() <= 1
    # Away from the very ends, where float32 cannot tell 1 - share from 0.
    grid = np.concatenate([np.logspace(-6, -1, 40), np.linspace(0.1, 1 - 1e-6, 40)])
    gap = np.abs(np.searchsorted(ours, grid) / len(ours) - np.searchsorted(theirs, grid) / len(theirs)).max()
    assert gap < 1.63 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # Kolmogorov-Smirnov at 1 %
    assert ours.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3, 1e8])
def test_extreme_alphas_and_draws_stay_numbers(alpha):
    u = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])[:, None]
    v = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    share = symmetric_beta(alpha, u, v.expand(4, 5))
    assert ((share >= 0) & (share <= 1)).all()


def test_draws_differ_and_come_back_with_the_seed():
    images, _ = batch()
    mix = Mix(0.5, 0.5)
    torch.manual_seed(3)
    first = [mix(images) for _ in range(8)]
    assert len({float(share) for _, share in first}) > 5
    torch.manual_seed(3)
    for (mixed, share), (again, share_again) in zip(first, [mix(images) for _ in range(8)], strict=True):
        assert torch.equal(mixed, again) and torch.equal(share, share_again)


def test_with_both_on_each_batch_gets_one_of_them():
    images = torch.tensor([0, 200], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3).contiguous()
    torch.manual_seed(0)
    mix = Mix(1.0, 1.0)
    blended = sum(bool(((mixed != 0) & (mixed != 200)).any()) for mixed, _ in (mix(images) for _ in range(400)))
    assert 150 < blended < 250


def test_soft_targets_are_distributions():
    labels, others = torch.tensor([1, 2, 9]), torch.tensor([1, 0, 3])
    targets = soft_targets(labels, others, torch.tensor(0.3), 10)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    assert targets[0].tolist() == F.one_hot(labels, 10)[0].tolist()  # the same class twice
    assert targets[1, 2] == pytest.approx(0.3) and targets[1, 0] == pytest.approx(0.7)


def test_nothing_depends_on_a_value():
    """A fake tensor has shapes and no values: reading one is an error."""
    with FakeTensorMode():
        images, labels = torch.empty(4, 8, 8, 3, dtype=torch.uint8), torch.empty(4, dtype=torch.int64)
        for alphas in ALPHAS:
            mixed, share = Mix(*alphas)(images)
            assert mixed.shape == images.shape
            assert soft_targets(labels, labels.roll(1, 0), share, 10).shape == (4, 10)


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-1.0, 1.0)])
def test_alphas_out_of_range_are_refused(alphas):
    with pytest.raises(ValueError, match="mixup_alpha, cutmix_alpha: expected numbers >= 0, not both 0"):
        Mix(*alphas)
