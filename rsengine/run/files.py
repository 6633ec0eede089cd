"""The files of a run folder, and writing them so that a kill or a power cut leaves the old one or the new one whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rsengine.data.errors import UserError
from rsengine.disk import sync
from rsengine.temporaries import remove_abandoned, temporary_folder

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE, BEST_FILE = "checkpoint.pt", "best.pt"
WEIGHTS_FILE = "weights.safetensors"
REPORT_FILE, PAGE_FILE = "report.md", "report.html"
LOCK_FILE = ".lock"
CURVES_FILE, CONFUSION_FILE, AUGMENTED_FILE = "curves.png", "confusion.png", "augmented.png"

TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.tmp")  # names of files that are being written


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "your share of the disk is used up; free some space and start again",
    errno.EFBIG: "it is larger than files may be here; raise the limit (ulimit -f) and start again",
    errno.EEXIST: "what has that name is not a folder; name another with --out",
    errno.ENOTDIR: "what has that name, or one above it, is not a folder; name another with --out",
    errno.EISDIR: "a folder has that name; name another with --out",
    errno.EROFS: "the disk can only be read; name another folder with --out",
}


class WriteError(UserError, OSError):
    """A file of a run that cannot be written. The message is one line with the remedy."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        remedy = _REMEDIES.get(self.errno, "check the disk and the folder's permissions")
        return f"{self.filename}: cannot be written ({self.strerror}): {remedy}; what was saved before is whole"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """In this block an OSError is one of writing ``path``, and becomes a :class:`WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on leaving the block it is synced to disk and takes its place.

    If the block raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        WriteError: the disk refuses it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` through :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path to ``path`` for a library that takes UTF-8 alone: a link in this block, where a name has other bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with temporary_folder("path") as folder:
            link = folder / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_path` in ``folder`` whose writers were killed."""
    remove_abandoned(folder, TEMPORARY)
