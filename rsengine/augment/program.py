"""A policy compiled for one image size: tables of numbers that numba code and device code read alike.

Everything that needs floating-point functions (tangents, sines, factors, lookup tables) is computed here, once, on the
host, by torchvision's formulas for PIL images. What remains to be done for a pixel is arithmetic that rounds the same
on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rsengine.augment.policies import Choice, Policy
from rsengine.errors import SettingsError
from rsengine.kernels.augment_tables import AFFINE, AUTOCONTRAST, COLOR, CONTRAST, EQUALIZE, IDENTITY, LOOKUP, SHARPNESS

_KINDS = {
    "identity": IDENTITY,
    "color": COLOR,
    "contrast": CONTRAST,
    "sharpness": SHARPNESS,
    "autocontrast": AUTOCONTRAST,
    "equalize": EQUALIZE,
    **dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"), AFFINE),
    **dict.fromkeys(("brightness", "posterize", "solarize", "solarize_add", "invert"), LOOKUP),
}


@dataclass(frozen=True)
class Program:
    """A policy's tables. S settings (an operation at one magnitude and sign), G groups of J slots of E choices.

    The numbers of an image are Philox words (:mod:`rsengine.augment.generator`) of its key in the policy's stream; a
    word w means ``(w * bound) >> 32`` where an integer below ``bound`` is wanted. Word 0 of block 0 draws the group.
    Slot j uses block 1 + j: word 0 draws the choice e, word 1 applies it if below ``gates[g, j, e]``, word 2 draws
    the level below ``levels[g, j, e]``, word 3 the sign below 2; the setting is ``first[g, j, e] + 2 * level + sign``.

    With ``chains`` = k > 0 (AugMix) slot j belongs to chain ``j // depth`` with ``depth = J / k``; word 0 of block
    ``1 + J + c`` draws chain c's length, 1 + a number below ``depth``, and its word 1 below 4096 the entry
    of ``exponentials`` that becomes its weight. Word 1 of block 0 below 65537 is m, and 65536 - m the image's own
    weight; chain c has ``m * e[c] // sum(e)``, in int64, the last chain what is left of m. A pixel is
    ``(sum of weight * value) >> 16``.

    Attributes:
        size: (height, width) of the images that the tables are for.
        kinds: (S,) int32, one of the constants of rsengine.kernels.augment_tables.
        factors: (S,) float32, COLOR, CONTRAST, SHARPNESS: PIL's enhancement factor.
        lookups: (S,) int32, LOOKUP: a row of ``tables``.
        tables: (L, 256) uint8.
        fixed: (S, 6) int32, AFFINE, nearest: source x = (f0 * x + f1 * y + f2) >> 16, source y by f3, f4, f5.
        matrices: (S, 6) float64, AFFINE, bilinear: source x = m0 * (x + .5) + m1 * (y + .5) + m2, and so on.
        first, levels: (G, J, E) int32. gates: (G, J, E) int64, up to 2**32.
        exponentials: (4096,) int64, AugMix: equally probable values of Exp(1) in units of 2**-16.
        names: S readable labels.
    """

    size: tuple[int, int]
    kinds: np.ndarray
    factors: np.ndarray
    lookups: np.ndarray
    tables: np.ndarray
    fixed: np.ndarray
    matrices: np.ndarray
    first: np.ndarray
    levels: np.ndarray
    gates: np.ndarray
    exponentials: np.ndarray
    names: tuple[str, ...]
    chains: int

    @property
    def slots(self) -> int:
        return self.first.shape[1]


def compile_policy(policy: Policy, size: tuple[int, int]) -> Program:
    """The tables of ``policy`` for images of ``size`` (height, width), at least 1x1 and below 16384 a side."""
    if not all(1 <= side < 2**14 for side in size):
        raise SettingsError(f"image size: expected sides from 1 to {2**14 - 1}; got {size}")
    blocks: dict[Choice, int] = {}  # the first setting of each operation with its magnitudes
    settings: list[_Setting] = []

    def first(choice: Choice) -> int:
        block = Choice(choice.operation, choice.magnitudes)
        if block not in blocks:
            blocks[block] = len(settings)
            signs = (1, -1) if choice.signed else (1, 1)
            settings.extend(_setting(choice.operation, s * m, size) for m in choice.magnitudes for s in signs)
        return blocks[block]

    def table(of, dtype) -> np.ndarray:
        return np.array([[[of(choice) for choice in slot] for slot in group] for group in policy.groups], dtype)

    firsts = table(first, np.int32)
    tables, rows = np.unique(np.stack([s.table for s in settings]), axis=0, return_inverse=True)
    probability = (np.arange(4096) + 0.5) / 4096
    return Program(
        size=tuple(size),
        kinds=np.array([_KINDS[s.operation] for s in settings], np.int32),
        factors=np.array([1.0 + s.magnitude for s in settings], np.float32),
        lookups=rows.reshape(-1).astype(np.int32),
        tables=np.ascontiguousarray(tables),
        fixed=np.stack([_fixed_point(s.matrix) for s in settings]),
        matrices=np.array([s.matrix for s in settings], np.float64),
        first=firsts,
        levels=table(lambda c: len(c.magnitudes), np.int32),
        gates=table(lambda c: round(c.probability * 2**32), np.int64),
        exponentials=np.round(-np.log1p(-probability) * 65536).astype(np.int64),
        names=tuple(f"{s.operation} {s.magnitude:.3g}" if s.magnitude else s.operation for s in settings),
        chains=policy.chains,
    )


@dataclass(frozen=True)
class _Setting:
    operation: str
    magnitude: float
    matrix: tuple[float, ...]
    table: np.ndarray


_STILL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_VALUES = np.arange(256)
_VALUES.setflags(write=False)


def _setting(operation: str, magnitude: float, size: tuple[int, int]) -> _Setting:
    if operation not in _KINDS:
        raise ValueError(f"operation: expected one of {', '.join(_KINDS)}; got {operation!r}")
    matrix, table = _STILL, _VALUES
    if operation == "shear_x":
        matrix = (1.0, _tangent(magnitude), 0.0, 0.0, 1.0, 0.0)
    elif operation == "shear_y":
        matrix = (1.0, 0.0, 0.0, _tangent(magnitude), 1.0, 0.0)
    elif operation == "translate_x":
        matrix = (1.0, 0.0, -magnitude, 0.0, 1.0, 0.0)
    elif operation == "translate_y":
        matrix = (1.0, 0.0, 0.0, 0.0, 1.0, -magnitude)
    elif operation == "rotate":
        matrix = _rotation(magnitude, size)
    elif operation == "brightness":
        table = np.clip(np.float32(1.0 + magnitude) * _VALUES.astype(np.float32), 0, 255)
    elif operation == "posterize":
        table = _VALUES & ~(2 ** (8 - int(magnitude)) - 1)
    elif operation == "solarize":
        table = np.where(magnitude > _VALUES, _VALUES, 255 - _VALUES)
    elif operation == "solarize_add":
        table = np.where(_VALUES < 128, np.minimum(255, _VALUES + int(magnitude)), _VALUES)
    elif operation == "invert":
        table = 255 - _VALUES
    return _Setting(operation, magnitude, matrix, table.astype(np.uint8))


def _tangent(magnitude: float) -> float:
    """``magnitude`` by way of an angle in degrees, as torchvision passes it on."""
    return math.tan(math.radians(math.degrees(math.atan(magnitude))))


def _rotation(degrees: float, size: tuple[int, int]) -> tuple[float, ...]:
    """PIL's ``Image.rotate`` about the centre."""
    height, width = size
    angle = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cosine, sine, cosine * -x + sine * -y + 0.0 + x, -sine, cosine, -sine * -x + cosine * -y + 0.0 + y)


def _fixed_point(matrix: tuple[float, ...]) -> np.ndarray:
    """PIL's 16.16 fixed-point form of an affine map, from output pixel (x, y) to source pixel, nearest."""
    a, b, c, d, e, f = matrix
    if (a, b, d, e) == (1, 0, 0, 1):  # PIL moves whole pixels here, and rounds the shift down
        return np.array([65536, 0, math.floor(c + 0.5) * 65536, 0, 65536, math.floor(f + 0.5) * 65536], np.int32)
    numbers = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return np.array([math.floor(number * 65536.0 + 0.5) for number in numbers], np.int32)
