"""Compiling the C passes, and keeping the library in the user's cache so that it can be loaded without a doubt.

What is loaded runs with all the rights of the user. So the library's name holds a hash of its content, which finds it
damaged; and it is taken only from a folder that nobody but the user (and root) can write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rsengine.cache import cache_folder
from rsengine.processor import features
from rsengine.temporaries import remove_abandoned, remove_folders, temporary_folder

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c")) + sorted(HERE.glob("*.h"))
# No -ffast-math: NaN must stay NaN. Channels are added up side by side, which needs no reordering of sums.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
COMPILERS = ("cc", "gcc", "clang")
LIMIT_SECONDS = 60  # for a compiler, which takes a few: one that hangs is ended
TEMPORARY = re.compile(r"\.passes-\w+\.(?P<pid>\d+)\.tmp")


class BuildError(Exception):
    """Why there is no library: the end of a sentence."""


@contextlib.contextmanager
def built() -> Iterator[tuple[Path, str]]:
    """A library to load inside the block, and a sentence on where it is from.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: there is no place for what it makes.
    """
    if not hasattr(os, "geteuid"):  # Windows
        raise BuildError("this system does not say whose a file is, and code is loaded from the user's own alone")
    compiler = _compiler()
    name = " ".join(compiler)
    key = _key(compiler)
    folder = cache_folder() / "native"
    doubt = _prepare(folder)
    if not doubt and (kept := _kept(folder, key)) is not None:
        remove_folders("native")
        yield kept, f"{name} has compiled the passes for this processor ({kept})"
        return
    with temporary_folder("native") as private:
        path = private / "passes.so"
        _run(
            [*compiler, *FLAGS, *(str(source) for source in SOURCES if source.suffix == ".c"), "-o", str(path)], private
        )
        if not doubt:
            try:
                path = _keep(path, folder, key)
            except OSError as error:
                doubt = f"it cannot be kept in {folder} ({error.strerror})"
        where = f"({path})" if not doubt else f"and will again at the next start, because {doubt}"
        yield path, f"{name} has compiled the passes for this processor {where}"


def _compiler() -> list[str]:
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildError(f"the environment variable CC cannot be read as a command ({error})") from error
    compiler = given or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise BuildError(f"there is no C compiler ({', '.join(COMPILERS)}, or the environment variable CC)")
    return compiler


def _key(compiler: list[str]) -> str:
    """Of all that decides what is compiled."""
    version = _run([*compiler, "--version"])
    # What -march=native depends on: a home folder may be shared by machines of several kinds.
    processor = [platform.machine(), platform.processor(), *sorted(features())]
    parts = [*compiler, version, *FLAGS, *processor, *(source.read_text(encoding="utf-8") for source in SOURCES)]
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:16]


def _prepare(folder: Path) -> str:
    """Make the folder of the cache where it is missing. Returns why no code may be kept there, if so."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o755)  # whatever the umask: nobody else writes, everybody may read
        above = os.stat(folder.parent).st_mode
        if above & stat.S_IWOTH and not above & stat.S_ISVTX:  # the folder could be replaced by another
            return f"everybody can write to {folder.parent} (chmod o-w {shlex.quote(str(folder.parent))})"
        doubt = _doubt(folder)
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    if not doubt:
        remove_abandoned(folder, TEMPORARY)
    return doubt


def _doubt(path: Path) -> str:
    """Why somebody else may have put here what is here, or nothing. A link is judged by itself."""
    status = os.stat(path, follow_symlinks=False)
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user (number {status.st_uid})"
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {path} (chmod go-w {shlex.quote(str(path))})"
    return ""


def _kept(folder: Path, key: str) -> Path | None:
    """The library of this key that is as it was written, by whom it should be. Others of the key are removed."""
    for path in sorted(folder.glob(f"passes-{key}-*.so")):
        try:
            regular = stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode)
            if regular and not _doubt(path) and path.name == _name(key, path.read_bytes()):
                return path
            path.unlink()  # not written over: a process may have it mapped
        except OSError:
            continue  # unreadable, or another process removed it meanwhile
    return None


def _name(key: str, content: bytes) -> str:
    return f"passes-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _keep(path: Path, folder: Path, key: str) -> Path:
    """Copy a library into the cache, whole or not at all: a power cut may follow, and others may compile it too."""
    content = path.read_bytes()
    target, temporary = folder / _name(key, content), folder / f".passes-{key}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _run(command: list[str], folder: Path | None = None) -> str:
    """What a compiler prints. Its own temporary files go into ``folder``."""
    environment = os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    name = shlex.join(command[: 1 if folder else None])
    try:
        # In a session of its own, because a compiler starts others, which have to end with it.
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    except OSError as error:
        raise BuildError(
            f"{command[0]} cannot be started ({error.strerror}); see the environment variable CC"
        ) from error
    try:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{name} has not answered within {LIMIT_SECONDS} seconds and was ended") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()
    if process.returncode:
        lines = errors.decode(errors="replace").splitlines()
        said = [line for line in lines if "error" in line] or lines or [f"exit status {process.returncode}"]
        raise BuildError(f"{command[0]} does not compile the passes: {said[0].strip()}")
    return output.decode(errors="replace")
