"""Images a second of either loader: through FFCV with one worker, and gathered from the resident set on the device.

Both decode or gather, crop, flip and blank, in the same order with the same results. FFCV's thread works beside the
training step; resident batches are made inside it.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from bench.measure import DEVICE
from rsengine.augment.from_recipe import training_augmentations
from rsengine.config import AugmentSection, Recipe
from rsengine.data import convert
from rsengine.device import Execution
from rsengine.input.resident import ResidentData, read_images
from rsengine.input.stream import BetonLoader

IMAGES, BATCH = 9000, 250
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


@pytest.mark.parametrize("augment", AUGMENTS)
def test_ffcv(benchmark, beton, augment):
    loader = BetonLoader(beton, BATCH, augmentations=training_augmentations(augment, MEAN, 0), shuffle=True)

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
