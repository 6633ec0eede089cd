"""The small converted data set that tests of the loader and of whole runs share."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsengine.data import Dataset, convert
from rsengine.kernels.dispatch import eager_only

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None or os.environ.get("RSENGINE_NO_FFCV", "0") not in ("", "0"),
    reason="FFCV is not installed",
)

CLASSES = ("circle", "square", "stripes")


def draw_classes(folder: Path, each: int, seed: int) -> None:
    """Noisy pictures, 32x32, whose class is the channel that is bright: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, channel] += 80
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """50 training and 7 test images a class: neither fills whole batches of 16 or 10."""
    folder = tmp_path_factory.mktemp("toy")
    draw_classes(folder / "source" / "train", 50, seed=0)
    draw_classes(folder / "source" / "test", 7, seed=1)
    return convert(folder / "source", folder / "converted", progress=False, log=lambda line: None)


@pytest.fixture
def eager_ops() -> Iterator[None]:
    """PyTorch's operators throughout: a recorder of operators does not see the compiled passes."""
    with eager_only():
        yield


@pytest.fixture
def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
