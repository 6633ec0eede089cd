"""Every operation at every magnitude against torchvision on PIL images, timm and Pillow: identical bytes."""

import functools
import os

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment as timm_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms import autoaugment as theirs

from rsengine.augment import policies
from rsengine.augment.pixels import apply_setting
from rsengine.augment.policies import Choice, Policy
from rsengine.augment.policy_loop import augmix_weights, chain_length, draw_setting, program_arrays, run_augmix
from rsengine.augment.program import compile_policy
from rsengine.data import find_dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.kernels.augment_tables import IDENTITY

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
THEIR_NAMES = {"autocontrast": "AutoContrast"} | {
    name: name.title().replace("_", "")
    for name in (*GEOMETRIC, "brightness", "color", "contrast", "sharpness", "posterize", "solarize", "equalize")
    + ("invert", "identity")
}
SIZES = [(32, 32), (33, 21), (1, 1), (2, 2), (7, 5), (1, 9), (64, 40)]
RANGES = {
    "autoaugment": lambda size: policies.autoaugment_ranges(size, 10),
    "randaugment": lambda size: policies.autoaugment_ranges(size, 31),
    "wide": lambda size: policies.wide_ranges(31),
    "augmix": policies.augmix_ranges,
}


def adversarial(size):
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(size[0]) * 3, np.arange(size[1]) * 2)[..., None] + np.array([10, 60, 90])
    levels = np.array([3, 200], np.uint8)
    return {
        "noise": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "ramp": np.clip(ramp, 0, 255).astype(np.uint8),
        "two levels": rng.choice(levels, (*size, 3)),
        "constant": np.full((*size, 3), 77, np.uint8),
        "dark": rng.integers(0, 3, (*size, 3), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """CIFAR-10 where RSENGINE_DATA names it, scikit-learn's digits elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("RSENGINE_CACHE"):
            patch.setenv("RSENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = find_dataset(None if os.environ.get("RSENGINE_DATA") else "digits", log=lambda line: None)
        reader = BetonReader(dataset.train_beton)
        return [reader.image(i).copy() for i in range(0, len(reader), len(reader) // 6)]


@functools.cache
def program_of(operation, magnitude, size):
    return compile_policy(Policy("one", (((Choice(operation, (magnitude,)),),),)), size)


def applied(image, operation, magnitude, bilinear=False, fill=(0, 0, 0)):
    """One operation at a signed magnitude, through the compiled tables."""
    program = program_of(operation, magnitude, image.shape[:2])
    if program.kinds[0] == IDENTITY:
        return image
    out = np.full_like(image, 123)
    table, room = program.tables[program.lookups[0]], (np.empty(256, np.uint8), np.empty(256, np.int64))
    setting = program.kinds[0], program.factors[0], table, program.fixed[0], program.matrices[0]
    apply_setting(image, out, *setting, bilinear, np.array(fill, np.uint8), *room)
    return out


def torchvisions(image, operation, magnitude, bilinear=False, fill=None):
    if operation == "posterize" and magnitude == 0:
        return np.zeros_like(image)  # what torchvision makes of tensors; Pillow refuses to keep no bit
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.NEAREST
    return np.asarray(theirs._apply_op(Image.fromarray(image), THEIR_NAMES[operation], magnitude, mode, fill))


def every_magnitude(operation, ranges):
    for magnitude in dict.fromkeys(ranges[operation]):
        yield magnitude
        if magnitude and Choice(operation).signed:
            yield -magnitude


@pytest.mark.parametrize("operation", THEIR_NAMES)
@pytest.mark.parametrize("space", RANGES)
def test_every_magnitude_is_torchvisions_on_adversarial_images(operation, space):
    for size in SIZES:
        ranges = RANGES[space](size)
        for magnitude in every_magnitude(operation, ranges) if operation in ranges else ():
            for name, image in adversarial(size).items():
                expected = torchvisions(image, operation, magnitude)
                assert (applied(image, operation, magnitude) == expected).all(), (size, magnitude, name)


@pytest.mark.parametrize("operation", GEOMETRIC)
@pytest.mark.parametrize("space", ["randaugment", "wide"])
def test_bilinear_is_torchvisions_and_so_is_the_fill(operation, space):
    for size in SIZES:
        for magnitude in every_magnitude(operation, RANGES[space](size)):
            for name, image in adversarial(size).items():
                for bilinear, fill in ((True, None), (True, (9, 200, 30)), (False, (9, 200, 30))):
                    expected = torchvisions(image, operation, magnitude, bilinear, fill)
                    ours = applied(image, operation, magnitude, bilinear, fill or (0, 0, 0))
                    assert (ours == expected).all(), (size, magnitude, name, bilinear, fill)


@pytest.mark.parametrize("operation", THEIR_NAMES)
def test_every_magnitude_is_torchvisions_on_photographs(operation, photographs):
    for image in photographs:
        for space in RANGES.values():
            ranges = space(image.shape[:2])
            for magnitude in every_magnitude(operation, ranges) if operation in ranges else ():
                for bilinear in (False, True) if operation in GEOMETRIC else (False,):
                    expected = torchvisions(image, operation, magnitude, bilinear)
                    assert (applied(image, operation, magnitude, bilinear) == expected).all(), (magnitude, bilinear)


@pytest.mark.parametrize("operation", THEIR_NAMES)
def test_images_of_imagenets_size(operation, photographs):
    size = (224, 224)
    large = np.asarray(Image.fromarray(photographs[0]).resize(size, Image.Resampling.BICUBIC))
    ranges = policies.autoaugment_ranges(size, 31)
    for magnitude in list(every_magnitude(operation, ranges))[::7]:
        for image in (large, adversarial(size)["noise"]):
            for bilinear in (False, True) if operation in GEOMETRIC else (False,):
                assert (
                    applied(image, operation, magnitude, bilinear)
                    == torchvisions(image, operation, magnitude, bilinear)
                ).all()


@pytest.mark.parametrize("degrees", [45, 89.5, 90, 135, 180, 270, 360, 405])
@pytest.mark.parametrize("size", [(32, 32), (32, 20)])
def test_rotations_beyond_any_policy_are_pillows(degrees, size):
    image = adversarial(size)["noise"]
    for bilinear, mode in ((False, Image.Resampling.NEAREST), (True, Image.Resampling.BILINEAR)):
        expected = np.asarray(Image.fromarray(image).rotate(degrees, mode))
        assert (applied(image, "rotate", degrees, bilinear) == expected).all()


@pytest.mark.parametrize("level", [0, 1, 3.7, 5, 9, 10])
def test_timms_increasing_operations(level, monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value)
    size = (32, 20)
    pairs = {"TranslateXRel": "translate_x", "TranslateYRel": "translate_y", "SolarizeAdd": "solarize_add"}
    ranges = policies.timm_ranges(size, (level,))
    for name in timm_augment._RAND_INCREASING_TRANSFORMS:
        plain = name.removesuffix("Increasing")
        operation = pairs.get(name) or {v: k for k, v in THEIR_NAMES.items()}[plain]
        options = {"resample": Image.Resampling.NEAREST, "fillcolor": (0, 0, 0)}
        levels = timm_augment.LEVEL_TO_ARG[name]
        arguments = levels(level, {}) if levels else ()
        if name == "PosterizeIncreasing" and arguments == (0,):
            continue  # Pillow refuses to keep no bit
        for kind, image in adversarial(size).items():
            expected = np.asarray(timm_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))
            # timm rotates, shears and shifts the other way round for the same number; either sign is as likely.
            signs = {m * s for m in ranges[operation] for s in (1, -1)} if operation in GEOMETRIC else ranges[operation]
            assert any((applied(image, operation, m) == expected).all() for m in signs), (name, kind)


def test_pillow_itself():
    """torchvision stands between us and Pillow above; here nothing does."""
    image = adversarial((32, 32))["noise"]
    pil = Image.fromarray(image)
    for operation, enhance in (("color", ImageEnhance.Color), ("sharpness", ImageEnhance.Sharpness)):
        assert (applied(image, operation, 0.37) == np.asarray(enhance(pil).enhance(1.37))).all()
    assert (applied(image, "equalize", 0) == np.asarray(ImageOps.equalize(pil))).all()
    assert (applied(image, "solarize_add", 60) == np.where(image < 128, np.minimum(image + 60.0, 255), image)).all()


def test_augmix_is_the_weighted_sum_of_its_chains():
    size, seed, epoch = (32, 32), 3, 1
    program = compile_policy(policies.augmix(size), size)
    tables, names = program_arrays(program), program.names
    images = np.stack([adversarial(size)["noise"], adversarial(size)["ramp"]] * 8)
    indices = np.arange(16)
    ours = images.copy()
    run_augmix(ours, indices, seed, epoch, tables, program.chains, False, np.zeros(3, np.uint8))
    for i, image in enumerate(images):
        weights = np.empty(4, np.int64)
        augmix_weights(seed, i, epoch, program.slots, 3, program.exponentials, weights)
        assert weights.sum() == 65536 and weights.min() >= 0
        mix = image * (weights[0] / 65536)
        for chain in range(3):
            changed = image
            for slot in range(3 * chain, 3 * chain + chain_length(seed, i, epoch, 9, 3, chain)):
                setting = draw_setting(seed, i, epoch, 0, slot, program.first, program.levels, program.gates)
                operation, _, magnitude = names[setting].partition(" ")
                choice = next(c for c in policies.augmix(size).groups[0][0] if c.operation == operation)
                exact = [s * m for m in choice.magnitudes for s in (1, -1)]
                magnitude = min(exact, key=lambda m: abs(m - float(magnitude or 0)))  # the name is rounded
                changed = torchvisions(changed, operation, magnitude)
            mix = mix + changed * (weights[1 + chain] / 65536)
        assert (ours[i] == np.floor(mix + 1e-6)).all()
