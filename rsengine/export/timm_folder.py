"""A network as timm's ResNet: ``model.safetensors`` and ``config.json``, as timm and the Hub have them.

timm's ``resnetrs*`` are the paper's networks. Other depths and widths are arguments of the same class, which the
configuration holds as ``model_args``: ``layers``, ``channels`` and ``stem_width``. What no argument says is refused:
strides of the stem other than 2 and 2, more than four stages, a single block, and a squeeze-and-excite wider than a
quarter of its block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rsengine.errors import SettingsError
from rsengine.model import DEPTHS, PlainStem, ResNetRS, divisible, to_timm
from rsengine.run.files import write_atomically
from rsengine.run.foreign import TIMM_CONFIG, TIMM_FILES
from rsengine.run.weights import Weights

MODEL_FILE = TIMM_FILES[0]
_STAGES = 4
_NAMED_DEPTHS = tuple(depth for depth in DEPTHS if depth >= 50)  # those that timm names
# Hidden channels of squeeze-and-excite over those of a block: of timm's resnetrs*, and of its SEModule by default.
_RATIO, _PLAIN_RATIO = 0.25, 1 / 16


def write(weights: Weights, folder: Path) -> list[Path]:
    """Write both files into ``folder``.

    Raises:
        SettingsError: timm's ResNet has no arguments for this network.
    """
    from safetensors.torch import save

    arguments, state = timm_arguments(weights.model), to_timm(weights.model.state_dict())
    if "block_args" not in arguments["model_args"]:
        state = _widened(state)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    paths = [folder / MODEL_FILE, folder / TIMM_CONFIG]
    write_atomically(paths[0], save(state, {"format": "pt"}))
    write_atomically(paths[1], (json.dumps(_config(weights, arguments), indent=2) + "\n").encode())
    return paths


def timm_arguments(model: ResNetRS) -> dict[str, Any]:
    """``architecture`` and ``model_args`` with which ``timm.create_model`` builds the network.

    Raises:
        SettingsError: none do.
    """
    blocks = tuple(len(stage) for stage in model.stages)
    _refuse(isinstance(model.stem, PlainStem), "it has the stem of ResNet, timm's resnetrs that of ResNet-D")
    _refuse(model.stages[0][0].se is None, "it has no squeeze-and-excite, timm's resnetrs has")
    strides = model.stem.conv1.stride[0], model.stem.pool_conv.stride[0]
    _refuse(
        strides != (2, 2),
        f"its stem strides by {strides[0]} and {strides[1]}, timm's by 2 and 2 (train it with "
        "model.stem_stride=2 and model.stem_pool_stride=2 for that)",
    )
    _refuse(len(blocks) > _STAGES, f"it has {len(blocks)} stages, timm's has {_STAGES}")
    _refuse(sum(blocks) < 2, "it has a single block, timm's has two or more")
    channels = [stage[0].conv1.out_channels for stage in model.stages]
    stem_width = model.stem.conv1.out_channels
    hidden = [(stage[0].conv3.out_channels, stage[0].se.reduce.out_features) for stage in model.stages]

    depth = next((depth for depth in _NAMED_DEPTHS if DEPTHS[depth] == blocks), None)
    arguments: dict[str, Any] = {}
    absent = _STAGES - len(blocks)  # timm's network has four stages, of which some may be without blocks
    if depth is None:
        arguments["layers"] = [*blocks, *[0] * absent]
    if (channels := [*channels, *channels[-1:] * absent]) != [64, 128, 256, 512]:
        arguments["channels"] = channels
    if stem_width != 32:
        arguments["stem_width"] = stem_width
    if any(width != divisible(_RATIO * of) for of, width in hidden):
        if all(width == divisible(_PLAIN_RATIO * of) for of, width in hidden):
            arguments["block_args"] = {"attn_layer": "se"}
        else:
            wide = any(width > divisible(_RATIO * of) for of, width in hidden)
            _refuse(wide, "its squeeze-and-excite is wider than timm's, a quarter of the block")
    return {"architecture": f"resnetrs{depth or 50}", "model_args": arguments}


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise SettingsError(
            f"--to timm: timm's ResNet cannot be this network: {why}; use --to onnx, torch or safetensors"
        )


def _widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squeeze-and-excite with as many hidden channels as timm's. The channels that are added are always 0."""
    wide = dict(state)
    for name in [name for name in state if name.endswith(".se.fc1.weight")]:
        hidden, channels = state[name].shape[:2]
        missing, block = divisible(_RATIO * channels) - hidden, name.removesuffix("fc1.weight")
        wide[name] = F.pad(state[name], (0, 0, 0, 0, 0, 0, 0, missing))
        wide[f"{block}fc1.bias"] = F.pad(state[f"{block}fc1.bias"], (0, missing))
        wide[f"{block}fc2.weight"] = F.pad(state[f"{block}fc2.weight"], (0, 0, 0, 0, 0, missing))
    return wide


def _config(weights: Weights, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json``."""
    model, (height, width) = weights.model, weights.image_size
    count = len(weights.classes)
    reduction = 4 * 2 ** (len(model.stages) - 1)
    return {
        "architecture": arguments["architecture"],
        "num_classes": count,
        "num_features": model.fc.in_features,
        "global_pool": "avg",
        "label_names": list(weights.classes),
        "model_args": arguments["model_args"],
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(weights.mean),
            "std": [value or 1.0 for value in weights.std],
            "num_classes": count,
            "pool_size": [-(-height // reduction), -(-width // reduction)],
            "first_conv": "conv1.0",
            "classifier": "fc",
        },
    }
