"""The files of a run folder, and writing them so that a kill or a power cut leaves the old one or the new one whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rsengine.temporaries import remove_abandoned

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE, BEST_FILE = "checkpoint.pt", "best.pt"
WEIGHTS_FILE = "weights.safetensors"
REPORT_FILE = "report.md"
CURVES_FILE, CONFUSION_FILE, AUGMENTED_FILE = "curves.png", "confusion.png", "augmented.png"

TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.tmp")  # names of files that are being written


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on leaving the block it is synced to disk and takes its place.

    If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` through :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_path` in ``folder`` whose writers were killed."""
    remove_abandoned(folder, TEMPORARY)
