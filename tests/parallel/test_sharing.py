"""How an epoch is shared: its images, their looks and their batches do not depend on the number of processes."""

import numpy as np
import pytest
import torch

from rsengine.config import Recipe
from rsengine.data.beton.reader import BetonReader
from rsengine.device import Execution
from rsengine.errors import SettingsError
from rsengine.input.batches import open_batches
from rsengine.input.resident import load_resident
from rsengine.parallel.ranks import ALONE, Ranks, join
from tests.conftest import needs_ffcv

CPU = Execution(torch.device("cpu"), None, 1, "test")
KINDS = [pytest.param("ffcv", marks=needs_ffcv), "stream"]
COUNTS = [1, 2, 3, 4]
BATCH = 12  # which all of them divide; 147 images leave three of them out


def members(count):
    return [Ranks(rank, count, rank, count, "gloo") if count > 1 else ALONE for rank in range(count)]


def recipe_of(kind, *settings):
    common = [f"train.loader={kind}", f"train.batch_size={BATCH}", "train.seed=4", "train.epochs=3"]
    common += ["augment.cutout_holes=1", "augment.policy=randaugment", "train.eval_batch_size=5"]
    return Recipe().with_settings([*common, *settings])


def epochs_of(kind, dataset, count, epoch, start=0):
    """The batches of an epoch in each of ``count`` processes."""
    opened = [open_batches(recipe_of(kind), dataset, CPU, ranks) for ranks in members(count)]
    return [list(batches.train_epoch(epoch, start)) for batches in opened]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS[1:])
def test_the_parts_of_each_batch_are_that_of_one_process(toy_dataset, kind, count):
    """Pixels as they are augmented, and labels; in an epoch that begins in its middle too."""
    for start in (0, 4):
        (whole,) = epochs_of(kind, toy_dataset, 1, epoch=2, start=start)
        parts = epochs_of(kind, toy_dataset, count, epoch=2, start=start)
        assert [len(part) for part in parts] == [len(whole)] * count
        for number, (images, labels) in enumerate(whole):
            for rank, part in enumerate(parts):
                assert torch.equal(part[number][0], images[rank::count])
                assert torch.equal(part[number][1], labels[rank::count])


@pytest.mark.parametrize("count", COUNTS)
def test_resident_parts_are_those_of_the_stream(toy_dataset, count):
    recipe = recipe_of("resident", "augment.mixup_alpha=0.2")  # whose batches are not normalised yet
    parts = epochs_of("stream", toy_dataset, count, epoch=1)
    for ranks, part in zip(members(count), parts, strict=True):
        resident = load_resident(toy_dataset, recipe, CPU, ranks)
        first = resident.steps_per_epoch
        for number, (images, labels) in enumerate(part):
            got = resident(torch.tensor(first + number))
            assert torch.equal(got[0], images) and torch.equal(got[1], labels)


@pytest.mark.parametrize("kind", [*KINDS, "resident"])
@pytest.mark.parametrize("count", COUNTS)
def test_each_test_image_is_in_one_process(toy_dataset, kind, count):
    """21 images, which neither the numbers of processes nor the batches divide."""
    reader = BetonReader(toy_dataset.test_beton)
    expected = np.stack([reader.image(i) for i in range(len(reader))])
    for ranks in members(count):
        batches = list(open_batches(recipe_of(kind), toy_dataset, CPU, ranks).test_epoch())
        assert all(0 < len(images) <= 5 for images, _ in batches)
        assert all(len(images) == 5 for images, _ in batches[:-1])
        np.testing.assert_array_equal(torch.cat([b[0] for b in batches]).numpy(), expected[ranks.rank :: count])
        np.testing.assert_array_equal(torch.cat([b[1] for b in batches]), reader.labels[ranks.rank :: count])


@pytest.mark.parametrize("kind", [*KINDS, "resident"])
def test_a_process_without_a_test_image_has_no_batch(toy_dataset, kind):
    last = members(24)[20:]  # the processes of ranks 20 to 23, of 21 images
    opened = [open_batches(recipe_of(kind, "train.batch_size=48"), toy_dataset, CPU, ranks) for ranks in last]
    assert [len(list(batches.test_epoch())) for batches in opened] == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", [*KINDS, "resident"])
def test_a_batch_that_cannot_be_divided_is_refused(toy_dataset, kind):
    with pytest.raises(SettingsError, match=r"train.batch_size: expected a multiple of the 5 processes; got 12; .*=10"):
        open_batches(recipe_of(kind), toy_dataset, CPU, members(5)[0])
    with pytest.raises(SettingsError, match="train.micro_batches: expected a divisor of the 3 images"):
        open_batches(recipe_of(kind, "train.micro_batches=2"), toy_dataset, CPU, members(4)[0])
    with pytest.raises(SettingsError, match="at least 2 to each"):
        open_batches(recipe_of(kind), toy_dataset, CPU, members(12)[0])


def test_previous_images_of_one_process_are_the_batch_rolled():
    images = torch.arange(6)
    assert ALONE.previous(images).tolist() == [5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: expected a number in this environment variable"),
        ({"RANK": "0"}, "WORLD_SIZE: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK: expected a number"),
    ],
)
def test_wrong_variables_are_named(environment, message):
    with pytest.raises(SettingsError, match=message):
        join("cpu", environment)


def test_without_the_variables_a_run_is_alone():
    assert join("cpu", {}) is ALONE
