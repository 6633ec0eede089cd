"""Widths and squeeze-and-excite ratios are read off weights of any rounding."""

from pathlib import Path

import pytest

from rsengine.config import Recipe
from rsengine.engine.build import build_model
from rsengine.run.foreign import architecture_of


@pytest.mark.parametrize("width", [0.05, 0.125, 0.2, 0.3, 0.33, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("ratio", [0.01, 0.0625, 0.15, 0.25, 0.4])
def test_the_network_that_is_read_off_has_the_same_shapes(width, ratio):
    settings = ["model.blocks=[1, 1, 1]", f"model.width_multiplier={width}", f"model.se_ratio={ratio}"]
    state = build_model(Recipe().with_settings(settings), 3).state_dict()
    again = build_model(Recipe(model=architecture_of(Path("weights"), state)), 3).state_dict()
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in state.items()}
