"""Run folders: made for one run alone, found again by the name of its recipe, and written by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from rsengine.data.errors import UserError
from rsengine.disk import sync
from rsengine.run.files import CHECKPOINT_FILE, LOCK_FILE, RECIPE_FILE, writing
from rsengine.text import parse_toml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUNS = Path("runs")
_LONGEST = 100  # characters of a recipe's name in that of a folder; file systems allow 255 bytes


class FolderError(UserError):
    """A run folder that is taken, or not there. The message is one line with the remedy."""


def make_run_folder(name: str, now: datetime.datetime | None = None) -> Path:
    """Make ``runs/NAME-TIME`` for a run of the recipe ``name``, with a number behind it where others have that."""
    make_folder(RUNS)
    stem = f"{_word(name)}-{now or datetime.datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        folder = RUNS / (stem if number == 1 else f"{stem}-{number}")
        with writing(folder):
            try:
                folder.mkdir()  # of several processes, one succeeds
                sync(RUNS)
                return folder
            except FileExistsError:
                number += 1


def make_folder(folder: Path) -> None:
    """Make ``folder``, and those above it that are missing, so that a power cut does not take away what is saved there.

    Raises:
        WriteError: the disk refuses it.
    """
    with writing(folder):
        missing = [each for each in folder.absolute().parents if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in [*missing, folder.absolute()]:
            sync(each.parent)  # its name is there


def latest_run(name: str) -> Path:
    """The newest folder of :func:`make_run_folder` for ``name`` with a checkpoint. Raises :class:`FolderError`."""
    form = re.compile(re.escape(_word(name)) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    found = []
    for folder in RUNS.iterdir() if RUNS.is_dir() else ():
        match = form.fullmatch(folder.name)
        if match and (folder / CHECKPOINT_FILE).is_file() and _name_in(folder, name) == name:
            found.append((match[1], int(match[2] or 1), folder))
    if not found:
        raise FolderError(
            f"--resume: no run of recipe {name} with a checkpoint under {RUNS}/; name its folder with --out"
        )
    return max(found)[2]


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder``, which exists, against other processes in this block. The lock ends with the process.

    On a file system or a system without locks, one line says so, and nothing is held.

    Raises:
        FolderError: another process holds it; the message says which.
    """
    path = folder / LOCK_FILE
    descriptor = _take(path, say)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a word on its owner
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())  # Windows has no pwrite
        yield
    finally:
        # Before it is let go: whoever opened it meanwhile sees that it is another file. One left there, as on Windows,
        # which removes no open file, holds nothing, and the next process takes it over.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path, say: Callable[[str], None]) -> int:
    """A descriptor of the lock file, held."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: child processes would hold it too
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FolderError(
                f"{path.parent}: {owner} is writing this run; wait until it ends, or name another folder with --out"
            ) from error
        except OSError as error:
            say(f"run: no lock on {path.parent} ({error.strerror or error}); start no other run there meanwhile")
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its owner ended between the two calls and took the file away


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _word(name: str) -> str:
    """``name`` as a part of one file name."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", "-", name)[:_LONGEST]


def _name_in(folder: Path, otherwise: str) -> str:
    """The recipe's name in a run folder: two names may give the same word."""
    try:
        name = parse_toml((folder / RECIPE_FILE).read_text("utf-8")).get("name", otherwise)
    except (OSError, ValueError):
        return otherwise
    return name
