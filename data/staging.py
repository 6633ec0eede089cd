"""Write a folder so that it is either complete or not there at all.

Everything goes into a temporary folder `.<name>.tmp-<pid>`, is flushed to the disk and moved into place. Where there is
nothing yet, or a data set to be replaced, the temporary folder lies beside it and is moved as a whole, by one rename or
exchange. An empty folder may be a mount point, the only place where the user may write, or where a shell is at work; so
it stays, the temporary folder lies in it, and the description, which makes it a data set, is moved last.

Whatever stops the work removes the temporary folder; only a `kill -9` or a power cut leaves it, and the next conversion
into the same place removes it then. A lock inside it, which the system releases when its owner dies, distinguishes live
conversions from dead ones, even where two containers share the disk but not the process numbers.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rsengine.data.errors import DataError
from rsengine.data.paths import DESCRIPTION, FILES, TEMPORARY
from rsengine.disk import UNSUPPORTED, sync
from rsengine.temporaries import LOCK, is_abandoned, locked

BY_FILE_SYSTEM = "lost+found"  # in the root of an empty one
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # from <fcntl.h> and <linux/fs.h>


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder which becomes `out` when the block ends, and vanishes when it raises.

    SIGTERM raises SystemExit(143) inside the block when it would otherwise have killed the process outright.

    Raises:
        DataError: `out` exists and is not empty, unless `overwrite` and it holds a converted data set and nothing else;
            or another process put something there meanwhile.
    """
    out = Path(os.path.realpath(out))  # what a link leads to, for a link can be neither filled nor replaced
    _remove_leftovers(out)
    content = _checked_content(out, overwrite)
    made: list[Path] = []
    inside = out.is_dir() and not content
    temporary = (out if inside else out.parent) / f".{out.name}.tmp-{os.getpid()}"
    with _sigterm_raises():
        if temporary.exists():
            raise DataError(f"{out}: this process is converting into it already; wait for it to end")
        try:
            _make_parents(out.parent, made)
            temporary.mkdir()
            with locked(temporary):
                yield temporary
                (temporary / LOCK).unlink()
                _sync_tree(temporary)
                if inside:
                    _fill(out, temporary)
                else:
                    _publish(temporary, out, overwrite)
        except BaseException:
            # Not only errors: Ctrl-C and SIGTERM must not leave half a data set behind either.
            put_back(out)
            if temporary.exists():
                shutil.rmtree(temporary)
            for folder in reversed(made):
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise


def put_back(out: Path) -> None:
    """Put back the data set that an overwriting left renamed when it was killed, if `out` is missing for that reason.

    Raises OSError where it cannot be renamed.
    """
    out = Path(os.path.realpath(out))
    if out.exists():
        return
    for entry in _temporaries(out.parent, out.name):
        if TEMPORARY.match(entry.name)[1] == "old":
            entry.rename(out)
            sync(out.parent)
            return


def _checked_content(out: Path, overwrite: bool) -> set[str]:
    """The names of what is in `out`. Raises DataError where nothing must be written."""
    if not out.exists():
        return set()
    if not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder that does not exist yet with --out")
    content = {entry.name for entry in out.iterdir()} - {BY_FILE_SYSTEM}
    if any(TEMPORARY.match(name) for name in content):
        raise DataError(f"{out}: another process is converting into it; wait for it to end")
    if not content <= FILES:
        other = sorted(content - FILES)[0]
        raise DataError(f"{out}: holds other files ({other}); give an empty or new folder with --out")
    if content and not overwrite:
        raise DataError(f"{out}: already holds a converted data set; add --overwrite to replace it")
    if content and not (os.access(out.parent, os.W_OK) and out.stat().st_dev == out.parent.stat().st_dev):
        raise DataError(f"{out}: cannot be replaced as a whole; remove {', '.join(sorted(content))} from it first")
    return content


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create `folder` and what is missing above it; append what was created to `made`, outermost first."""
    if not folder.exists():
        _make_parents(folder.parent, made)
        folder.mkdir(exist_ok=True)
        made.append(folder)
        sync(folder.parent)


def _temporaries(folder: Path, name: str) -> list[Path]:
    """What dead conversions into a folder `name` left in `folder`."""
    found = []
    for entry in folder.glob(f".{glob.escape(name)}.*-*"):
        match = TEMPORARY.match(entry.name)
        ours = match is not None and entry.name.startswith(f".{name}.{match[1]}-") and entry.is_dir()
        if ours and is_abandoned(entry, int(match[2])):
            found.append(entry)
    return found


def _remove_leftovers(out: Path) -> None:
    """Undo what dead conversions into `out` did."""
    put_back(out)
    for entry in _temporaries(out.parent, out.name):
        shutil.rmtree(entry)
    for entry in _temporaries(out, out.name):
        if not (out / DESCRIPTION).exists():  # so the folder was empty, and they had begun to fill it
            for name in FILES:
                (out / name).unlink(missing_ok=True)
        shutil.rmtree(entry)


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        sync(entry)
    sync(folder)


def _fill(out: Path, temporary: Path) -> None:
    """Move what is in `temporary` into the folder `out` around it."""
    if {entry.name for entry in out.iterdir()} - {BY_FILE_SYSTEM, temporary.name}:
        raise DataError(f"{out}: something was put there meanwhile; remove it or give another --out")
    moved: list[Path] = []
    try:
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == DESCRIPTION):
            if entry.name == DESCRIPTION:
                sync(out)  # all else is there for good before the folder becomes a data set
            moved.append(out / entry.name)
            entry.rename(out / entry.name)
        sync(out)
        temporary.rmdir()
    except BaseException:
        for path in reversed(moved):
            path.unlink(missing_ok=True)
        raise


def _publish(temporary: Path, out: Path, overwrite: bool) -> None:
    """Rename `temporary` to `out`, where there may be a data set."""
    old = None
    if overwrite and out.exists() and _checked_content(out, overwrite):
        if _exchanged(temporary, out):
            sync(out.parent)
            shutil.rmtree(temporary)
            return
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        out.rename(old)
        sync(out.parent)  # a power cut must not leave the second rename alone
    try:
        temporary.rename(out)
    except OSError as error:
        if old is not None:
            old.rename(out)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise DataError(f"{out}: something was put there meanwhile; remove it or give another --out") from None
    sync(out.parent)
    if old is not None:
        shutil.rmtree(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


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
