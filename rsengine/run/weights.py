"""``weights.safetensors``: a trained network in one file, with everything needed to use it.

The tensors are the network's state dict. The metadata holds the recipe, the classes, and the preprocessing, so that a
prediction sees pixels exactly as training did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsengine.checked import Field, FieldError
from rsengine.config import Recipe, RecipeError
from rsengine.data.errors import UserError
from rsengine.data.sources.images import LARGEST_SIDE
from rsengine.engine.build import build_model
from rsengine.model import ResNetRS
from rsengine.run.files import WEIGHTS_FILE, utf8_path, write_atomically
from rsengine.run.tensors import check_like

_FORMAT = "rsengine-weights-1"
_CHECKSUM = "sha256"  # the key in the metadata
_AGAIN = "give the weights of another run, or resume the run that wrote them"
_LONGEST = 200  # characters of another library's words
_SMALLEST_STD = 1e-9  # far below that of a channel where a single pixel in 10^12 differs from all others


class WeightsError(UserError):
    """Weights that cannot be used. The message is one line with the remedy."""


class Description(NamedTuple):
    """What a network is and how to feed it: all that its weights do not say."""

    recipe: Recipe
    classes: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_metadata(self) -> dict[str, str]:
        """As texts by name, which every format of files can hold."""
        values = {key: json.dumps(list(getattr(self, key))) for key in ("classes", "image_size", "mean", "std")}
        return {"recipe": self.recipe.to_toml(), **values}

    @classmethod
    def of_metadata(cls, metadata: Field, origin: str) -> Description:
        """What :meth:`to_metadata` gave. ``origin``: of the recipe, for messages. Raises FieldError or RecipeError."""
        recipe = Recipe.from_toml(metadata["recipe"].text(), f"{origin}: recipe")
        values = {key: Field.of_json(metadata[key].text(), key) for key in ("classes", "image_size", "mean", "std")}
        classes = tuple(each.text(any_bytes=True) for each in values["classes"].items())  # of folders, as a rule
        if not classes:
            raise values["classes"].error("names of classes")
        height, width = (side.integer(1, LARGEST_SIDE) for side in values["image_size"].items(2))
        mean = tuple(each.number(0, 1) for each in values["mean"].items(3))
        # The 0 of a channel without spread, as older versions wrote it, counts as 1.
        std = tuple(each.number(_SMALLEST_STD if each.value else 0, 1) for each in values["std"].items(3))
        return cls(recipe, classes, (height, width), mean, std)


@dataclass(frozen=True)
class Weights:
    """A trained network and how to feed it."""

    model: ResNetRS  # in evaluation mode
    recipe: Recipe
    classes: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def description(self) -> Description:
        return Description(self.recipe, self.classes, self.image_size, self.mean, self.std)


def save_weights(folder: Path, model: nn.Module, recipe: Recipe, dataset: object) -> Path:
    """Write ``weights.safetensors`` into ``folder``, atomically. ``dataset``: a :class:`rsengine.data.Dataset`."""
    path = Path(folder) / WEIGHTS_FILE
    write_atomically(path, weights_bytes(model, recipe, dataset))
    return path


def weights_bytes(model: nn.Module, recipe: Recipe, dataset: object) -> bytes:
    """The content of ``weights.safetensors``. ``dataset``: as in :func:`save_weights`, or :class:`Weights`."""
    from safetensors.torch import save

    state = _state(model)
    return save(state, _metadata(state, recipe, dataset))


def holds_weights(path: Path, model: nn.Module, recipe: Recipe, dataset: object) -> bool:
    """Whether ``path`` is what :func:`save_weights` would write, to the bit."""
    from safetensors import SafetensorError, safe_open

    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            state = _state(model)
            return (
                file.metadata() == _metadata(state, recipe, dataset)
                and set(file.keys()) == set(state)
                and all(_same(file.get_tensor(name), tensor) for name, tensor in state.items())
            )
    except (SafetensorError, OSError):
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _metadata(state: Mapping[str, Tensor], recipe: Recipe, dataset: object) -> dict[str, str]:
    described = Description(recipe, dataset.classes, dataset.image_size, dataset.mean, dataset.std)
    metadata = {"format": _FORMAT, **described.to_metadata()}
    return metadata | {_CHECKSUM: _checksum(state, metadata)}


def _checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of all that the file says: the format has no sum of its own."""
    total = hashlib.sha256()
    for key in sorted(metadata.keys() - {_CHECKSUM}):
        total.update(json.dumps([key, metadata[key]]).encode())
    for name, tensor in sorted(state.items()):
        total.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def weights_file(path: str | Path) -> Path:
    """The weights that ``path`` is, or that lie in the run folder that it is. Raises :class:`WeightsError`: none do."""
    path = Path(path)
    try:
        if path.is_dir():
            path = path / WEIGHTS_FILE
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; give a run folder whose training has finished an epoch")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    return path


def load_weights(path: str | Path) -> Weights:
    """Read what :func:`save_weights` wrote; ``path`` is the file or its run folder.

    Raises:
        WeightsError: there are none, or they are damaged, of another format, or at odds with themselves: metadata of
            other types or out of range, tensors that are not those of the recipe's network, numbers that are not
            finite. The line names the file and the field.
    """
    path = weights_file(path)
    try:
        metadata, state = _read(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if metadata.get("format") != _FORMAT:
        raise WeightsError(f"{path}: not written by rsengine (its metadata has no format {_FORMAT})")
    if metadata.get(_CHECKSUM, _checksum(state, metadata)) != _checksum(state, metadata):  # older ones have none
        raise WeightsError(f"{path}: damaged (its checksum is not that of its content); {_AGAIN}")
    try:
        return _checked(Field(metadata), state, path)
    except (FieldError, RecipeError) as error:
        raise WeightsError(f"{path}: {str(error).removeprefix(f'{path}: ')}; {_AGAIN}") from error


def finite(results: Tensor) -> Tensor:
    """``results`` of a network. Raises :class:`WeightsError` where they are not finite numbers, though the weights are:
    a product has overflowed."""
    if not results.isfinite().all():
        raise WeightsError(f"the weights are so large that their results are no finite numbers; {_AGAIN}")
    return results


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # its own, and what PyTorch says of types and sizes that it does not know
        reason = " ".join(str(error).split())[:_LONGEST]
        raise WeightsError(f"{path}: damaged or not a safetensors file ({reason}); {_AGAIN}") from error


def _checked(metadata: Field, state: dict[str, Tensor], path: Path) -> Weights:
    """The weights that metadata and tensors describe. Raises FieldError or RecipeError."""
    described = Description.of_metadata(metadata, str(path))
    model = build_model(described.recipe, len(described.classes))
    check_like(Field(state, "tensors"), model.state_dict())
    model.load_state_dict(state)
    return Weights(model.eval(), *described)
