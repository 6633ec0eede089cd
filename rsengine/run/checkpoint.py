"""Checkpoints: everything a run needs to resume bit for bit, in one file, written atomically and checked when read."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rsengine.checked import Field, FieldError, shown
from rsengine.config import MOST_EPOCHS
from rsengine.data.errors import UserError
from rsengine.run.files import BEST_FILE, atomic_path
from rsengine.run.tensors import is_plain

_FORMAT = "rsengine-checkpoint"
_VERSION = 1
_MOST = 2**53  # steps and images of a run: no run has as many, and floats hold these exactly
_KEYS = ("recipe", "versions", "dataset", "epoch", "batch", "seconds", "totals", "best", "step", "rng")


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message is one line with the remedy."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists and dicts of them) to ``path``, atomically.

    Raises:
        CheckpointError: ``path`` holds something that is not a checkpoint of this program; it is left alone.
        WriteError: the disk refuses it; an older checkpoint stays as it was.
    """
    if path.exists():
        _read(path, mmap=True)
    content = io.BytesIO()  # where PyTorch writes to a file itself, it keeps to itself what the disk answers
    torch.save({"format": _FORMAT, "version": _VERSION, **state}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, unpickling tensors and plain values only, and check all but its ``step``, which
    only the network of its recipe can check.

    Raises:
        CheckpointError: there is none, or it is truncated, damaged, foreign or of another version, or a value in it is
            of another type or out of its range.
    """
    if not path.is_file():
        otherwise = "start the run without --resume"
        raise CheckpointError(f"{path}: no checkpoint there; {_from_best(path) or otherwise}")
    state = _read(path)
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{path}: incomplete, it lacks {', '.join(missing)}; {_remedy(path)}")
    try:
        _check(Field(state))
    except FieldError as error:
        raise damaged(path, error) from error
    return state


def damaged(path: Path, error: FieldError) -> CheckpointError:
    """The error for a checkpoint with a wrong field."""
    return CheckpointError(f"{path}: {error}; {_remedy(path)}")


def _check(state: Field) -> None:
    """Raise FieldError unless everything has the type and the range that a run gives it."""
    state["recipe"].text()
    for version in state["versions"].fields():
        version.text()
    state["epoch"].integer(0, MOST_EPOCHS)
    state["batch"].integer(0, _MOST)
    state["seconds"].number(0, 1e300)
    totals = state["totals"]
    for name in ("epoch_seconds", "loss"):
        totals[name].number(0, 1e300)
    for name in ("correct", "images"):
        totals[name].integer(0, _MOST)
    if len(totals.mapping()) != 4:
        raise totals.error("four sums")
    state["best"]["accuracy"].number(-1, 1)
    state["best"]["epoch"].integer(0, MOST_EPOCHS)
    _check_data(state["dataset"])
    state["step"].mapping()
    generator = state["rng"]["cpu"]
    if not _is_bytes(generator.value):
        raise generator.error("the state of a random number generator")
    try:
        torch.Generator().set_state(generator.value)
    except RuntimeError as error:
        raise generator.error("the state of a random number generator", str(error)) from error
    if (other := state["rng"]["cuda"]).value is not None and not _is_bytes(other.value):
        raise other.error("the state of a random number generator, or none")


def _check_data(data: Field) -> None:
    """Older checkpoints say less about their data."""
    for key in ("name", "checksum", "identity"):
        if key in data:
            data[key].text()
    if "folder" in data:
        data["folder"].text(any_bytes=True)
    if "image_size" in data:
        for side in data["image_size"].items(2):
            side.integer(1, _MOST)
    if "counts" in data:
        for count in data["counts"].items(2):
            count.integer(0, _MOST)
    if "options" in data:
        data["options"].mapping()


def _is_bytes(value: object) -> bool:
    return is_plain(value) and value.dtype == torch.uint8 and value.dim() == 1


def _remedy(path: Path) -> str:
    return _from_best(path) or "start a new run with another --out"


def _from_best(path: Path) -> str:
    """What to do without the checkpoint ``path``, where there is that of the best epoch; else nothing."""
    best = path.with_name(BEST_FILE)
    return f"copy {best.name} over it to go on from the best epoch" if path != best and best.is_file() else ""


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        if not mmap:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if (
                    any(each.compress_type for each in members)
                    or sum(e.file_size for e in members) > path.stat().st_size
                ):
                    raise ValueError("it would grow when it is unpacked")
                wrong = archive.testzip()  # torch.load does not check the sums
            if wrong is not None:
                raise CheckpointError(f"{path}: damaged (checksum of {wrong}); {_remedy(path)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that only a forged one holds
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (CheckpointError, MemoryError):
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # a damaged or forged pickle or zip can make both modules raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # of which PyTorch says much
            reason = "it holds other than tensors and plain values"
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason[:120]}); {_remedy(path)}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of rsengine; move it out of the way or choose another --out")
    version = state.get("version")
    if type(version) is not int or version != _VERSION:
        raise CheckpointError(f"{path}: checkpoint version {shown(version)}, this program reads {_VERSION}")
    return state
