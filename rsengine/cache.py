"""Where this project caches what it can make again: converted data sets, downloads, compiled code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "RSENGINE_CACHE"
# Where others keep compiled code by their own variables; without these, beside the program, in the home folder or in a
# folder named after the user, or they fail.
_COMPILERS = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def cache_folder() -> Path:
    """$RSENGINE_CACHE, else $XDG_CACHE_HOME/rsengine, else ~/.cache/rsengine; absolute, need not exist.

    A user without a home folder gets a private one under the system's folder for temporary files.

    Raises:
        OSError: a variable begins with ``~`` and there is no home folder, or the private folder is someone else's.
    """
    for name, below in ((VARIABLE, ""), ("XDG_CACHE_HOME", "rsengine")):
        if value := os.environ.get(name):
            folder = Path(os.path.expanduser(value))
            if str(folder).startswith("~"):
                raise OSError(f"{name}={value}: there is no home folder to stand for ~; give the whole path")
            return folder.absolute() / below
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "rsengine" if home != "~" else _private_folder()


def keep_compiled_code() -> None:
    """Let numba, Inductor and Triton keep what they compile in the cache folder too, unless told otherwise.

    By themselves they need a home folder that can be written, or a user with a name, and end without one. matplotlib
    then complains, so without such a home it gets a place here too. Call this before the first of them is imported.
    Where the cache folder cannot be written, a private temporary folder takes its place.
    """
    wanted = dict(_COMPILERS)
    home = os.path.expanduser("~")
    if home == "~" or not os.access(home, os.W_OK | os.X_OK):
        wanted["MPLCONFIGDIR"] = "matplotlib"
    missing = {name: below for name, below in wanted.items() if name not in os.environ}
    if not missing:
        return
    folder = cache_folder()
    if not _can_be_made(folder):
        folder = _private_folder()
    os.environ.update({name: str(folder / below) for name, below in missing.items()})


def _can_be_made(folder: Path) -> bool:
    """Whether there can be a ``folder`` to write into; it is made by trying, as rights alone do not tell."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """A folder of this user alone, made now: compiled code that others could write must not be loaded."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"rsengine-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or (hasattr(os, "getuid") and (status.st_uid != user or status.st_mode & 0o022)):
        raise OSError(f"{folder}: others may write there; set {VARIABLE} to a folder of your own")
    return folder
