"""Write a folder so that it is either complete or not there at all.

Everything goes into a temporary sibling `.<name>.tmp-<pid>`, is flushed to the disk and renamed into place. Whatever
stops the work removes the temporary folder; only a `kill -9` or a power cut leaves it, and the next conversion into the
same place removes it then. A lock inside it, which the system releases when its owner dies, distinguishes live
conversions from dead ones, even where two containers share the disk but not the process numbers.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rsengine.data.dataset import FILES, TEMPORARY
from rsengine.data.errors import DataError
from rsengine.disk import sync
from rsengine.temporaries import LOCK, is_abandoned, locked


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder which becomes `out` when the block ends, and vanishes when it raises.

    SIGTERM raises SystemExit(143) inside the block when it would otherwise have killed the process outright.

    Raises:
        DataError: `out` exists and is not empty, unless `overwrite` and it holds a converted data set and nothing else;
            or another process put something there meanwhile.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, overwrite)
    made = _make_parents(out.parent)
    _remove_leftovers(out)
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    with _sigterm_raises():
        if temporary.exists():
            raise DataError(f"{out}: this process is converting into it already; wait for it to end")
        try:
            temporary.mkdir()
            with locked(temporary):
                yield temporary
                (temporary / LOCK).unlink()
                _sync_tree(temporary)
                _publish(temporary, out, overwrite)
        except BaseException:
            # Not only errors: Ctrl-C and SIGTERM must not leave half a data set behind either.
            if temporary.exists():
                shutil.rmtree(temporary)
            for folder in reversed(made):
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder that does not exist yet with --out")
    content = {entry.name for entry in out.iterdir()}
    if not content:
        return
    if not content <= FILES:
        other = sorted(content - FILES)[0]
        raise DataError(f"{out}: holds other files ({other}); give an empty or new folder with --out")
    if not overwrite:
        raise DataError(f"{out}: already holds a converted data set; add --overwrite to replace it")


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and what is missing above it; return what was created, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
    return missing[::-1]


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of dead conversions into `out`; put back an overwritten data set that an interruption
    left renamed."""
    for entry in out.parent.iterdir():
        match = TEMPORARY.match(entry.name)
        if match is None or not entry.name.startswith(f".{out.name}.{match[1]}-") or not entry.is_dir():
            continue
        if not is_abandoned(entry, int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            entry.rename(out)
        else:
            shutil.rmtree(entry)


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        sync(entry)
    sync(folder)


def _publish(temporary: Path, out: Path, overwrite: bool) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if overwrite and out.exists():
        _check_free(out, overwrite)  # it may have changed during the minutes of the conversion
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError as error:
        if old.exists():
            old.rename(out)
        raise DataError(f"{out}: something was put there meanwhile; remove it or give another --out") from error
    sync(out.parent)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143) for the block, if it would kill the process; a caller's handler stays."""
    replaceable = threading.current_thread() is threading.main_thread()
    if not replaceable or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
