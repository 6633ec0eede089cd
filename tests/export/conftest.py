"""Networks with weights as after training, so that every part of them counts in the logits."""

import pytest
import torch

from rsengine.config import Recipe
from rsengine.engine.build import build_model
from rsengine.run.weights import load_weights, save_weights

CLASSES = ("猫", "two words", 'quo"te', "<b>")
SMALL = ("model.blocks=[1, 2]", "model.width_multiplier=0.25", "model.stem_width=8")


class Data:
    """What weights say of the data that they were trained on."""

    classes, image_size, mean, std = CLASSES, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """``trained(*settings)``: a run folder with weights, and the weights."""

    def make(*settings, data=Data):
        folder = tmp_path_factory.mktemp("run")
        recipe = Recipe().with_settings([*SMALL, *settings])
        torch.manual_seed(0)
        model = build_model(recipe, len(data.classes))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if "bn" in name and tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5 if "weight" in name or "var" in name else tensor + 0.1)
            model.fc.weight.mul_(30)
        save_weights(folder, model, recipe, data)
        return folder, load_weights(folder)

    return make


@pytest.fixture(scope="session")
def run(trained):
    return trained("model.stem_pool_stride=1")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return lambda count: torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
