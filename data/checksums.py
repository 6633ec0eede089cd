"""Compare files with their checksums, once on each machine.

A copy that went wrong or a failing disk shows in no structure, and reading a large data set before every run would
take longer than some runs. So a file that was found right leaves a mark in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from rsengine.cache import cache_folder
from rsengine.data.errors import DataError
from rsengine.data.sources.archives import file_digest

MARKS = "verified"  # folder in the cache
RACE_SECONDS = 2.0  # the coarsest clock of a file system; a change within one tick of it would not be seen


def verify_contents(files: Mapping[Path, str]) -> None:
    """Raise DataError unless every file has the sha256 given for it.

    A file is not read again on the machine where it was found right, unless it has changed since by its size, its times
    or its place on the disk. Where the cache folder cannot be written, it is read each time.
    """
    for path, sha256 in files.items():
        mark = _mark(path, sha256)
        with contextlib.suppress(OSError):  # no cache folder: as if there were no mark
            if (cache_folder() / MARKS / mark).exists():
                continue
        if file_digest(path, "sha256") != sha256:
            raise DataError(f"{path}: damaged, its contents have changed since the conversion; convert it again")
        if time.time() - path.stat().st_ctime > RACE_SECONDS and _mark(path, sha256) == mark:
            with contextlib.suppress(OSError):
                (cache_folder() / MARKS).mkdir(parents=True, exist_ok=True)
                (cache_folder() / MARKS / mark).touch()


def _mark(path: Path, sha256: str) -> str:
    """The name of the mark of a file as it is now."""
    status = os.stat(path)
    key = [os.fspath(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
