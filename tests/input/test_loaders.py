"""The loaders of a .beton: right, reproducible from any point, with the traps of threads closed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rsengine.augment import HorizontalFlip, RandomCrop, SeededOperation
from rsengine.config import Recipe
from rsengine.data.beton.reader import BetonReader
from rsengine.device import choose_execution
from rsengine.errors import LoaderError, SettingsError
from rsengine.input.batches import open_batches
from rsengine.input.choose import choose_loader
from tests.conftest import needs_ffcv

KINDS = [pytest.param("ffcv", marks=needs_ffcv), "stream"]


@pytest.fixture(params=KINDS)
def kind(request):
    """A class of loaders."""
    return choose_loader(request.param).open


def collect(loader, *arguments, **options):
    batches = list(loader.epoch(*arguments, **options))
    return [b[0] for b in batches], [b[1] for b in batches]


def test_in_order_it_gives_every_image_of_the_file_and_the_last_partial_batch(toy_dataset, kind):
    images, labels = collect(kind(toy_dataset.test_beton, 10))
    assert [len(x) for x in images] == [10, 10, 1]
    reader = BetonReader(toy_dataset.test_beton)
    assert (torch.cat(labels).numpy() == reader.labels).all()
    assert (torch.cat(images).numpy() == np.stack([reader.image(i) for i in range(21)])).all()
    assert images[0].dtype == torch.uint8 and images[0].shape == (10, 32, 32, 3) and labels[0].dtype == torch.int64


def training_loader(kind, dataset, seed=0):
    operations = [RandomCrop(4, seed=seed), HorizontalFlip(seed=seed)]
    return kind(dataset.train_beton, 16, augmentations=operations, shuffle=True, drop_last=True, seed=seed)


def test_the_same_seed_gives_the_same_epochs_and_another_seed_others(toy_dataset, kind):
    first, second = training_loader(kind, toy_dataset), training_loader(kind, toy_dataset)
    assert len(first) == 9
    one = [torch.cat(collect(first, epoch)[0]) for epoch in (0, 1)]
    two = [torch.cat(collect(second, epoch)[0]) for epoch in (0, 1)]
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], torch.cat(collect(training_loader(kind, toy_dataset, seed=1), 0)[0]))


def test_an_epoch_can_begin_in_the_middle(toy_dataset, kind):
    loader = training_loader(kind, toy_dataset)
    whole, rest = collect(loader, 3), collect(loader, 3, start=5)
    assert len(rest[0]) == 4
    for a, b in zip(whole[0][5:] + whole[1][5:], rest[0] + rest[1], strict=True):
        assert torch.equal(a, b)


def test_an_epoch_has_no_image_twice(toy_dataset, kind):
    plain = kind(toy_dataset.train_beton, 16, shuffle=True, drop_last=True)
    images = torch.cat(collect(plain, 0)[0])
    assert len({bytes(image.numpy().tobytes()) for image in images}) == 144


def test_batches_stay_what_they_were(toy_dataset, kind):
    """FFCV hands out views of a ring of five buffers."""
    loader = kind(toy_dataset.train_beton, 8)
    kept = []
    for images, _ in loader.epoch():
        kept.append((images, images.clone()))
    assert len(kept) == 19 and all(torch.equal(a, b) for a, b in kept)


def test_torch_keeps_its_threads_and_the_loader_none(toy_dataset, kind):
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    try:
        loader = training_loader(kind, toy_dataset)
        iterator = loader.epoch()
        next(iterator)
        assert torch.get_num_threads() == 2
        iterator.close()  # leaving early
        assert threading.active_count() == running
        list(loader.epoch(1))
        assert torch.get_num_threads() == 2 and threading.active_count() == running
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("taken", range(7))
def test_a_loop_can_be_left_after_any_number_of_batches(toy_dataset, kind, taken):
    """FFCV's thread waits for room to say that an epoch is over, even if nobody will take what fills its queue."""
    batches = kind(toy_dataset.train_beton, 25).epoch()
    for _ in range(taken):
        next(batches, None)
    time.sleep(0.05)  # for the thread to get as far as it can
    leaving = threading.Thread(target=batches.close, daemon=True)
    leaving.start()
    leaving.join(timeout=20)
    assert not leaving.is_alive()


@needs_ffcv
def test_importing_the_loader_leaves_torchs_threads_alone():
    code = (
        "import torch; torch.set_num_threads(2); import rsengine.input.ffcv_loader; assert torch.get_num_threads() == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Broken(SeededOperation):
    def apply(self, images, indices, epoch=0):
        raise RuntimeError("this operation is broken\non purpose")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dying_pipeline_is_an_error_and_not_an_endless_wait(toy_dataset, kind):
    loader = kind(toy_dataset.train_beton, 16, augmentations=[Broken()])
    with pytest.raises(LoaderError, match="ended early"):
        list(loader.epoch())


def test_fewer_images_than_a_batch_is_an_error(toy_dataset, kind):
    with pytest.raises(LoaderError, match="150 images cannot fill one batch of 200"):
        kind(toy_dataset.train_beton, 200, drop_last=True)


class Slow(SeededOperation):
    def apply(self, images, indices, epoch=0):
        time.sleep(0.3)
        return images


def test_ctrl_c_ends_a_loop_and_its_thread(toy_dataset, kind):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    running = threading.active_count()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))  # while the first batch is awaited
    batches = kind(toy_dataset.train_beton, 50, augmentations=[Slow()]).epoch()
    try:
        with pytest.raises(KeyboardInterrupt), contextlib.closing(batches):
            timer.start()
            next(batches)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == running


@pytest.mark.parametrize("loader", [*KINDS, "resident"])
def test_a_crop_that_mirrors_more_than_there_is_is_refused_before_the_first_batch(toy_dataset, loader):
    settings = ["augment.crop_mode=reflect", "augment.crop_padding=32", "train.batch_size=16", f"train.loader={loader}"]
    with pytest.raises(SettingsError, match="augment.crop_padding: expected 0 to 31 to mirror images of 32x32; got 32"):
        open_batches(Recipe().with_settings(settings), toy_dataset, choose_execution("cpu"))
