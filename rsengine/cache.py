"""Where this project caches what it can make again: converted data sets, downloads, compiled code."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "RSENGINE_CACHE"


def cache_folder() -> Path:
    """$RSENGINE_CACHE, else $XDG_CACHE_HOME/rsengine, else ~/.cache/rsengine; absolute, need not exist."""
    if value := os.environ.get(VARIABLE):
        return Path(value).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser().absolute() if base else Path.home() / ".cache") / "rsengine"
