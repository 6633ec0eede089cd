"""The policies and their magnitudes, in tables that the operations and the device functions share.

A policy is a :class:`Policy`: groups of slots, each slot a list of :class:`Choice`. To augment an image, draw a group;
then, in each of its slots in turn, draw a choice, apply its operation with its probability at a drawn magnitude and
sign. That covers AutoAugment (25 groups of two slots of one choice), RandAugment (one group, N slots) and
TrivialAugment (one slot), and AugMix with its chains. Magnitudes are those of torchvision, or of timm where so named.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rsengine.errors import SettingsError
from rsengine.kernels.augment_tables import check_crop_padding

if TYPE_CHECKING:
    from rsengine.config import AugmentSection

POLICIES = (  # as recipes name them
    "none",
    "autoaugment",
    "autoaugment-imagenet",
    "autoaugment-svhn",
    "randaugment",
    "trivialaugment",
    "augmix",
)
INTERPOLATIONS = ("nearest", "bilinear")
CROP_MODES = ("zero", "reflect")
NOISE_LEVELS = 1024  # equally probable values that stand for a normal distribution
_SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"}


@dataclass(frozen=True)
class Choice:
    """An operation at one of several equally probable magnitudes, each with either sign where the operation has one.

    The units of a magnitude: shear, the tangent; translate, pixels; rotate, degrees counter-clockwise; brightness,
    color, contrast, sharpness, the factor less 1; posterize, bits kept; solarize, the lowest value inverted;
    solarize_add, what is added to values below 128; 0 for operations that have none.
    """

    operation: str
    magnitudes: tuple[float, ...] = (0.0,)
    probability: float = 1.0

    @property
    def signed(self) -> bool:
        return self.operation in _SIGNED


@dataclass(frozen=True)
class Policy:
    """``groups[g][j]`` holds the choices of slot j of group g; slots and choices are equally many throughout.

    ``chains``: 0, the slots follow one another; k, AugMix: they make k chains of equal length, each cut to a random
    length from 1, whose results are mixed with the image itself.
    """

    name: str
    groups: tuple[tuple[tuple[Choice, ...], ...], ...]
    chains: int = 0

    @property
    def slots(self) -> int:
        return len(self.groups[0])


# --- magnitudes, by size of the image (height, width) and number of bins ----------------------------------------------

Ranges = dict[str, tuple[float, ...]]
_PLAIN = {"identity": (0.0,), "autocontrast": (0.0,), "equalize": (0.0,)}


def _line(start: float, stop: float, bins: int) -> tuple[float, ...]:
    """``torch.linspace`` in float32, to the bit, because thresholds depend on it: each half is computed from its own
    end, with one rounding for each value."""
    step = float(np.float32(stop - start) / np.float32(bins - 1))
    ends = float(np.float32(start)), float(np.float32(stop))
    values = (ends[0] + step * i if i < bins // 2 else ends[1] - step * (bins - 1 - i) for i in range(bins))
    return tuple(float(np.float32(value)) for value in values)


def _bits(lost: int, bins: int, most: int = 8) -> tuple[float, ...]:
    return tuple(float(most - round(i / ((bins - 1) / lost))) for i in range(bins))


def _ranges(
    bins: int, shear: float, translate: tuple[float, float], rotate: float, enhance: float, posterize: tuple[float, ...]
) -> Ranges:
    ranges = {"shear_x": _line(0, shear, bins), "shear_y": _line(0, shear, bins)}
    ranges |= {"translate_y": _whole(_line(0, translate[0], bins)), "translate_x": _whole(_line(0, translate[1], bins))}
    ranges |= {"rotate": _line(0, rotate, bins), "posterize": posterize, "solarize": _line(255, 0, bins)}
    return ranges | dict.fromkeys(("brightness", "color", "contrast", "sharpness"), _line(0, enhance, bins)) | _PLAIN


def _whole(pixels: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(int(p)) for p in pixels)


def autoaugment_ranges(size: tuple[int, int], bins: int = 10) -> Ranges:
    """torchvision's for AutoAugment (10 bins) and RandAugment (31)."""
    translate = (150.0 / 331.0 * size[0], 150.0 / 331.0 * size[1])
    return _ranges(bins, 0.3, translate, 30.0, 0.9, _bits(4, bins)) | {"invert": (0.0,)}


def wide_ranges(bins: int = 31) -> Ranges:
    """torchvision's for TrivialAugment-wide."""
    return _ranges(bins, 0.99, (32.0, 32.0), 135.0, 0.99, _bits(6, bins))


def augmix_ranges(size: tuple[int, int], bins: int = 10) -> Ranges:
    """torchvision's for AugMix."""
    return _ranges(bins, 0.3, (size[0] / 3.0, size[1] / 3.0), 30.0, 0.9, _bits(4, bins, most=4))


def timm_ranges(size: tuple[int, int], levels: Sequence[float]) -> Ranges:
    """timm's for ``inc1``, where every operation grows stronger with its level from 0 to 10."""

    def scaled(most: float) -> tuple[float, ...]:
        return tuple(level / 10 * most for level in levels)

    ranges = {"shear_x": scaled(0.3), "shear_y": scaled(0.3), "rotate": scaled(30.0)}
    ranges |= {"translate_y": scaled(0.45 * size[0]), "translate_x": scaled(0.45 * size[1])}
    ranges |= dict.fromkeys(("brightness", "color", "contrast", "sharpness"), scaled(0.9))
    ranges["posterize"] = tuple(float(4 - int(level / 10 * 4)) for level in levels)
    ranges["solarize"] = tuple(float(256 - min(256, int(level / 10 * 256))) for level in levels)
    ranges["solarize_add"] = tuple(float(min(128, int(level / 10 * 110))) for level in levels)
    return ranges | dict.fromkeys(("autocontrast", "equalize", "invert"), (0.0,))


def noisy_levels(mean: float, std: float, most: float) -> tuple[float, ...]:
    """``NOISE_LEVELS`` equally probable levels of a normal distribution, cut to 0 … ``most``, as timm's ``mstd``."""
    if std == 0:
        return (mean,)
    normal = statistics.NormalDist(mean, std)
    quantiles = (normal.inv_cdf((i + 0.5) / NOISE_LEVELS) for i in range(NOISE_LEVELS))
    return tuple(min(max(level, 0.0), most) for level in quantiles)


# --- policies ---------------------------------------------------------------------------------------------------------

_AUTOAUGMENT = {  # operation probability magnitude, twice a sub-policy (Cubuk et al. 2019, tables 7 to 9)
    "cifar10": """
        invert .1 0 contrast .2 6; rotate .7 2 translate_x .3 9; sharpness .8 1 sharpness .9 3;
        shear_y .5 8 translate_y .7 9; autocontrast .5 0 equalize .9 0; shear_y .2 7 posterize .3 7;
        color .4 3 brightness .6 7; sharpness .3 9 brightness .7 9; equalize .6 0 equalize .5 0;
        contrast .6 7 sharpness .6 5; color .7 7 translate_x .5 8; equalize .3 0 autocontrast .4 0;
        translate_y .4 3 sharpness .2 6; brightness .9 6 color .2 8; solarize .5 2 invert 0 0;
        equalize .2 0 autocontrast .6 0; equalize .2 0 equalize .6 0; color .9 9 equalize .6 0;
        autocontrast .8 0 solarize .2 8; brightness .1 3 color .7 0; solarize .4 5 autocontrast .9 0;
        translate_y .9 9 translate_y .7 9; autocontrast .9 0 solarize .8 3; equalize .8 0 invert .1 0;
        translate_y .7 9 autocontrast .9 0""",
    "imagenet": """
        posterize .4 8 rotate .6 9; solarize .6 5 autocontrast .6 0; equalize .8 0 equalize .6 0;
        posterize .6 7 posterize .6 6; equalize .4 0 solarize .2 4; equalize .4 0 rotate .8 8;
        solarize .6 3 equalize .6 0; posterize .8 5 equalize 1 0; rotate .2 3 solarize .6 8;
        equalize .6 0 posterize .4 6; rotate .8 8 color .4 0; rotate .4 9 equalize .6 0;
        equalize 0 0 equalize .8 0; invert .6 0 equalize 1 0; color .6 4 contrast 1 8;
        rotate .8 8 color 1 2; color .8 8 solarize .8 7; sharpness .4 7 invert .6 0;
        shear_x .6 5 equalize 1 0; color .4 0 equalize .6 0; equalize .4 0 solarize .2 4;
        solarize .6 5 autocontrast .6 0; invert .6 0 equalize 1 0; color .6 4 contrast 1 8;
        equalize .8 0 equalize .6 0""",
    "svhn": """
        shear_x .9 4 invert .2 0; shear_y .9 8 invert .7 0; equalize .6 0 solarize .6 6;
        invert .9 0 equalize .6 0; equalize .6 0 rotate .9 3; shear_x .9 4 autocontrast .8 0;
        shear_y .9 8 invert .4 0; shear_y .9 5 solarize .2 6; invert .9 0 autocontrast .8 0;
        equalize .6 0 rotate .9 3; shear_x .9 4 solarize .3 3; shear_y .8 8 invert .7 0;
        equalize .9 0 translate_y .6 6; invert .9 0 equalize .6 0; contrast .3 3 rotate .8 4;
        invert .8 0 translate_y 0 2; shear_y .7 6 solarize .4 8; invert .6 0 rotate .8 4;
        shear_y .3 7 translate_x .9 3; shear_x .1 6 invert .6 0; solarize .7 2 translate_y .6 7;
        shear_y .8 4 invert .8 0; shear_x .7 9 translate_y .8 3; shear_y .8 5 autocontrast .7 0;
        shear_x .7 2 invert .1 0""",
}
AUTOAUGMENT_NAMES = tuple(_AUTOAUGMENT)


def autoaugment(size: tuple[int, int], name: str = "cifar10") -> Policy:
    """AutoAugment (Cubuk et al. 2019, arXiv 1805.09501), learned on ``name``: cifar10, imagenet or svhn.

    Raises:
        ValueError: another name.
    """
    if name not in _AUTOAUGMENT:
        raise ValueError(f"AutoAugment policy: expected one of {', '.join(AUTOAUGMENT_NAMES)}; got {name!r}")
    ranges = autoaugment_ranges(size)
    groups = []
    for line in _AUTOAUGMENT[name].split(";"):
        words = line.split()
        slots = []
        for operation, probability, level in (words[:3], words[3:]):
            magnitudes = ranges[operation]
            chosen = magnitudes[int(level)] if len(magnitudes) > 1 else magnitudes[0]
            slots.append((Choice(operation, (chosen,), float(probability)),))
        groups.append(tuple(slots))
    return Policy(f"autoaugment-{name}", tuple(groups))


def randaugment(
    size: tuple[int, int],
    num_ops: int = 2,
    magnitude: float = 9,
    bins: int = 31,
    *,
    magnitude_std: float = 0.0,
    increasing: bool = False,
) -> Policy:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719).

    Args:
        num_ops: N, operations an image.
        magnitude: M, one of torchvision's ``bins``, from 0; with ``increasing``, timm's level from 0 to 10.
        magnitude_std: each operation's magnitude is drawn from a normal distribution around ``magnitude`` (timm's
            ``mstd``), rounded to a whole bin unless ``increasing``.
        increasing: timm's ``inc1``: its 15 operations and ranges, each applied with probability one half.

    Raises:
        ValueError: a number out of its range, or a magnitude that is no bin.
    """
    most = 10 if increasing else bins - 1
    if num_ops < 1 or bins < 2 or magnitude_std < 0 or not 0 <= magnitude <= most:
        raise SettingsError(
            f"RandAugment: expected num_ops >= 1, bins >= 2, magnitude_std >= 0 and magnitude from 0 to {most}; "
            f"got {num_ops}, {bins}, {magnitude_std}, {magnitude}"
        )
    if not increasing and magnitude != int(magnitude):
        raise SettingsError(f"RandAugment: expected a whole magnitude, one of {bins} bins; got {magnitude}")
    levels = noisy_levels(magnitude, magnitude_std, most)
    if increasing:
        ranges, probability = timm_ranges(size, levels), 0.5
    else:
        whole, probability = [round(level) for level in levels], 1.0
        every = autoaugment_ranges(size, bins)
        del every["invert"]  # torchvision's RandAugment has none
        ranges = {name: tuple(of[i] for i in whole) if len(of) > 1 else of for name, of in every.items()}
    choices = tuple(Choice(name, magnitudes, probability) for name, magnitudes in ranges.items())
    return Policy("randaugment", ((choices,) * num_ops,))


def trivialaugment(size: tuple[int, int]) -> Policy:
    """TrivialAugment-wide (Müller & Hutter 2021, arXiv 2103.10158)."""
    return Policy("trivialaugment", ((tuple(Choice(name, of) for name, of in wide_ranges().items()),),))


def augmix(size: tuple[int, int], severity: int = 3, width: int = 3, depth: int = 3) -> Policy:
    """AugMix (Hendrycks et al. 2020, arXiv 1912.02781), alpha 1, with torchvision's operations.

    Args:
        severity: magnitudes are drawn from the first ``severity`` of 10 bins.
        width: number of chains.
        depth: length of the longest chain.

    Raises:
        ValueError: a number out of its range.
    """
    if not 1 <= severity <= 10 or width < 1 or depth < 1:
        raise ValueError(
            f"AugMix: expected severity from 1 to 10, width and depth >= 1; got {severity}, {width}, {depth}"
        )
    ranges = augmix_ranges(size)
    del ranges["identity"]  # the mix holds the image itself
    choices = tuple(Choice(name, of[:severity]) for name, of in ranges.items())
    return Policy("augmix", ((choices,) * (width * depth),), chains=width)


# --- by name ----------------------------------------------------------------------------------------------------------


def check_crop(augment: AugmentSection, size: tuple[int, int]) -> None:
    """Raise :class:`SettingsError` if images of ``size`` (height, width) cannot be padded as a recipe asks."""
    try:
        check_crop_padding("augment.crop_padding", augment.crop_padding, size, reflect=augment.crop_mode == "reflect")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def policy_of(augment: AugmentSection, size: tuple[int, int]) -> Policy | None:
    """The policy that a recipe names, for images of ``size`` (height, width), or ``None``.

    Raises:
        ValueError: settings that the policy refuses.
    """
    name = augment.policy
    if name == "none":
        return None
    if name == "randaugment":
        return randaugment(
            size,
            augment.randaugment_ops,
            augment.randaugment_magnitude,
            magnitude_std=augment.randaugment_std,
            increasing=augment.randaugment_increasing,
        )
    if name == "trivialaugment":
        return trivialaugment(size)
    if name == "augmix":
        return augmix(size, augment.augmix_severity)
    return autoaugment(size, name.partition("-")[2] or "cifar10")
