"""Images a second through the FFCV pipeline, one worker: decode, crop, flip, Cutout, tensor."""

import numpy as np
import pytest
from PIL import Image

from rsengine.augment import Cutout, HorizontalFlip, RandomCrop
from rsengine.data import convert
from rsengine.loader import BetonLoader


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "source" / name).mkdir(parents=True)
        for i in range(5000):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"source/{name}/{i}.png")
    return convert(folder / "source", folder / "out", log=lambda line: None).train_beton


@pytest.mark.parametrize("augmented", [False, True], ids=["decode", "crop flip cutout"])
def test_epoch(benchmark, beton, augmented):
    operations = [RandomCrop(4), HorizontalFlip(), Cutout(4, 4)] if augmented else []
    loader = BetonLoader(beton, 250, augmentations=operations, shuffle=True)

    def run():
        for _ in loader.epoch(0):
            pass

    benchmark.extra_info["images"] = 9000
    benchmark(run)
