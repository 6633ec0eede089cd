"""Temporary files and folders whose names say which process made them, so that those of the dead can be removed.

A process that is killed removes nothing. Whoever uses the place next does it, and leaves alone what a living process
may still need: one with that number, or one that holds the lock, which another container's may without being seen here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # in a temporary folder; the system releases it when its owner dies


def is_alive(pid: int) -> bool:
    """Whether a process with this number exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's process
    return True


def is_abandoned(path: Path, pid: int) -> bool:
    """Whether ``path``, made by process ``pid``, is needed no longer: it is dead, and nobody holds the lock.

    Our own number counts as dead too, for a container that is started again after a kill often gets the same one. So
    ask before this process makes something there.
    """
    return not (pid != os.getpid() and is_alive(pid)) and not _is_locked(path)


def remove_abandoned(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Remove what dead processes left in ``folder``: this user's entries whose whole name matches ``pattern``, with the
    process's number in the group ``pid``. What cannot be removed stays, for it is in nobody's way.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = pattern.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if match and _is_own(path) and is_abandoned(path, int(match["pid"])):
                    if stat.S_ISDIR(path.lstat().st_mode):
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                    removed.append(path)
    return removed


def _is_own(path: Path) -> bool:
    """Whether a file is the user's. Windows does not say whose one is, and lets nobody else's be removed."""
    return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()


@contextlib.contextmanager
def temporary_folder(purpose: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder of one's own in ``parent`` (the system's folder for temporary files), removed on leaving the block.

    Before, those that dead processes left there for the same ``purpose`` are removed.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_folders(purpose, parent)
    prefix = f".rsengine-{purpose}-{os.getpid()}-"
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name,
        locked(Path(name)),
    ):
        yield Path(name)


def remove_folders(purpose: str, parent: Path | None = None) -> None:
    """Remove what dead processes left of :func:`temporary_folder`. Whoever may need none this time calls this alone:
    the dead may have had all done but the removal."""
    start = re.escape(f".rsengine-{purpose}-")
    remove_abandoned(parent or Path(tempfile.gettempdir()), re.compile(rf"{start}(?P<pid>\d+)-\w+"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``; where the system or the file system has none, do without."""
    with (folder / LOCK).open("w") as file:
        with contextlib.suppress(OSError):
            _lock(file)
        yield


def _is_locked(path: Path) -> bool:
    try:
        with (path / LOCK).open("r") as file:
            _lock(file)
    except BlockingIOError:
        return True
    except OSError:  # it has none: a file, a folder that was just begun, a file system without locks
        return False
    return False


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
