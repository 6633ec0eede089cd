"""Whatever stops a conversion, nothing is left that looks finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsengine.data import DataError, convert, load_dataset, staging
from rsengine.data.staging import staged_folder
from tests.data.data_builders import class_folders, dead_pid, start, visible

convert_module = sys.modules["rsengine.data.convert"]  # the package has the function under this name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (convert_module, "open_source"),
        (convert_module, "write_split"),
        (convert_module, "verify_beton"),
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

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(error):
        convert(tmp_path / "pets", tmp_path / "a" / "out", log=lambda line: None)
    assert visible(tmp_path) == []


SLOW = """
import os, signal, sys, time
from rsengine.data.sources import images
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
plain = images.decode_rgb
def slow(data, name):
    time.sleep(0.005)
    return plain(data, name)
images.decode_rgb = slow
from rsengine.data.convert import main
sys.exit(main(sys.argv[1:]))
"""


def started(tmp_path: Path, out: Path) -> subprocess.Popen[str]:
    """A conversion in a session of its own that is writing train.beton, slowly."""
    class_folders(tmp_path / "pets", each=400, size=(4, 4))
    process = start(SLOW, tmp_path / "pets", "--out", out, "--workers", 2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("train.beton")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    return process


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


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(tmp_path, number, code, there):
    if there:
        (tmp_path / "out").mkdir()
    process = started(tmp_path, tmp_path / "out")
    os.killpg(process.pid, number)  # to all its processes, as the terminal does
    begin = time.monotonic()
    said = process.communicate(timeout=60)[1].rpartition("\r")[2]  # after the progress bar
    assert process.returncode == code
    assert said.strip() == ("interrupted: nothing was written" if number == signal.SIGINT else "")
    assert time.monotonic() - begin < 8
    assert visible(tmp_path) == (["out"] if there else [])
    assert not there or not any((tmp_path / "out").iterdir())
    assert members(process.pid) == []


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
def test_kill_leaves_only_a_folder_that_the_next_conversion_removes(tmp_path, there):
    if there:
        (tmp_path / "out").mkdir()
    process = started(tmp_path, tmp_path / "out")
    assert members(process.pid) == [process.pid]  # no helper that could be left
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and members(process.pid) == []
    left = f".out.tmp-{process.pid}"
    assert visible(tmp_path / "out" if there else tmp_path) == [left]
    with pytest.raises(DataError, match="interrupted"):
        load_dataset((tmp_path / "out" if there else tmp_path) / left)
    class_folders(tmp_path / "small" / "pets")
    convert(tmp_path / "small" / "pets", tmp_path / "out", log=lambda line: None)
    assert visible(tmp_path) == ["out", "small"]
    assert visible(tmp_path / "out") == ["dataset.json", "test.beton", "train.beton"]


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
