"""What a run on the CPU says of its layers is what they do."""

import pytest
import torch

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.build import build_step, explain_layers
from rsengine.kernels import bottleneck as operation
from rsengine.kernels.dispatch import eager_only
from rsengine.kernels.native import convolutions
from rsengine.model import network

FASTER = convolutions.available()[0]
BF16, FP32 = (Execution(torch.device("cpu"), dtype, 2, "") for dtype in (torch.bfloat16, None))


@pytest.mark.parametrize(
    ("execution", "setting", "options", "because"),
    [
        (BF16, "name=default", {}, ""),
        (FP32, "name=default", {}, "the run computes in float32"),
        (BF16, "train.convolutions=products", {}, "train.convolutions is products"),
        (BF16, "train.convolutions=library", {}, "train.convolutions is library"),
        (BF16, "train.batch_norm=sync", {"processes": 2}, "batch norm is that of all processes"),
        (BF16, "train.batch_norm=sync", {"processes": 1}, ""),
        (BF16, "name=default", {"compiled": True}, "torch.compile sees only"),
    ],
)
def test_bottlenecks_are_said_to_be_native_where_they_are(execution, setting, options, because, monkeypatch):
    recipe = Recipe().with_settings([setting, "model.blocks=[1]", "model.stem_width=8"])
    first, *others = explain_layers(recipe, execution, **options)
    if because:
        assert first.startswith("bottleneck") and f": eager on cpu, because {because}" in first
    else:
        assert first.startswith("bottleneck: native on cpu" if FASTER else "bottleneck: eager on cpu")
        assert (not others) == FASTER
    if options.get("processes", 1) == 1 and not options.get("compiled"):
        calls = []
        monkeypatch.setattr(network, "bottleneck", lambda *a, **k: calls.append(1) or operation(*a, **k))
        step = build_step(recipe, 3, (0.5,) * 3, (0.25,) * 3, execution, 10)
        step(torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
        assert bool(calls) == first.startswith("bottleneck: native")


def test_one_reason_is_given_once():
    with eager_only():
        found = explain_layers(Recipe(), BF16)
    assert found == ["bottleneck and batch_norm: eager on cpu, because the process is inside eager_only()"]
