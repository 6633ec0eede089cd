"""Over 100,000 images, operations, magnitudes and signs come as often as each policy's definition says."""

import numpy as np
import pytest
from numba import njit
from scipy.stats import chi2_contingency, chisquare

from rsengine.augment import policies
from rsengine.augment.describe import describe
from rsengine.augment.operations import PolicyOperation
from rsengine.augment.policy_loop import augmix_weights, chain_length, draw_group, draw_setting
from rsengine.augment.program import compile_policy

SIZE, IMAGES, SEED, EPOCH = (32, 32), 100_000, 20, 3
P_VALUE = 1e-4  # of a fixed seed: it passes for ever or it is wrong
POLICIES = [
    *(policies.autoaugment(SIZE, name) for name in policies.AUTOAUGMENT_NAMES),
    policies.randaugment(SIZE),
    policies.randaugment(SIZE, 3, 7, magnitude_std=1.5),
    policies.randaugment(SIZE, 2, 9, magnitude_std=0.5, increasing=True),
    policies.trivialaugment(SIZE),
    policies.augmix(SIZE),
]


@njit
def draw_all(count, first, levels, gates):
    """(count, 1 + slots): the group and each slot's setting, or -1."""
    groups, slots, _ = first.shape
    out = np.empty((count, 1 + slots), np.int64)
    for i in range(count):
        out[i, 0] = draw_group(SEED, i, EPOCH, groups)
        for slot in range(slots):
            out[i, 1 + slot] = draw_setting(SEED, i, EPOCH, out[i, 0], slot, first, levels, gates)
    return out


@pytest.fixture(scope="module", params=POLICIES, ids=lambda policy: f"{policy.name}-{policy.slots}")
def drawn(request):
    program = compile_policy(request.param, SIZE)
    return request.param, program, draw_all(IMAGES, program.first, program.levels, program.gates)


def definition(policy, program, group, slot):
    """Setting -> probability in a slot of a group, from the policy itself; -1: none is applied."""
    choices = policy.groups[group][slot]
    expected = {}
    for e, choice in enumerate(choices):
        expected[-1] = expected.get(-1, 0) + (1 - choice.probability) / len(choices)
        each = choice.probability / len(choices) / len(choice.magnitudes) / 2
        for k in range(2 * len(choice.magnitudes)):
            setting = int(program.first[group, slot, e]) + k
            expected[setting] = expected.get(setting, 0) + each
    return {setting: probability for setting, probability in expected.items() if probability > 0}


def assert_distributed(values, expected):
    seen = dict(zip(*np.unique(values, return_counts=True), strict=True))
    assert set(seen) <= set(expected)
    kinds = sorted(expected)
    counts = np.array([seen.get(kind, 0) for kind in kinds])
    wanted = np.array([expected[kind] for kind in kinds]) * len(values)
    assert wanted.sum() == pytest.approx(len(values))
    if wanted.min() < 5:  # magnitudes in a thousand levels: the test needs cells of some size
        order = np.arange(len(kinds)) * 40 // len(kinds)
        counts, wanted = np.bincount(order, counts), np.bincount(order, wanted)
    if len(counts) > 1:
        assert chisquare(counts, wanted).pvalue > P_VALUE


def test_groups_are_equally_likely(drawn):
    policy, _, draws = drawn
    groups = len(policy.groups)
    assert_distributed(draws[:, 0], {g: 1 / groups for g in range(groups)})


def test_settings_come_as_often_as_defined(drawn):
    policy, program, draws = drawn
    for group in range(len(policy.groups)):
        rows = draws[draws[:, 0] == group]
        for slot in range(policy.slots):
            assert_distributed(rows[:, 1 + slot], definition(policy, program, group, slot))


def test_operations_and_signs_come_as_often_as_defined(drawn):
    """As above, but by what an operation is and not by its number in the tables."""
    policy, program, draws = drawn
    names = np.array([name.split()[0] for name in program.names] + ["none"])  # setting -1 is the last
    slots = draws[:, 1:]
    expected = dict.fromkeys(names, 0.0)
    for group in policy.groups:
        for slot in group:
            share = 1 / len(policy.groups) / policy.slots / len(slot)
            for choice in slot:
                # Unsigned magnitudes all have one name; those of 0 do too.
                expected[choice.operation] += share * choice.probability
                expected["none"] += share * (1 - choice.probability)
    seen = {name: np.mean(names[slots] == name) for name in expected}
    for name, share in expected.items():
        assert seen[name] == pytest.approx(share, abs=5 * np.sqrt(share / slots.size) + 1e-9), name
    odd = slots[slots >= 0] % 2  # settings come in pairs of either sign, and every first one is even
    assert (program.first % 2 == 0).all()
    assert chisquare(np.bincount(odd)).pvalue > P_VALUE


def test_slots_are_independent(drawn):
    policy, _, draws = drawn
    if policy.slots < 2:
        return
    within = []  # groups make the slots of AutoAugment dependent; within one they are not
    for group in range(len(policy.groups)):
        rows = draws[draws[:, 0] == group]
        table = np.zeros((8, 8), int)
        np.add.at(table, (rows[:, 1] % 8, rows[:, 2] % 8), 1)
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        if min(table.shape) > 1:
            within.append(chi2_contingency(table).pvalue)
    assert not within or min(within) > P_VALUE / len(within)


def test_augmix_lengths_and_weights():
    program = compile_policy(policies.augmix(SIZE), SIZE)
    lengths = np.array([[chain_length(SEED, i, EPOCH, 9, 3, c) for c in range(3)] for i in range(20_000)])
    for column in lengths.T:
        assert chisquare(np.bincount(column, minlength=4)[1:]).pvalue > P_VALUE
    weights = np.empty((20_000, 4), np.int64)
    for i, row in enumerate(weights):
        augmix_weights(SEED, i, EPOCH, 9, 3, program.exponentials, row)
    assert (weights.sum(1) == 65536).all()
    shares = 1 - weights[:, 0] / 65536
    assert chisquare(np.histogram(shares, 20, (0, 1))[0]).pvalue > P_VALUE  # Beta(1, 1)
    rows = weights[shares > 0.01]
    first = rows[:, 1] / rows[:, 1:].sum(1)  # one of Dirichlet(1, 1, 1) is Beta(1, 2): P(below x) = 1 - (1 - x)²
    edges = 1 - np.sqrt(1 - np.linspace(0, 1, 21))
    assert chisquare(np.histogram(first, edges)[0]).pvalue > P_VALUE


def test_the_words_say_what_is_done():
    """Where describe names nothing the image stays, and where it names an inversion alone the image is inverted."""
    operation = PolicyOperation(lambda size: policies.autoaugment(size, "svhn"), seed=SEED)
    images = np.random.default_rng(0).integers(0, 256, (400, *SIZE, 3), dtype=np.uint8)
    out = operation.apply(images.copy(), np.arange(400))
    words = [describe(operation.program(SIZE), SEED, 0, i) for i in range(400)]
    untouched = [i for i, names in enumerate(words) if not names]
    inverted = [i for i, names in enumerate(words) if names == ["invert"]]
    assert len(untouched) > 10 and len(inverted) > 10
    assert (out[untouched] == images[untouched]).all() and (out[inverted] == 255 - images[inverted]).all()
    assert any("shear_x -0.1" in name for names in words for name in names)
    chains = describe(compile_policy(policies.augmix(SIZE), SIZE), SEED, 0, 5)
    assert len(chains) == 3 and all("%" in chain for chain in chains)
