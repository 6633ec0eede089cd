"""Weights as timm and the Hub write them: found in a folder, read without running code, and put under our names."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsengine.checked import Field, FieldError
from rsengine.config import ModelSection
from rsengine.data.errors import UserError
from rsengine.model import DEPTHS, divisible, from_timm
from rsengine.run.files import WEIGHTS_FILE, utf8_path

TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm and the Hub name them in a folder
TIMM_CONFIG = "config.json"
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys of checkpoints, in timm's order
PREFIXES = ("module.", "_orig_mod.")  # of parallel and of compiled networks
MOST_NAMED = 3  # tensors in one line


class InitialError(UserError):
    """Weights that a run cannot begin with. The message is one line with the remedy."""


def file_in(given: Path) -> Path:
    """The file of weights that is ``given``, or lies in the folder that is."""
    if given.is_file():
        return given
    if not given.is_dir():
        raise InitialError(f"--init {given}: no such file or folder")
    for name in (WEIGHTS_FILE, *TIMM_FILES):
        if (given / name).is_file():
            return given / name
    raise InitialError(
        f"--init {given}: found no weights there; expected {WEIGHTS_FILE}, as a run writes once an epoch is done, or "
        f"{' or '.join(TIMM_FILES)}, as timm writes"
    )


def read_content(path: Path) -> tuple[Any, str]:
    """What a file holds, and the format that the metadata of a safetensors file names. No code in it is run."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            format = str((file.metadata() or {}).get("format", ""))
            return {name: file.get_tensor(name) for name in file.keys()}, format  # noqa: SIM118 (not a dict)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not check the sums
                raise ValueError(f"checksum of {damaged}")
    # A checkpoint of timm's own training holds its arguments: a Namespace, plain values under names.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True), ""


def tensors_in(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds, without the prefixes of wrapped networks."""
    if isinstance(content, Mapping) and content.get("format") == "rsengine-checkpoint":
        raise InitialError(f"--init {path}: a checkpoint of rsengine; give its folder, or the {WEIGHTS_FILE} in it")
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise InitialError(f"--init {path}: expected a state dict; found {type(content).__name__}")
    state = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_dense(tensor):
            found = f"{name!r}: {type(tensor).__name__}"
            raise InitialError(f"--init {path}: expected dense tensors by name; found {found}; give a state dict")
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        state[name] = tensor
    return state


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def renamed(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under this family's names, and floating-point values in float32."""
    try:
        ours = dict(state) if any(name.startswith("stem.") for name in state) else from_timm(state)
    except ValueError as error:
        raise InitialError(f"--init {path}: {error}; give weights of a ResNet-RS") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in ours.items()}


def architecture_of(path: Path, state: Mapping[str, Tensor]) -> ModelSection:
    """The network whose weights have the shapes of ``state``, with the strides of timm's."""
    blocks: dict[int, set[int]] = {}
    for name in state:
        if found := re.match(r"stages\.(\d{1,4})\.(\d{1,4})\.", name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    needed = ("stem.conv1.weight", "stages.0.0.conv1.weight", "stages.0.0.se.reduce.weight")
    first = [f"stages.{stage}.0" for stage in sorted(blocks)]
    missing = [name for name in needed if name not in state or state[name].dim() < 2]
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    if missing or sorted(blocks) != list(range(len(blocks))):
        lacks = first_of(missing) or "a stage"
        raise InitialError(f"--init {path}: it lacks {lacks}; give the weights of a whole ResNet-RS")
    widths = [state[f"{block}.conv1.weight"] for block in first if f"{block}.conv1.weight" in state]
    reduce = [state[f"{block}.se.reduce.weight"] for block in first if f"{block}.se.reduce.weight" in state]
    depth = next((depth for depth, usual in DEPTHS.items() if usual == counts), None)
    return replace(
        ModelSection(dropout=0.0),
        **({"blocks": counts} if depth is None else {"depth": depth}),
        stem_width=len(state[needed[0]]),
        width_multiplier=_factor([(64 * 2**stage, len(width)) for stage, width in enumerate(widths)]),
        se_ratio=_factor([(tensor[:1].numel(), len(tensor)) for tensor in reduce]),
    )


def _factor(pairs: Sequence[tuple[int, int]]) -> float:
    """The factor by which the first numbers become the second, rounded to multiples of 8 as :func:`divisible` does.

    A stage alone tells it as exactly as its rounding allows; all together tell it better. The widest stage's quotient
    is taken where it gives the others too.
    """
    base, value = pairs[-1]
    exact = value / max(base, 1)
    if all(divisible(base * exact) == value for base, value in pairs):
        return exact
    lows = [(value - 4) / max(base, 1) for base, value in pairs if value > 8]
    highs = [(value + 4) / max(base, 1) for base, value in pairs]
    return (max(lows, default=0) + min(highs)) / 2


def timm_normalisation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """Mean and standard deviation in the ``config.json`` beside the weights, or none."""
    config = path.parent / TIMM_CONFIG
    if path.name not in TIMM_FILES or not config.is_file():
        return None, None
    try:
        values = Field.of_json(config.read_bytes())
        if "pretrained_cfg" in values:
            values = values["pretrained_cfg"]
        return normalisation(values) if "mean" in values or "std" in values else (None, None)
    except FieldError as error:
        raise InitialError(f"--init {config}: {error}; mend the file or take it away") from error


def normalisation(values: Field) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ``mean`` and the ``std`` of three channels, in units of 0 to 1, the std above 0. Raises FieldError."""
    mean = tuple(each.number(0, 1) for each in values["mean"].items(3))
    return mean, tuple(each.number(1e-6, 1) for each in values["std"].items(3))


def first_of(names: Sequence[str]) -> str:
    """The first of ``names`` in words, and how many more there are."""
    return ", ".join(names[:MOST_NAMED]) + f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED)
