"""Images a second of augmentation pipelines on this machine's cores, in turn: ours, and those in use elsewhere.

All of them crop with padding 4, flip, apply AutoAugment for CIFAR-10 and cut out four 4x4 squares, from the same images
to batches of 250. Ours is the loader of a run, with one thread, and gives uint8, which the step normalises; the others
use PyTorch's DataLoader with two workers that stay, and give float tensors, as their users feed them.
"""

import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from bench.baselines import cutout
from bench.test_pipeline import BATCH, IMAGES, MEAN, beton  # noqa: F401  (a fixture)
from rsengine.augment.from_recipe import training_augmentations
from rsengine.config import AugmentSection
from rsengine.data.beton.reader import BetonReader
from rsengine.input.choose import choose_loader

PLAIN = {"crop_padding": 4, "flip": True, "cutout_holes": 4, "cutout_size": 4}
ROUNDS = 5
BASELINE_IMAGES = 3000  # they take seconds for it


class Images(Dataset):
    """The images as a data set for PyTorch's loader. ``make``: from (H, W, 3) uint8 to what ``transform`` takes."""

    def __init__(self, path, make, transform):
        reader = BetonReader(path)
        self.images = [reader.image(i).copy() for i in range(BASELINE_IMAGES)]
        self.make, self.transform = make, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.make(self.images[i])), i % 10


def to_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


def run_ours(path, **settings):
    augmentations = training_augmentations(AugmentSection(**{**PLAIN, **settings}), MEAN, 0)
    loader = choose_loader("auto").open(path, BATCH, augmentations=augmentations, shuffle=True)
    return lambda: sum(len(images) for images, _ in loader.epoch(0))


def run_loader(data, after=None):
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def run():
        count = 0
        for images, _ in loader:
            count += len(images if after is None else after(images))
        return count

    return run


def baselines(path):
    """Name -> a function that goes through the images once and returns how many they were."""
    autoaugment = v1.AutoAugmentPolicy.CIFAR10
    to_pil = v1.functional.to_pil_image
    pil = [v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), v1.AutoAugment(autoaugment), v1.ToTensor(), cutout]
    tensors = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]
    tensors += [v2.ToDtype(torch.float32, scale=True), cutout]
    found = {
        "torchvision v1 on PIL, DataLoader (the report's)": run_loader(Images(path, to_pil, v1.Compose(pil))),
        "torchvision v2 on tensors, DataLoader": run_loader(Images(path, to_tensor, v2.Compose(tensors))),
    }
    try:
        import kornia.augmentation as kornia
    except ImportError:
        return found  # the row's absence is said in extra_info
    batched = torch.nn.Sequential(
        kornia.RandomCrop((32, 32), padding=4),
        kornia.RandomHorizontalFlip(),
        kornia.auto.AutoAugment(policy="cifar10"),
        *(kornia.RandomErasing(p=1.0, scale=(1 / 64, 1 / 64), ratio=(1, 1)) for _ in range(4)),
    )
    plain = v2.Compose([v2.ToDtype(torch.float32, scale=True)])
    found["Kornia on batches, DataLoader"] = run_loader(Images(path, to_tensor, plain), batched)
    return found


@pytest.mark.slow
def test_autoaugment_against_others(benchmark, beton):  # noqa: F811
    """Every pipeline once a round, in turn; the rows are medians over the rounds, the ratios of pairs in one round."""
    runs = {"rsengine": run_ours(beton, policy="autoaugment"), **baselines(beton)}
    rates = {name: [] for name in runs}
    for run in runs.values():
        run()  # workers start, numba loads
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            rates[name].append(run() / (time.perf_counter() - start))
    ours = rates["rsengine"]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        benchmark.extra_info[name] = f"{statistics.median(values):,.0f} images/s, ours {ratio:.1f} times"
        print(f"{name}: {benchmark.extra_info[name]}")
    benchmark.extra_info["rounds"] = ROUNDS
    benchmark.pedantic(runs["rsengine"], rounds=ROUNDS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "autoaugment"}, {"policy": "randaugment"}, {"policy": "trivialaugment"}, {"policy": "augmix"}],
    ids=lambda settings: settings.get("policy", "crop flip cutout"),
)
def test_ours(benchmark, beton, settings):  # noqa: F811
    run = run_ours(beton, **settings)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["images/s"] = round(IMAGES / benchmark.stats.stats.median)


FIRST_BATCH = """
import sys, time
start = time.perf_counter()
from rsengine.config import AugmentSection
from rsengine.augment.from_recipe import training_augmentations
from rsengine.input.choose import choose_loader
settings = {"policy": "autoaugment", "cutout_holes": 4, "cutout_size": 4}
operations = training_augmentations(AugmentSection(**settings), (0.5, 0.5, 0.5), 0)
next(choose_loader('auto').open(sys.argv[1], 250, augmentations=operations, shuffle=True).epoch(0))
print(time.perf_counter() - start)
"""


def test_first_batch_of_a_new_process(benchmark, beton):  # noqa: F811
    """With the whole policy, imports included, once this machine has compiled it."""

    def run():
        done = subprocess.run(
            [sys.executable, "-c", FIRST_BATCH, str(beton)], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    run()
    seconds = [run() for _ in range(3)]
    benchmark.extra_info["seconds to the first batch"] = [round(value, 2) for value in np.sort(seconds)]
    benchmark.pedantic(run, rounds=1)
