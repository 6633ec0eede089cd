"""Whatever stops a conversion, nothing is left that looks finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert, load_dataset, staging
from rsengine.data.beton import scan as scan_module
from rsengine.data.convert import main
from rsengine.data.sources import images
from rsengine.data.staging import staged_folder
from tests.data.data_builders import class_folders, dead_pid, shared_memory_of, visible

REPOSITORY = Path(__file__).resolve().parents[2]
convert_module = sys.modules["rsengine.data.convert"]  # the package has the function under this name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (convert_module, "open_source"),
        (convert_module, "scan"),
        (convert_module, "write_betons"),
        (convert_module, "_describe"),
        (staging, "_sync_tree"),
        (staging, "_publish"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failure_at_any_point(tmp_path, monkeypatch, module, name, error):
    class_folders(tmp_path / "pets")

    def fail(*arguments: object, **options: object) -> None:
        raise error("stop")

    if name != "write_betons":  # not needed to reach the later points, and slow
        monkeypatch.setattr(convert_module, "write_betons", lambda *arguments, **options: None)
        monkeypatch.setattr(convert_module, "content_identity", lambda *arguments: "")
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(error):
        convert(tmp_path / "pets", tmp_path / "a" / "out", log=lambda line: None)
    assert visible(tmp_path) == []


def slow_main(source: str, out: str, phase: str) -> int:
    """The command line, with a decoder that takes its time once the phase "scan" or "write" is reached."""
    # A run of tests in the background of a shell ignores the signal, and its processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = images.decode_rgb
    written = f".{Path(out).name}.tmp-{os.getpid()}/train.beton"

    def slow(data: bytes, name: str) -> np.ndarray:
        if phase == "scan" or (Path(out).parent / written).exists():
            time.sleep(0.005)
        return plain(data, name)

    images.decode_rgb = slow
    scan_module.KEEP = 0  # so that the writer has to decode
    return main([source, "--out", out, "--workers", "2"])


def started(tmp_path: Path, phase: str) -> tuple[int, Callable[[], tuple[int, str]]]:
    """A conversion in a session of its own, busy with the phase: its process number, and a function that waits for it
    and returns its exit code and what it said to the user.

    For "write" it is forked from here, which saves it the import of FFCV.
    """
    class_folders(tmp_path / "pets", each=400, size=(4, 4))
    (tmp_path / "cache").mkdir()
    errors = (tmp_path / "cache" / "errors").open("w+")
    arguments = [str(tmp_path / "pets"), str(tmp_path / "out"), phase]

    def forked() -> None:
        os.setsid()
        os.dup2(errors.fileno(), 2)
        sys.stderr = errors
        sys.exit(slow_main(*arguments))

    process: subprocess.Popen | BaseProcess
    if phase == "write":
        process = multiprocessing.get_context("fork").Process(target=forked)
        process.start()
    else:
        code = (
            f"import sys; sys.path[:0] = {[str(REPOSITORY)]}; "
            "from tests.data import test_interruption as test; sys.exit(test.slow_main(*sys.argv[1:]))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=errors, start_new_session=True)

    def wait() -> tuple[int, str]:
        if isinstance(process, subprocess.Popen):
            code = process.wait(60)
        else:
            process.join(60)
            code = process.exitcode
        errors.seek(0)
        return code, errors.read()

    wanted = f".out.tmp-{process.pid}/" + ("train.beton" if phase == "write" else "scratch")
    deadline = time.monotonic() + 60
    while not (tmp_path / wanted).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    return process.pid, wait


def members(session: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def assert_all_gone(session: int, shared: set[str]) -> None:
    """No process of the session and none of its shared memory is left, within the time such things take."""
    deadline = time.monotonic() + 20
    while members(session) or set(os.listdir("/dev/shm")) & shared:
        assert time.monotonic() < deadline, (members(session), os.listdir("/dev/shm"))
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "phase"),
    [(signal.SIGTERM, 143, "scan"), (signal.SIGINT, 130, "scan"), (signal.SIGINT, 130, "write")],
)
def test_signals(tmp_path, number, code, phase):
    pid, wait = started(tmp_path, phase)
    shared = shared_memory_of(members(pid))
    if number == signal.SIGINT:
        os.killpg(pid, number)  # to all its processes, as the terminal does
    else:
        os.kill(pid, number)
    begin = time.monotonic()
    assert wait() == (code, "interrupted: nothing was written\n" if number == signal.SIGINT else "")
    assert time.monotonic() - begin < 8
    assert visible(tmp_path) == []
    assert_all_gone(pid, shared)


@pytest.mark.parametrize("phase", ["scan", "write"])
def test_kill_leaves_only_a_folder_that_the_next_conversion_removes(tmp_path, phase):
    pid, wait = started(tmp_path, phase)
    shared = shared_memory_of(members(pid))
    assert len(members(pid)) >= (4 if phase == "write" else 3)  # itself, the writer, two workers
    assert shared or phase == "scan"
    os.kill(pid, signal.SIGKILL)
    assert wait() == (-signal.SIGKILL, "")
    assert_all_gone(pid, shared)
    left = f".out.tmp-{pid}"
    assert visible(tmp_path) == [left]
    with pytest.raises(DataError, match="interrupted"):
        load_dataset(tmp_path / left)
    class_folders(tmp_path / "small" / "pets")
    convert(tmp_path / "small" / "pets", tmp_path / "out", log=lambda line: None)
    assert visible(tmp_path) == ["out", "small"]


def test_leftovers_of_the_living_stay(tmp_path):
    living, dead, other = f".out.tmp-{os.getppid()}", f".out.tmp-{dead_pid()}", f".else.tmp-{dead_pid()}"
    for name in (living, dead, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text("{}")
    with staged_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert visible(tmp_path) == sorted([living, other, "out"])


def test_a_locked_folder_stays_even_if_its_process_cannot_be_seen(tmp_path):
    import fcntl

    name = f".out.tmp-{dead_pid()}"
    (tmp_path / name).mkdir()
    with (tmp_path / name / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with staged_folder(tmp_path / "out"):
            pass
    assert name in visible(tmp_path)


def test_the_same_folder_twice_in_one_process(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        with pytest.raises(DataError, match="already"), staged_folder(tmp_path / "out"):
            pass
        assert folder.exists()
    assert visible(tmp_path) == ["out"]


def test_the_first_of_two_wins(tmp_path):
    with pytest.raises(DataError, match="meanwhile"), staged_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert (tmp_path / "out" / "theirs").read_text() == "x"
    assert visible(tmp_path) == ["out"]


@pytest.fixture
def default_sigterm() -> Iterator[None]:
    """Another handler than the default is left in place, and tests of commands before this one may have set one."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_signal_handlers_are_put_back_and_threads_work(tmp_path, default_sigterm):
    before = signal.getsignal(signal.SIGTERM)
    with staged_folder(tmp_path / "a"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    def work() -> None:
        with staged_folder(tmp_path / "b"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert visible(tmp_path) == ["a", "b"]
