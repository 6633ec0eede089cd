"""Whether a run goes on with the data it began with, where these are, and how others stand to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsengine.checked import shown
from rsengine.data import DataError, Dataset, identity_of, load_dataset
from rsengine.data.identity import images_in_common
from rsengine.data.paths import BETONS
from rsengine.output import counted
from rsengine.run.checkpoint import CheckpointError
from rsengine.run.files import CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE, utf8_path
from rsengine.run.log import START, LogError, RunLog

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


@dataclass(frozen=True)
class Relation:
    """How a test set stands to the data of a run.

    Attributes:
        kind: ``same``: the run's data; ``same test set``, beside other training images; ``same source``, in another
            split or conversion; ``other``; or ``unknown``.
        words: the same for people.
        trained_on: how many of its images the run was trained on; None where they are the run's own test set, or its
            training images are not there to tell.
    """

    kind: str
    words: str
    trained_on: int | None = None

    def lines(self, dataset: Dataset) -> list[str]:
        """For the user: which data are measured, and whether the run has learned them."""
        count = counted(dataset.test_count, "test image")
        found = [f"measuring {dataset.name}, {count}: {self.words}"]
        if self.trained_on:
            found.append(
                f"warning: the run was trained on {self.trained_on:,} of these {count}; "
                "the accuracy is not that on new images"
            )
        return found


def relation_of(dataset: Dataset, folder: Path) -> Relation:
    """How ``dataset``, which is to be measured, stands to the data of the run in ``folder``, by the run's log.

    Raises:
        DataError: an image of either cannot be read.
    """
    try:
        recorded = _recorded(folder)
    except LogError as error:  # the weights are as good without it
        return Relation("unknown", f"which data the network was trained and tested on is lost ({error})")
    if not recorded.get("identity"):
        return Relation("unknown", "nothing says which data the network was trained and tested on")
    if recorded["identity"] == identity_of(dataset):
        return Relation("same", "the data that the run was trained and tested on")
    sums = recorded.get("sha256") or {}
    trained, tested = (sums.get(split) for split in BETONS)
    if tested is not None and tested == dataset.sha256.get("test"):
        return Relation("same test set", "the test set that the run was tested on, beside other training images")
    own = f"{recorded.get('name')}, {counted(recorded.get('test_images') or 0, 'test image')}"
    if trained is not None and trained == dataset.sha256.get("test"):
        return Relation("same source", f"the training images of the run, which was tested on {own}", dataset.test_count)
    seen = _images_seen(dataset, recorded)
    unseen = "" if seen is not None else "; its training images are not there to compare with"
    if recorded.get("checksum") == dataset.checksum:
        words = f"another split or conversion of the run's source, not what it was tested on ({own})"
        return Relation("same source", words + unseen, seen)
    if "checksum" not in recorded:  # of an older version
        return Relation("other", f"not the data that the run was trained and tested on ({own})", seen)
    return Relation("other", f"other data than the run's ({own}){unseen}", seen)


def _images_seen(dataset: Dataset, recorded: dict[str, Any]) -> int | None:
    """How many test images the run was trained on; None where its data are not there any more, or were changed."""
    try:
        own = load_dataset(recorded["folder"])
    except (DataError, KeyError):
        return None
    if identity_of(own) != recorded["identity"]:
        return None
    return images_in_common(own.train_beton, dataset.test_beton)


def data_of(state: dict[str, Any], folder: Path) -> Dataset | None:
    """The data of the run in ``folder``, whose checkpoint is ``state``, where they were; None where it does not say.

    Raises:
        CheckpointError: they are not there any more, or others are.
    """
    return _where_it_was(state["dataset"], folder / CHECKPOINT_FILE)


def measured_data_of(folder: Path) -> Dataset | None:
    """The data of the run in ``folder`` by its log, where they were; None where it does not say.

    Raises:
        CheckpointError: they are not there any more, or others are.
    """
    try:
        recorded = _recorded(folder)
    except LogError:
        return None  # relation_of says so
    return _where_it_was(recorded, folder / METRICS_FILE) if recorded.get("identity") else None


def _recorded(folder: Path) -> dict[str, Any]:
    """What the log of the run in ``folder`` says of its data. Raises :class:`LogError` where it is damaged."""
    log = RunLog(folder)
    log.check()
    starts = log.records(START)
    return (starts[-1].get("data") if starts else None) or {}


def _where_it_was(saved: dict[str, Any], record: Path) -> Dataset | None:
    """The data that the file ``record`` describes as ``saved``, from their folder."""
    if "folder" not in saved:
        return None
    remedy = "name the run's data with --data"
    try:
        dataset = load_dataset(saved["folder"])
    except DataError as error:
        said = str(error).partition("; ")[0].removeprefix(f"{saved['folder']}: ")
        raise CheckpointError(
            f"{record}: the run was on the data in {saved['folder']}, which cannot be read ({said}); {remedy}"
        ) from error
    if identity_of(dataset) != saved.get("identity"):
        raise CheckpointError(
            f"{record}: the run was on the data in {saved['folder']}, where there are others now; {remedy}"
        )
    return dataset


def refuse_other_data(
    state: dict[str, Any], dataset: Dataset, folder: Path, steps_per_epoch: int, named_by: str = ""
) -> None:
    """Raise :class:`CheckpointError` if the run in ``folder``, whose checkpoint is ``state``, was on other data.

    Older checkpoints have no identity. They are refused where anything that they or the weights beside them say
    contradicts the data: the source, the steps in an epoch, the classes or the mean of the training set. ``named_by``:
    the environment variable that names ``dataset``, where one does.
    """
    saved, given = state["dataset"], describe_data(dataset)
    if "identity" in saved:
        same = saved["identity"] == given["identity"]
    else:
        same = all(saved.get(key) == given[key] for key in ("name", "checksum", "image_size"))
        same = same and state["epoch"] * steps_per_epoch + state["batch"] == int(state["step"]["counter"])
        same = same and _fits_weights(folder / WEIGHTS_FILE, dataset)
    if not same:
        these = f"those that {named_by} names" if named_by else "these"
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE}: the run was on other data ({_in_words(saved)}) than {these} "
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
