"""The weights that a run begins with in place of random ones: those of an earlier run, or timm's.

Everything that the network learned is taken over: weights and batch-norm averages. Two things go with it: the
architecture and, where the source says it, the normalisation of pixels. The classifier is taken over only where it
answers for the same classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rsengine.checked import Field, FieldError
from rsengine.config import ModelSection
from rsengine.data import Dataset
from rsengine.model import DEPTHS, HEAD
from rsengine.output import counted
from rsengine.run.checkpoint import damaged
from rsengine.run.files import CHECKPOINT_FILE
from rsengine.run.foreign import (
    InitialError,
    architecture_of,
    file_in,
    first_of,
    normalisation,
    read_content,
    renamed,
    tensors_in,
    timm_normalisation,
)
from rsengine.run.weights import load_weights

UNUSED = "num_batches_tracked"  # has no effect while batch norm has a fixed momentum; old files lack it
# Of the recipe's [model]: these change no weight's meaning.
FREE = ("drop_path", "drop_path_rule", "dropout", "zero_init")


@dataclass(frozen=True)
class Initial:
    """Weights to begin with.

    Attributes:
        path: the file that holds them.
        sha256: of that file.
        state: the network's state dict, under this family's names. Not yet compared with a network.
        model: the architecture: the run's own, or what the shapes say, with drop path and dropout off.
        exact: whether ``model`` is the run's own.
        classes: what the classifier answers for; None where the source does not say.
        mean, std: of the normalisation of pixels; None where the source does not say.
    """

    path: Path
    sha256: str
    state: Mapping[str, Tensor]
    model: ModelSection
    exact: bool
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def origin(self) -> dict[str, Any]:
        """What a run records of them, in plain values. :func:`origin_of` reads it back."""
        mean, std = (None if values is None else list(values) for values in (self.mean, self.std))
        path = os.fsencode(self.path).decode(errors="backslashreplace")  # the log and the report are UTF-8
        return {"path": path, "sha256": self.sha256, "mean": mean, "std": std}

    def check_architecture(self, model: ModelSection) -> None:
        """Raise :class:`InitialError` where ``model`` is another network than a run's own, strides included."""
        if not self.exact:
            return
        other = [
            f"model.{spec.name}: {_shape_of(model, spec.name)} against {_shape_of(self.model, spec.name)}"
            for spec in fields(ModelSection)
            if spec.name not in (*FREE, "depth") and _shape_of(model, spec.name) != _shape_of(self.model, spec.name)
        ]
        if other:
            raise InitialError(
                f"--init {self.path}: the recipe's network is another than that of these weights ({'; '.join(other)}); "
                f"leave out --recipe, and settings of [model], to take theirs"
            )

    def fitted(self, network: nn.Module, classes: Sequence[str], say: Callable[[str], None]) -> dict[str, Tensor]:
        """The state dict with which ``network`` begins; its own classifier where that of the weights does not fit.

        Args:
            classes: of the data.
            say: is told in one line what was taken.

        Raises:
            InitialError: anything but the classifier does not fit. The message names the first tensors.
        """
        own, state = network.state_dict(), dict(self.state)
        reason = self._other_head(classes)
        if reason:
            state = {name: value for name, value in state.items() if not _is_head(name)}
            state |= {name: value for name, value in own.items() if _is_head(name)}
        state |= {name: value for name, value in own.items() if name.endswith(UNUSED) and name not in state}
        faults = _faults(state, own)
        if faults:
            raise InitialError(
                f"--init {self.path}: does not fit the network ({'; '.join(faults)}); leave out --recipe, and settings "
                f"of [model], to take the network of the weights, or give other weights"
            )
        head = (
            f"a new classifier for {counted(len(classes), 'class', 'classes')}, because {reason}"
            if reason
            else "the classifier too"
        )
        pixels = "of these weights" if self.mean is not None else "of the data, because the file has none"
        say(
            f"init: {self.path}, sha256 {self.sha256[:8]}…; weights and batch-norm averages, {head}; pixels are "
            f"normalised by the mean and standard deviation {pixels}"
        )
        return state

    def _other_head(self, classes: Sequence[str]) -> str:
        """Why the classifier cannot be taken over, or nothing."""
        bias = self.state.get(f"{HEAD}.bias")
        if bias is None:
            return "the weights have none"
        if bias.numel() != len(classes):
            return f"that of the weights has {bias.numel():,}"
        if self.classes is not None and self.classes != tuple(classes):
            return f"that of the weights was for others ({first_of(self.classes)})"
        return ""


def normalised_as(dataset: Dataset, origin: Mapping[str, Any] | None) -> Dataset:
    """``dataset``, with the mean and standard deviation that came with a run's first weights, if any did."""
    if origin is None or origin["mean"] is None:
        return dataset
    return replace(dataset, mean=tuple(origin["mean"]), std=tuple(origin["std"]))


def origin_of(state: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """What the checkpoint ``state`` of the run in ``folder`` says of its first weights; None where they were random.

    Raises:
        CheckpointError: it cannot have been written by :meth:`Initial.origin`.
    """
    if state.get("origin") is None:
        return None
    origin = Field(state["origin"], "origin")
    try:
        known = {key: origin[key].text(any_bytes=True) for key in ("path", "sha256")}
        known |= {key: origin[key].value for key in ("mean", "std")}
        if known["mean"] is not None or known["std"] is not None:
            normalisation(origin)
    except FieldError as error:
        raise damaged(folder / CHECKPOINT_FILE, error) from error
    return known


def read_initial(given: str | Path) -> Initial:
    """Read weights to begin with.

    Args:
        given: a run folder or its ``weights.safetensors``; a folder of timm or of the Hub (``config.json`` beside
            ``model.safetensors`` or ``pytorch_model.bin``); or a file with the state dict of a ``resnetrs*`` of timm,
            in safetensors or as ``torch.save`` writes it, alone or in a checkpoint. No code in it is run.

    Raises:
        InitialError: nothing there, damaged, or not of this family.
    """
    path = Path(given)
    try:
        path = file_in(path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        content, format = read_content(path)
    except (InitialError, MemoryError):
        raise
    except OSError as error:
        raise InitialError(
            f"--init {path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    except Exception as error:  # whatever the readers stumble over, they say that the file is not what it should be
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InitialError(
            f"--init {path}: damaged, or not the weights of a network alone ({reason[:120]}); give a state dict that "
            f"torch.save or safetensors wrote"
        ) from error
    if format.startswith("rsengine-weights"):
        weights = load_weights(path)
        std = tuple(value or 1.0 for value in weights.std)  # 0 in older files, for a channel without spread
        known = (weights.classes, tuple(weights.mean), std)
        return Initial(path, sha256, weights.model.state_dict(), weights.recipe.model, True, *known)
    state = renamed(path, tensors_in(path, content))
    return Initial(path, sha256, state, architecture_of(path, state), False, None, *timm_normalisation(path))


def _faults(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """How ``state`` differs from the state dict ``own`` of a network, in words; nothing where it fits."""
    both = [name for name in own if name in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} against {tuple(own[name].shape)}"
        for name in both
        if state[name].shape != own[name].shape
    ]
    kinds = [name for name in both if state[name].is_floating_point() != own[name].is_floating_point()]
    bad = [name for name in both if name not in kinds and not _is_usable(name, state[name])]
    found = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": shapes,
        "of another kind of number": kinds,
        "not finite, or a variance below zero": bad,
    }
    return [f"{what}: {first_of(names)}" for what, names in found.items() if names]


def _is_usable(name: str, values: Tensor) -> bool:
    return bool(values.isfinite().all()) and not (name.endswith("running_var") and bool((values < 0).any()))


def _is_head(name: str) -> bool:
    return name.partition(".")[0] == HEAD


def _shape_of(model: ModelSection, name: str) -> Any:
    return model.blocks or DEPTHS[model.depth] if name == "blocks" else getattr(model, name)
