"""``weights.safetensors``: a trained network in one file, with everything needed to use it.

The tensors are the network's state dict. The metadata holds the recipe, the classes, and the preprocessing, so that a
prediction sees pixels exactly as training did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rsengine.config import Recipe, RecipeError
from rsengine.data.errors import UserError
from rsengine.engine.build import build_model
from rsengine.model import ResNetRS
from rsengine.run.files import WEIGHTS_FILE, utf8_path, write_atomically

_FORMAT = "rsengine-weights-1"


class WeightsError(UserError):
    """Weights that cannot be used. The message is one line with the remedy."""


@dataclass(frozen=True)
class Weights:
    """A trained network and how to feed it."""

    model: ResNetRS  # in evaluation mode
    recipe: Recipe
    classes: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]


def save_weights(folder: Path, model: nn.Module, recipe: Recipe, dataset: object) -> Path:
    """Write ``weights.safetensors`` into ``folder``, atomically. ``dataset``: a :class:`rsengine.data.Dataset`."""
    from safetensors.torch import save

    path = Path(folder) / WEIGHTS_FILE
    write_atomically(path, save(_state(model), _metadata(recipe, dataset)))
    return path


def holds_weights(path: Path, model: nn.Module, recipe: Recipe, dataset: object) -> bool:
    """Whether ``path`` is what :func:`save_weights` would write, to the bit."""
    from safetensors import SafetensorError, safe_open

    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            state = _state(model)
            return (
                file.metadata() == _metadata(recipe, dataset)
                and set(file.keys()) == set(state)
                and all(_same(file.get_tensor(name), tensor) for name, tensor in state.items())
            )
    except (SafetensorError, OSError):
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _metadata(recipe: Recipe, dataset: object) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "recipe": recipe.to_toml(),
        "classes": json.dumps(list(dataset.classes)),
        "image_size": json.dumps(list(dataset.image_size)),
        "mean": json.dumps(list(dataset.mean)),
        "std": json.dumps(list(dataset.std)),
    }


def load_weights(path: str | Path) -> Weights:
    """Read what :func:`save_weights` wrote; ``path`` is the file or its run folder. Raises :class:`WeightsError`."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a run folder whose training has finished an epoch")
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or not a safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise WeightsError(f"{path}: not written by rsengine (its metadata has no format {_FORMAT})")
    try:
        recipe = Recipe.from_toml(metadata["recipe"], str(path))
        classes = tuple(json.loads(metadata["classes"]))
        model = build_model(recipe, len(classes))
        model.load_state_dict(state)
        return Weights(
            model.eval(),
            recipe,
            classes,
            tuple(json.loads(metadata["image_size"])),
            tuple(json.loads(metadata["mean"])),
            tuple(json.loads(metadata["std"])),
        )
    except (KeyError, ValueError, RuntimeError, RecipeError) as error:
        raise WeightsError(
            f"{path}: its metadata and tensors do not fit together ({str(error).splitlines()[0]})"
        ) from error
