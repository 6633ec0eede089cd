"""Whether a run goes on with the data it began with, and where these are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rsengine.checked import shown
from rsengine.data import DataError, Dataset, identity_of, load_dataset
from rsengine.output import counted
from rsengine.run.checkpoint import CheckpointError
from rsengine.run.files import CHECKPOINT_FILE, WEIGHTS_FILE, utf8_path

OPTIONS = ("size", "test_fraction", "validation", "seed")  # of the conversion, those that make other splits


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint keeps about its data set: the identity, which decides, and what tells a person more."""
    return {
        "identity": identity_of(dataset),
        "name": dataset.name,
        "folder": str(dataset.folder.absolute()),
        "checksum": dataset.checksum,
        "image_size": list(dataset.image_size),
        "counts": [dataset.train_count, dataset.test_count],
        "options": {key: dataset.options[key] for key in OPTIONS if dataset.options.get(key) is not None},
    }


def data_of(state: dict[str, Any], folder: Path) -> Dataset | None:
    """The data of the run in ``folder``, whose checkpoint is ``state``, where they were; None where it does not say.

    Raises:
        CheckpointError: they are not there any more, or others are.
    """
    saved = state["dataset"]
    if "folder" not in saved:
        return None
    remedy = "name the run's data with --data"
    try:
        dataset = load_dataset(saved["folder"])
    except DataError as error:
        said = str(error).partition("; ")[0].removeprefix(f"{saved['folder']}: ")
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE}: the run was on the data in {saved['folder']}, which cannot be read ({said}); "
            f"{remedy}"
        ) from error
    if identity_of(dataset) != saved.get("identity"):
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE}: the run was on the data in {saved['folder']}, where there are others now; "
            f"{remedy}"
        )
    return dataset


def refuse_other_data(state: dict[str, Any], dataset: Dataset, folder: Path, steps_per_epoch: int) -> None:
    """Raise :class:`CheckpointError` if the run in ``folder``, whose checkpoint is ``state``, was on other data.

    Older checkpoints have no identity. They are refused where anything that they or the weights beside them say
    contradicts the data: the source, the steps in an epoch, the classes or the mean of the training set.
    """
    saved, given = state["dataset"], describe_data(dataset)
    if "identity" in saved:
        same = saved["identity"] == given["identity"]
    else:
        same = all(saved.get(key) == given[key] for key in ("name", "checksum", "image_size"))
        same = same and state["epoch"] * steps_per_epoch + state["batch"] == int(state["step"]["counter"])
        same = same and _fits_weights(folder / WEIGHTS_FILE, dataset)
    if not same:
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE}: the run was on other data ({_in_words(saved)}) than these "
            f"({_in_words(given)}); name its data with --data, or convert their source again with the same options"
        )


def _in_words(data: dict[str, Any]) -> str:
    words = [str(data.get("name"))[:200]]
    if "counts" in data:
        words.append(f"{data['counts'][0]:,} + {counted(data['counts'][1], 'image')}")
    words += [f"--{key.replace('_', '-')} {shown(value)}" for key, value in data.get("options", {}).items()]
    words += [f"in {data['folder']}"] if "folder" in data else []
    key = "identity" if "identity" in data else "checksum"  # they differ where nothing else does
    return ", ".join([*words, f"{key} {str(data.get(key))[:8]}…"])


def _fits_weights(path: Path, dataset: Dataset) -> bool:
    """Whether the weights, if there are any, learned the classes and the mean colour of this data set."""
    from safetensors import SafetensorError, safe_open

    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            metadata = file.metadata() or {}
        return all(json.loads(metadata[key]) == list(getattr(dataset, key)) for key in ("classes", "mean"))
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return True  # none, or none that can be read
