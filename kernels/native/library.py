"""The C passes as one shared library: compiled once by the machine's own compiler, then kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("passes.c", "passes.h")]
# No -ffast-math: NaN must stay NaN. Channels are added up side by side, which needs no reordering of sums.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
COMPILERS = ("cc", "gcc", "clang")


@functools.lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None``; and a sentence on why. Compiles for about a second where the cache does not have it."""
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return None, f"there is no C compiler ({', '.join(COMPILERS)}, or the environment variable CC)"
    name = " ".join(compiler)
    try:
        path = _compiled(compiler)
        return ctypes.CDLL(str(path)), f"{name} has compiled the passes for this processor ({path})"
    except subprocess.CalledProcessError as error:
        return None, f"{name} does not compile the passes: {_first_error(error.stderr)}"
    except OSError as error:
        return None, f"the compiled passes cannot be kept or loaded: {error}"


def call(name: str, suffix: str, *arguments: Tensor | int) -> None:
    """Call ``name_suffix`` of the library, which must have loaded: tensors as addresses, integers as int64_t."""
    function = getattr(load()[0], f"{name}_{suffix}")
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments))


def _compiled(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([version, *FLAGS, _processor(), *(s.read_text() for s in SOURCES)]).encode())
    folder = _cache_folder() / "native"
    path = folder / f"passes-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [*compiler, *FLAGS, str(SOURCES[0]), "-o", temporary]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(temporary, path)  # whole or not at all: others may be compiling it too
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _cache_folder() -> Path:
    """As rsengine.data has it, which this room does not know."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(os.environ.get("RSENGINE_CACHE") or (Path(base) if base else Path.home() / ".cache") / "rsengine")


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it says nothing"]
    return lines[0].strip()
