"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from rsengine.data.errors import DataError


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home folder for a leading ``~``. Raises DataError where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no home folder to stand for ~; give the whole path") from error
