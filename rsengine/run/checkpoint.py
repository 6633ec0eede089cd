"""Checkpoints: everything a run needs to resume bit for bit, in one file, written atomically and checked when read."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from rsengine.data.errors import UserError
from rsengine.run.files import atomic_path

_FORMAT = "rsengine-checkpoint"
_VERSION = 1
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
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": _FORMAT, "version": _VERSION, **state}, temporary)
        except RuntimeError:
            _ask_disk(temporary)
            raise


def _ask_disk(path: Path) -> None:
    """Raise the OSError that PyTorch's writer keeps to itself, by adding to the file that it could not finish."""
    with open(path, "ab") as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, unpickling tensors and plain values only.

    Raises:
        CheckpointError: there is none, or it is truncated, damaged, foreign or of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there; start the run without --resume")
    state = _read(path)
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{path}: incomplete, it lacks {', '.join(missing)}; use another checkpoint")
    return state


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        if not mmap:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not check the sums
            if damaged is not None:
                raise CheckpointError(f"{path}: damaged (checksum of {damaged}); use another checkpoint or remove it")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({reason[:120]}); use another checkpoint or move it out of the way"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of rsengine; move it out of the way or choose another --out")
    if state.get("version") != _VERSION:
        raise CheckpointError(f"{path}: checkpoint version {state.get('version')}, this program reads {_VERSION}")
    return state
