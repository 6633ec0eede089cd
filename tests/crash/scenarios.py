"""What is recorded: run in a process of its own under the recorder, by ``python -m tests.crash.scenarios``.

With faults, the scenario is run once for each, in a process that is forked from the first and has all imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.crash.simulator import Operation, Tree, build, read_record

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("recorder.c")


# ---- in the process that is recorded ---------------------------------------------------------------------------------


def write(folder: Path, how: str) -> int:
    """A file of two is replaced, as it should be or with a fault."""
    from rsengine.run import files

    if how == "unsynced":
        files.sync = lambda path: None
    if how == "in place":
        (folder / "file").write_bytes(b"new" * 100)
    else:
        files.write_atomically(folder / "file", b"new" * 100)
    return 0


def ways(folder: Path) -> int:
    """Files are written, copied, renamed and removed in the ways of the libraries that runs and conversions use."""
    import numpy as np
    import torch

    np.arange(300).tofile(folder / "by C")
    np.save(folder / "array.npy", np.arange(300))
    memory = np.memmap(folder / "mapped", np.uint8, "w+", shape=(5000,))
    memory[100:200] = 7
    memory.flush()
    del memory
    torch.save({"tensor": torch.arange(5000)}, folder / "tensors.pt")
    shutil.copyfile(folder / "tensors.pt", folder / "copy.pt")
    (folder / "in").mkdir()
    (folder / "in" / "text").write_text("text")
    shutil.copytree(folder / "in", folder / "out")
    os.rename(folder / "in", folder / "moved")
    (folder / "moved" / "text").rename(folder / "text")
    shutil.rmtree(folder / "out")
    with open(folder / "text", "r+b") as file:
        file.seek(2)
        os.write(file.fileno(), b"123")
        os.pwrite(file.fileno(), b"4", 0)
        os.writev(file.fileno(), [b"56", b"7"])
        file.truncate(7)
    with open(folder / "text", "ab") as file:
        file.write(b"8")
    os.replace(folder / "text", folder / "by C")
    return 0


def train(folder: Path, *arguments: str) -> int:
    from rsengine import train as command

    return command.main([*arguments, "--out", str(folder / "run")])


def converted(folder: Path, source: str, *options: str) -> int:
    from rsengine.data.convert import main

    return main([source, "--out", str(folder / "out"), *options])


def cached(folder: Path, source: str) -> int:
    """A data set is converted into the cache."""
    os.environ["RSENGINE_CACHE"] = str(folder / "cache")
    from rsengine.data import find_dataset
    from rsengine.errors import run_command

    return run_command(lambda: find_dataset(source, log=print) and 0)


def library(folder: Path) -> int:
    """The compiled passes are loaded, from the cache or made anew."""
    os.environ["RSENGINE_CACHE"] = str(folder / "cache")
    tempfile.tempdir = str(folder / "tmp")  # not through $TMPDIR, where Python tries to write first
    from rsengine.kernels.native import library

    found, reason = library.load.__wrapped__()
    print(reason)
    return 0 if found else 1


_ALL = (write, ways, train, converted, cached, library)
SCENARIOS: dict[str, Callable[..., int]] = {each.__name__: each for each in _ALL}


def main(name: str, folder: str, arguments: str, faults: str) -> None:
    run = SCENARIOS[name]
    if name == "train":  # what a run imports late
        import matplotlib.pyplot  # noqa: F401
        import torch._dynamo  # noqa: F401

        from rsengine import train as _  # noqa: F401
        from rsengine.input.choose import ffcv_problem

        ffcv_problem()  # imports FFCV where it can be
    recorder = ctypes.CDLL(None)
    recorder.recorder_begin.argtypes = ctypes.c_long, ctypes.c_int
    os.environ["RECORDER_ON"] = "1"  # in processes that are started from here
    if not json.loads(faults):
        recorder.recorder_begin(0, 0)
        sys.exit(run(Path(folder), *json.loads(arguments)))
    for number, error, place in json.loads(faults):
        pid = os.fork()
        if not pid:
            status = 70
            try:
                os.environ |= {"RECORDER_ROOT": place, "RECORDER_LOG": os.devnull}
                output = os.open(f"{place}.said", os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(os.open(f"{place}.error", os.O_WRONLY | os.O_CREAT), 2)
                recorder.recorder_begin(number, error)
                status = run(Path(place), *json.loads(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        Path(f"{place}.status").write_text(str(status))


# ---- in the tests ----------------------------------------------------------------------------------------------------


def compiled(folder: Path) -> Path:
    """The recorder, compiled into ``folder``."""
    target = folder / "recorder.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", SOURCE, "-o", target, "-ldl"], check=True)
    return target


@dataclass(frozen=True)
class Failed:
    """What came of one fault."""

    status: int
    said: str
    error: str
    folder: Path


@dataclass(frozen=True)
class Recorder:
    """Runs scenarios. ``library``: the compiled recorder; ``scratch``: a folder for records."""

    library: Path
    scratch: Path

    def record(self, name: str, folder: Path, *arguments: str) -> list[Operation]:
        """The operations of a scenario in ``folder``, which must end well."""
        log = self.scratch / "record"
        log.unlink(missing_ok=True)
        result = self._run(name, folder, arguments, [], log)
        assert result.returncode == 0, result.stdout + result.stderr
        return read_record(log, folder)

    def fail(
        self, name: str, faults: Sequence[tuple[int, int]], *arguments: str, before: Tree | None = None
    ) -> list[Failed]:
        """Run a scenario once for each fault: the number of the operation, and its errno. ``before``: what is there."""
        folders = [self.scratch / "faults" / str(i) for i in range(len(faults))]
        shutil.rmtree(self.scratch / "faults", ignore_errors=True)
        for each in folders:
            build(before or {}, each)
        plan = [(number, error, str(place)) for (number, error), place in zip(faults, folders, strict=True)]
        result = self._run(name, folders[0], arguments, plan, Path(os.devnull))
        assert result.returncode == 0, result.stdout + result.stderr

        def read(place: Path, end: str) -> str:
            return Path(f"{place}.{end}").read_text()

        return [Failed(int(read(each, "status")), read(each, "said"), read(each, "error"), each) for each in folders]

    def _run(self, name, folder, arguments, faults, log) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "LD_PRELOAD": str(self.library),
            "RECORDER_ROOT": str(folder),
            "RECORDER_LOG": str(log),
            "OMP_NUM_THREADS": "1",  # processes are forked
        }
        command = [sys.executable, "-m", "tests.crash.scenarios", name, str(folder)]
        command += [json.dumps(arguments), json.dumps(faults)]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
