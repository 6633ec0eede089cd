"""Images a second of each loader: through FFCV, from rsengine's own stream, and from the resident set on the device.

All decode or gather, crop, flip and blank, in the same order with the same results. The thread of FFCV or of the stream
works beside the training step; resident batches are made inside it.
"""

import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bench.measure import DEVICE
from rsengine.augment.from_recipe import training_augmentations
from rsengine.config import AugmentSection, Recipe
from rsengine.data import convert, find_dataset
from rsengine.data.errors import DataError
from rsengine.device import Execution
from rsengine.input.choose import choose_loader, ffcv_problem
from rsengine.input.resident import ResidentData, read_images

IMAGES, BATCH = 9000, 250
ROUNDS, EACH = 21, 16384  # images a round and loader
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AUGMENTS = [
    pytest.param(AugmentSection(crop_padding=0, flip=False), id="plain"),
    pytest.param(AugmentSection(crop_padding=4, flip=True), id="crop flip"),
    pytest.param(AugmentSection(crop_padding=4, flip=True, cutout_holes=4, cutout_size=4), id="crop flip cutout"),
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "source" / name).mkdir(parents=True)
        for i in range(5000):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"source/{name}/{i}.png")
    dataset = convert(folder / "source", folder / "out", log=lambda line: None)
    assert dataset.train_count == IMAGES
    return dataset.train_beton


def measure(benchmark, run):
    """Time an epoch and note its images a second."""
    benchmark(run)
    benchmark.extra_info |= {"images": IMAGES, "device": str(DEVICE), "threads": torch.get_num_threads()}
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["images/s"] = round(IMAGES / benchmark.stats.stats.median)


@pytest.mark.parametrize("kind", ["ffcv", "stream"])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_loader(benchmark, beton, augment, kind):
    if kind == "ffcv" and (problem := ffcv_problem()):
        pytest.skip(problem)
    open_loader = choose_loader(kind).open
    loader = open_loader(beton, BATCH, augmentations=training_augmentations(augment, MEAN, 0), shuffle=True)

    def run():
        for _ in loader.epoch(0):
            pass

    measure(benchmark, run)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_resident(benchmark, beton, augment):
    recipe = Recipe(augment=augment).with_settings([f"train.batch_size={BATCH}", "train.epochs=1"])
    steps = IMAGES // BATCH
    resident = ResidentData(recipe, *read_images(beton), MEAN, STD, Execution(DEVICE, None, 1, "a benchmark"), steps)
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run():
        counter.zero_()
        for _ in range(steps):
            resident(counter)
            counter.add_(1)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    measure(benchmark, run)


@pytest.mark.parametrize("batch", [128, 512])
@pytest.mark.parametrize("policy", ["none", "autoaugment"])
def test_stream_beside_ffcv(benchmark, policy, batch):
    """Both on CIFAR-10 with crop, flip and Cutout, in turn; a round is the last part of an epoch of each."""
    if problem := ffcv_problem():
        pytest.skip(problem)
    try:
        dataset = find_dataset(None, log=lambda line: None)
    except DataError as error:
        pytest.skip(str(error))
    augment = AugmentSection(policy=policy, cutout_holes=4, cutout_size=4)
    augmentations = training_augmentations(augment, dataset.mean, 0)
    loaders = {}
    for kind in ("ffcv", "stream"):
        open_loader = choose_loader(kind).open
        loaders[kind] = open_loader(
            dataset.train_beton, batch, augmentations=augmentations, shuffle=True, drop_last=True
        )

    def run(kind, epoch=0):
        """Images a second, and microseconds of the process's CPU time an image."""
        loader, begun, busy = loaders[kind], time.perf_counter(), time.process_time()
        images = sum(len(labels) for _, labels in loader.epoch(epoch, start=len(loader) - EACH // batch))
        return images / (time.perf_counter() - begun), (time.process_time() - busy) / images * 1e6

    for kind in loaders:
        run(kind)
    found = {kind: [] for kind in loaders}
    for round in range(ROUNDS):
        for kind in sorted(loaders, reverse=round % 2 == 1):
            found[kind].append(run(kind, round))
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(found["stream"], found["ffcv"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    info = benchmark.extra_info
    for kind, rounds in found.items():
        rates, busy = map(statistics.median, zip(*rounds, strict=True))
        info[kind] = f"{rates:,.0f} images/s, {busy:.1f} us of CPU an image"
    info["stream over ffcv"] = f"{middle:.2f} ({low:.2f}, {high:.2f}), {ROUNDS} rounds"
    print(f"{policy}, batch {batch}:", *(f"{name}: {value};" for name, value in info.items()))
    benchmark.pedantic(lambda: run("stream"), rounds=ROUNDS)
