"""Whether ``--compile`` can work here, said before training rather than by Inductor in its midst."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rsengine.device import Execution
from rsengine.errors import SettingsError

_REMEDY = "or leave out --compile"
_FIX = f"mend it, name another in CXX, {_REMEDY}"
_SECONDS = 60  # for a program of a few lines
# What the code of Inductor for the CPU includes.
_TRIAL = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint count() { return omp_get_max_threads(); }\n"


def check_compiler(execution: Execution) -> None:
    """Raise :class:`SettingsError` where PyTorch will need a C++ compiler and there is none that works.

    It takes $CXX or g++, on macOS clang++. On a GPU it compiles with Triton instead.
    """
    if execution.device.type != "cpu":
        return
    compiler = shlex.split(os.environ.get("CXX", "")) or ["clang++" if sys.platform == "darwin" else "g++"]
    name = " ".join(compiler)
    options = ["-x", "c++", "-std=c++17", "-fPIC", f"-I{sysconfig.get_path('include')}", "-c", "-"]
    options += [] if sys.platform == "darwin" else ["-fopenmp"]
    with tempfile.TemporaryDirectory(prefix="rsengine-") as folder:
        command = [*compiler, *options, "-o", str(Path(folder) / "trial.o")]
        try:
            done = subprocess.run(
                command, input=_TRIAL, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
            )
        except FileNotFoundError as error:
            raise SettingsError(
                f"--compile: there is no C++ compiler {name}; install one, name one in CXX, {_REMEDY}"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SettingsError(f"--compile: the C++ compiler {name} does not work ({error}); {_FIX}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["silent"]
        raise SettingsError(f"--compile: the C++ compiler {name} does not work ({lines[0].strip()}); {_FIX}")


@contextlib.contextmanager
def compile_errors(is_interrupted: Callable[[], bool]) -> Iterator[None]:
    """In this block, an error of PyTorch's compiler is a :class:`SettingsError` of one line.

    Args:
        is_interrupted: whether the user has pressed Ctrl-C. That ends the C++ compiler too, so the error is a
            ``KeyboardInterrupt`` then.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        if is_interrupted():
            raise KeyboardInterrupt from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        words = f"--compile: PyTorch cannot compile the network here ({reason[:300]}); leave out --compile"
        raise SettingsError(words) from error
