"""The tables of policies and magnitudes against torchvision's and timm's, and what is compiled from them."""

import numpy as np
import pytest
from timm.data import auto_augment as timm_augment
from torchvision.transforms import autoaugment as theirs

from rsengine.augment import policies
from rsengine.augment.program import compile_policy
from rsengine.config import AugmentSection, RecipeError, load_recipe

SIZE = (32, 40)
NAMES = {"shearx": "shear_x", "sheary": "shear_y", "translatex": "translate_x", "translatey": "translate_y"}


def our_name(name):
    return NAMES.get(name.lower(), name.lower())


def close(values):
    """To float32's last bit: processors without fused multiply-add round PyTorch's linspace otherwise."""
    return pytest.approx(values, rel=2e-7)


def our_magnitudes(name, magnitudes):
    values = magnitudes.tolist() if magnitudes.ndim else [0.0]
    return [int(v) for v in values] if name.startswith("Translate") else values  # whole pixels where they are applied


@pytest.mark.parametrize("name", policies.AUTOAUGMENT_NAMES)
def test_autoaugment_is_torchvisions(name):
    other = theirs.AutoAugment(theirs.AutoAugmentPolicy(name))
    space = other._augmentation_space(10, SIZE)
    groups = policies.autoaugment(SIZE, name).groups
    assert len(groups) == len(other.policies) == 25
    for group, sub_policy in zip(groups, other.policies, strict=True):
        for (choice,), (operation, probability, level) in zip(group, sub_policy, strict=True):
            magnitudes, signed = space[operation]
            expected = our_magnitudes(operation, magnitudes)[level or 0]
            assert (choice.operation, choice.probability) == (our_name(operation), probability)
            assert choice.magnitudes == (close(expected),)
            assert choice.signed == signed


def assert_same_space(policy, space, keep=slice(None)):
    for slot in policy.groups[0]:
        assert {c.operation for c in slot} == {our_name(name) for name in space}
        for choice in slot:
            (name,) = [name for name in space if our_name(name) == choice.operation]
            magnitudes, signed = space[name]
            assert list(choice.magnitudes) == close(our_magnitudes(name, magnitudes)[keep])
            assert choice.signed == signed and choice.probability == 1


@pytest.mark.parametrize("magnitude", range(31))
def test_randaugment_is_torchvisions(magnitude):
    policy = policies.randaugment(SIZE, 3, magnitude)
    space = theirs.RandAugment()._augmentation_space(31, SIZE)
    assert policy.slots == 3
    for choice in policy.groups[0][0]:
        (name,) = [name for name in space if our_name(name) == choice.operation]
        magnitudes = our_magnitudes(name, space[name][0])
        assert choice.magnitudes == (close(magnitudes[magnitude if len(magnitudes) > 1 else 0]),)
    assert {c.operation for c in policy.groups[0][0]} == {our_name(name) for name in space}


def test_trivialaugment_is_torchvisions():
    assert_same_space(policies.trivialaugment(SIZE), theirs.TrivialAugmentWide()._augmentation_space(31))


def test_augmix_is_torchvisions():
    policy = policies.augmix(SIZE, severity=3, width=3, depth=3)
    assert policy.chains == 3 and policy.slots == 9
    assert_same_space(policy, theirs.AugMix()._augmentation_space(10, SIZE), keep=slice(3))


@pytest.mark.parametrize("level", [0, 1, 3.7, 5, 9, 10])
def test_the_increasing_variant_is_timms(level, monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value)
    ours = {c.operation: c for c in policies.randaugment(SIZE, magnitude=level, increasing=True).groups[0][0]}
    named = {
        "TranslateXRel": "translate_x",
        "TranslateYRel": "translate_y",
        "SolarizeAdd": "solarize_add",
        "SolarizeIncreasing": "solarize",
        "PosterizeIncreasing": "posterize",
    }
    assert len(ours) == len(timm_augment._RAND_INCREASING_TRANSFORMS)
    for name in timm_augment._RAND_INCREASING_TRANSFORMS:
        choice = ours[named.get(name) or our_name(name.removesuffix("Increasing"))]
        assert choice.probability == 0.5
        argument = timm_augment.LEVEL_TO_ARG[name]
        if argument is not None:
            (value,) = argument(level, {})
            value *= {"TranslateXRel": SIZE[1], "TranslateYRel": SIZE[0]}.get(name, 1)
            value -= name.removesuffix("Increasing") in ("Color", "Contrast", "Brightness", "Sharpness")
            assert choice.magnitudes == (pytest.approx(value, abs=1e-12),)


def test_the_magnitude_noise_is_normal_and_cut():
    levels = np.array(policies.noisy_levels(9, 0.5, 10))
    assert levels.max() == 10 and abs(levels.mean() - 9) < 0.01
    inside = levels < 10  # one in 44 lies above
    assert np.mean(~inside) == pytest.approx(0.0228, abs=0.001)
    assert np.mean(levels < 9) == 0.5 and np.mean(levels < 8.5) == pytest.approx(0.1587, abs=0.001)
    whole = {m for c in policies.randaugment(SIZE, magnitude_std=2.0).groups[0][0] for m in c.magnitudes}
    bins = {m for of in policies.autoaugment_ranges(SIZE, 31).values() for m in of}
    assert whole < bins


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: policies.autoaugment(SIZE, "mnist"), "cifar10, imagenet, svhn; got 'mnist'"),
        (lambda: policies.randaugment(SIZE, 0), "num_ops >= 1"),
        (lambda: policies.randaugment(SIZE, magnitude=31), "magnitude from 0 to 30"),
        (lambda: policies.randaugment(SIZE, magnitude=11, increasing=True), "magnitude from 0 to 10"),
        (lambda: policies.randaugment(SIZE, magnitude=2.5), "whole magnitude"),
        (lambda: policies.augmix(SIZE, 11), "severity from 1 to 10"),
        (lambda: compile_policy(policies.trivialaugment(SIZE), (0, 3)), "sides from 1"),
    ],
)
def test_wrong_numbers_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("name", policies.POLICIES)
def test_every_name_in_a_recipe_gives_its_policy(name):
    policy = policies.policy_of(AugmentSection(policy=name), SIZE)
    assert (policy is None) == (name == "none")
    if policy is not None:
        program = compile_policy(policy, SIZE)
        ends = program.first + 2 * program.levels
        assert ends.max() == len(program.kinds) == len(program.names)
        assert program.lookups.max() < len(program.tables)


def test_a_recipe_refuses_settings_that_do_not_go_together():
    recipe = load_recipe("quickstart")
    with pytest.raises(RecipeError, match="alternating_flip: needs augment.flip=true"):
        recipe.with_settings(["augment.flip=false", "augment.alternating_flip=true"])
    with pytest.raises(RecipeError, match="magnitude from 0 to 10; got 2, 31, 0.0, 12"):
        recipe.with_settings(
            ["augment.policy=randaugment", "augment.randaugment_increasing=true", "augment.randaugment_magnitude=12"]
        )
