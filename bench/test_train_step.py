"""One training step as a user gets it by default. Comparisons with other engines are a matter of their own."""

import pytest
import torch

from rsengine.config import load_recipe
from rsengine.device import choose_execution
from rsengine.preprocess import Preprocess
from rsengine.step import TrainStep
from rsengine.weights import build_model


@pytest.mark.parametrize("name", ["quickstart", "report-1"])
def test_step(benchmark, name):
    recipe = load_recipe(name)
    preprocess = Preprocess((0.5,) * 3, (0.25,) * 3)
    step = TrainStep(build_model(recipe, 10), recipe, preprocess, choose_execution("cpu"), 390)
    n = recipe.train.batch_size
    images, labels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (n,))
    benchmark.extra_info["images"] = n
    benchmark.pedantic(step, (images, labels), rounds=7, warmup_rounds=2)
