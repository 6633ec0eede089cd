"""The augmentations in FFCV's own loaders: the bytes that they give without it, at each of its passes."""

import os

import numba as nb
import numpy as np
import pytest

import rsengine.augment
from rsengine.augment import AlternatingFlip, AutoAugment, Cutout, HorizontalFlip, RandomCrop
from rsengine.data.beton.reader import BetonReader
from rsengine.device import preserved_threads
from tests.conftest import needs_ffcv

pytestmark = needs_ffcv


def for_ffcv(operations):
    return rsengine.augment.for_ffcv(operations)  # imports FFCV


def example():
    """The loop in the package's documentation, as code."""
    text = rsengine.augment.__doc__
    lines = text[text.index("    from ffcv.fields") : text.index("Each pass of a loader")].splitlines()
    return "\n".join(line[4:] for line in lines)


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.skipif(os.cpu_count() < 2, reason="one core"))]
)
def test_the_documented_example_runs_and_gives_the_same_with_any_number_of_workers(toy_dataset, workers):
    code = example().replace('"train.beton"', repr(str(toy_dataset.train_beton))).replace("range(10)", "range(2)")
    code = code.replace("OrderOption.RANDOM", "OrderOption.SEQUENTIAL").replace("batch_size=128", "batch_size=30")
    code = code.replace("num_workers=2", f"num_workers={workers}").replace("...", "seen.append(images.numpy().copy())")
    seen = []
    with preserved_threads():
        exec(code, {"seen": seen})
    assert len(seen) == 10
    reader = BetonReader(toy_dataset.train_beton)
    indices = np.arange(150)
    for epoch in range(2):
        expected = np.stack([reader.image(i) for i in indices])
        for operation in (RandomCrop(4), HorizontalFlip(), AutoAugment("cifar10"), Cutout(4, 4)):
            expected = operation.apply(expected, indices, epoch)
        assert (np.concatenate(seen[5 * epoch : 5 * epoch + 5]) == expected).all()


def passes(loader, count):
    """The images of so many passes of one of FFCV's loaders."""
    with preserved_threads():
        return [np.concatenate([images.numpy().copy() for images, _ in loader]) for _ in range(count)]


def loader_of(dataset, operations, **options):
    """One of FFCV's own loaders, over the training set. ``operations``: FFCV's."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    pipelines = {"image": [SimpleRGBImageDecoder(), *operations, ToTensor()], "label": [IntDecoder(), ToTensor()]}
    with preserved_threads():
        return Loader(str(dataset.train_beton), batch_size=30, num_workers=1, pipelines=pipelines, **options)


AUGMENTATIONS = [RandomCrop(4, seed=3), AlternatingFlip(seed=3), AutoAugment(seed=3), Cutout(seed=3)]


def operations():
    return for_ffcv(AUGMENTATIONS)


@pytest.fixture(scope="module")
def epochs(toy_dataset):
    """The images of some epochs, augmented without FFCV."""
    reader, indices = BetonReader(toy_dataset.train_beton), np.arange(150)
    originals = np.stack([reader.image(i) for i in indices])
    found = {}
    for epoch in (0, 1, 2, 7, 8):
        found[epoch] = originals.copy()
        for operation in AUGMENTATIONS:
            operation.apply(found[epoch], indices, epoch)
    return found


@pytest.mark.parametrize("recompile", [False, True])
def test_each_pass_of_ffcvs_loader_is_the_next_epoch(toy_dataset, epochs, recompile):
    found = passes(loader_of(toy_dataset, operations(), recompile=recompile), 3)
    for epoch, images in enumerate(found):
        assert (images == epochs[epoch]).all()
    assert ((found[0] != found[1]).any(axis=(1, 2, 3))).mean() > 0.9  # of the images


def test_a_loader_that_goes_on_at_a_later_epoch_takes_the_augmentations_along(toy_dataset, epochs):
    loader = loader_of(toy_dataset, operations())
    loader.next_epoch = 7
    for epoch, images in zip((7, 8), passes(loader, 2), strict=True):
        assert (images == epochs[epoch]).all()


def test_an_epoch_that_is_set_wins_and_is_counted_on_from(toy_dataset, epochs):
    chosen = operations()
    loader = loader_of(toy_dataset, chosen)
    for wanted, count in (((7, 8), 2), ((1,), 1), ((1, 2), 2)):
        for operation in chosen:
            operation.epoch = wanted[0]
        for epoch, images in zip(wanted, passes(loader, count), strict=True):
            assert (images == epochs[epoch]).all()
    assert [operation.epoch for operation in chosen] == [1] * 4  # what was set last


def test_a_pass_that_is_left_early_is_counted_and_disturbs_no_other(toy_dataset, epochs):
    loader = loader_of(toy_dataset, operations(), batches_ahead=1)
    with preserved_threads():
        left = iter(loader)
        first = next(left)[0].numpy().copy()
    (second,) = passes(loader, 1)
    with preserved_threads():
        rest = [images.numpy().copy() for images, _ in left]  # its thread still had batches to make
    assert (np.concatenate([first, *rest]) == epochs[0]).all() and (second == epochs[1]).all()


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_loaders_leave_numbas_shared_types_as_they_were(toy_dataset, os_cache):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    shared = [nb.uint8[::1], nb.uint8[:, ::1], nb.uint64[::1], nb.uint32[::1]]
    before = [hash(one) for one in shared]
    with preserved_threads():
        loader = Loader(
            str(toy_dataset.test_beton), batch_size=4, num_workers=1, os_cache=os_cache, pipelines=pipelines
        )
        images, _ = next(iter(loader))
        images = images.copy()
    assert [hash(one) for one in shared] == before
    assert all(one.mutable for one in shared)
    assert (images[1] == BetonReader(toy_dataset.test_beton).image(1)).all()
