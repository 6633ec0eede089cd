"""Paths as users write them, and the names in a converted data set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rsengine.data.errors import DataError

DESCRIPTION = "dataset.json"
BETONS = {"train": "train.beton", "test": "test.beton"}
FILES = frozenset({DESCRIPTION, *BETONS.values()})
TEMPORARY = re.compile(r"^\..+\.(tmp|old)-(\d+)$")  # names of folders under construction or on their way out


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home folder for a leading ``~``. Raises DataError where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no home folder to stand for ~; give the whole path") from error


def convert_command() -> str:
    """How to start the conversion from here: by its file in a checkout, by its module anywhere else."""
    script = Path("data", "convert.py")
    here = Path(__file__).resolve().with_name("convert.py")
    return f"python {script.as_posix()}" if script.resolve() == here else "python -m rsengine.data"
