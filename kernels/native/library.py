"""The C passes as one shared library: compiled once by the machine's own compiler, then kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rsengine.cache import cache_folder
from rsengine.processor import features

SOURCES = [Path(__file__).with_name(name) for name in ("passes.c", "passes.h")]
# No -ffast-math: NaN must stay NaN. Channels are added up side by side, which needs no reordering of sums.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
COMPILERS = ("cc", "gcc", "clang")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of the functions, by the dtype of the maps


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


def call(name: str, first: Tensor, *others: Tensor | int) -> None:
    """Call the function ``name`` of the library, which must have loaded, for maps of the dtype of ``first``.

    Raises:
        TypeError: a tensor is not what the function reads or writes at its address.
        ValueError: the number of arguments is not the function's.
    """
    arguments = zip(_signatures()[name], (first, *others), strict=True)
    converted = [_converted(parameter, kind, value, first) for (parameter, kind), value in arguments]
    getattr(load()[0], f"{name}_{SUFFIXES[first.dtype]}")(*converted)


@functools.lru_cache(maxsize=1)
def _signatures() -> dict[str, list[tuple[str, str]]]:
    """Name and type (T of a map's element, float, int64_t) of each parameter, read from the functions themselves."""
    found = re.findall(r"^void NAME\((\w+)\)\(([^)]*)\)", SOURCES[1].read_text(encoding="utf-8"), re.MULTILINE)
    parameter = re.compile(r"(?:const )?(T|float|int64_t) (?:\*restrict )?(\w+)$")
    return {
        name: [parameter.match(" ".join(each.split())).group(2, 1) for each in parameters.split(",")]
        for name, parameters in found
    }


def _converted(name: str, kind: str, value: Tensor | int, first: Tensor) -> ctypes.c_void_p | ctypes.c_int64:
    if kind == "int64_t":
        return ctypes.c_int64(value)
    dtype, layout = (first.dtype, torch.channels_last) if kind == "T" else (torch.float32, torch.contiguous_format)
    fits = value.device.type == "cpu" and value.dtype == dtype and value.is_contiguous(memory_format=layout)
    if not fits or (kind == "T" and value.shape != first.shape):
        expected = f"{dtype} {tuple(first.shape)} in channels_last" if kind == "T" else f"contiguous {dtype}"
        got = f"{value.dtype} {tuple(value.shape)} with strides {value.stride()} on {value.device}"
        raise TypeError(f"{name}: expected {expected} on the CPU; got {got}")
    return ctypes.c_void_p(value.data_ptr())


def _compiled(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    # What -march=native depends on: a home folder may be shared by machines of several kinds.
    processor = [platform.machine(), platform.processor(), *sorted(features())]
    key = hashlib.sha256("\0".join([version, *FLAGS, *processor, *(s.read_text() for s in SOURCES)]).encode())
    folder = cache_folder() / "native"
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


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it says nothing"]
    return lines[0].strip()
