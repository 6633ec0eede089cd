"""A data set appears as a whole, where it is wanted, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from rsengine.data import DataError, convert, find_dataset, load_dataset, staging
from rsengine.data.staging import staged_folder
from tests.data.data_builders import class_folders, dead_pid, start, visible


@pytest.mark.parametrize(("number", "words"), [(errno.ENOTEMPTY, "meanwhile"), (errno.EIO, "no; check the path")])
def test_a_failed_overwrite_leaves_the_old_data_set(tmp_path, monkeypatch, number, words):
    class_folders(tmp_path / "pets")
    before = convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)

    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(number, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
    with pytest.raises(DataError, match=words):
        convert(tmp_path / "pets", tmp_path / "out", overwrite=True, size=4, log=lambda line: None)
    assert load_dataset(tmp_path / "out") == before
    assert visible(tmp_path) == ["out"]


KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from rsengine.data import staging
from rsengine.data.convert import main
plain, count = Path.rename, int(sys.argv.pop(1))
def rename(self, target):
    global count
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    return plain(self, target)
Path.rename = rename
staging._exchanged = lambda one, other: False
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("use", ["load_dataset", "find_dataset", "convert", "overwrite"])
def test_an_overwriting_killed_between_its_renames_is_undone_by_whoever_comes_next(tmp_path, use):
    class_folders(tmp_path / "pets")
    before = convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    process = start(KILLED_AT_RENAME, 1, tmp_path / "pets", "--out", tmp_path / "out", "--size", 4, "--overwrite")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path) == [f".out.old-{process.pid}", f".out.tmp-{process.pid}"]
    if use == "load_dataset":
        assert load_dataset(tmp_path / "out") == before
    elif use == "find_dataset":
        assert find_dataset(tmp_path / "out", log=lambda line: None) == before
    elif use == "convert":
        with pytest.raises(DataError, match="add --overwrite"):
            convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
        assert load_dataset(tmp_path / "out") == before
    else:
        assert convert(tmp_path / "pets", tmp_path / "out", size=3, overwrite=True).image_size == (3, 3)
    assert "out" in visible(tmp_path) and f".out.old-{process.pid}" not in visible(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_filling_killed_between_its_renames_is_undone_by_the_next_conversion(tmp_path, count):
    class_folders(tmp_path / "pets")
    (tmp_path / "out").mkdir()
    process = start(KILLED_AT_RENAME, count, tmp_path / "pets", "--out", tmp_path / "out")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(visible(tmp_path / "out")) == count + 1
    with pytest.raises(DataError, match="no dataset.json"):
        load_dataset(tmp_path / "out")
    convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    assert visible(tmp_path / "out") == ["dataset.json", "test.beton", "train.beton"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
    class_folders(tmp_path / "pets")
    convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    seen = []
    monkeypatch.setattr(staging, "sync", lambda path: seen.append((tmp_path / "out").exists()))
    convert(tmp_path / "pets", tmp_path / "out", overwrite=True, size=4, log=lambda line: None)
    assert all(seen) == exchange, "there is a data set at every moment, where the system can exchange two names"
    assert load_dataset(tmp_path / "out").image_size == (4, 4)
    assert visible(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["link", "link to a link", "current folder", "with lost+found", "dangling link"])
def test_an_empty_folder_is_filled_where_it_is(tmp_path, monkeypatch, kind):
    class_folders(tmp_path / "pets")
    place, out = tmp_path / "elsewhere" / "empty", tmp_path / "out"
    place.mkdir(parents=True)
    if kind == "current folder":
        monkeypatch.chdir(place)
        out = Path(".")
    elif kind == "dangling link":
        place.rmdir()
        out.symlink_to(place)
    else:
        (tmp_path / "via").symlink_to(place)
        out.symlink_to(tmp_path / "via" if kind == "link to a link" else place)
    if kind == "with lost+found":
        (place / "lost+found").mkdir()
    number = place.stat().st_ino if kind != "dangling link" else None
    dataset = convert(tmp_path / "pets", out, log=lambda line: None)
    assert kind == "dangling link" or place.stat().st_ino == number
    assert set(visible(place)) - {"lost+found"} == {"dataset.json", "test.beton", "train.beton"}
    assert load_dataset(place).identity == dataset.identity
    assert visible(tmp_path / "elsewhere") == ["empty"]
    # And replaced through the link.
    if kind not in ("current folder", "with lost+found"):
        assert convert(tmp_path / "pets", out, overwrite=True, size=4, log=lambda line: None).image_size == (4, 4)
        assert out.is_symlink() and load_dataset(place).image_size == (4, 4)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_filling_that_fails_leaves_the_folder_empty(tmp_path, monkeypatch, count, error):
    class_folders(tmp_path / "pets")
    (tmp_path / "out").mkdir()
    plain, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == count:
            raise error(5, "no")
        done.append(plain(self, target))
        return done[-1]

    monkeypatch.setattr(Path, "rename", rename)
    if count == 3:
        monkeypatch.setattr(staging, "sync", lambda path: rename(path, path) if len(done) == count else None)
    with pytest.raises((DataError, KeyboardInterrupt)):
        convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    assert len(done) == count and visible(tmp_path / "out") == []


def test_two_conversions_into_one_empty_folder(tmp_path):
    (tmp_path / "out" / f".out.tmp-{os.getppid()}").mkdir(parents=True)
    with pytest.raises(DataError, match="another process is converting into it"), staged_folder(tmp_path / "out"):
        pass
    (tmp_path / "else").mkdir()
    with pytest.raises(DataError, match="meanwhile"), staged_folder(tmp_path / "else"):
        (tmp_path / "else" / "train.beton").write_text("theirs")
    assert visible(tmp_path / "else") == ["train.beton"]


def test_an_empty_mount_point_is_filled(tmp_path, small_disk):
    class_folders(tmp_path / "pets", size=(2, 2))
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    convert(tmp_path / "pets", small_disk, log=lambda line: None)
    assert visible(small_disk) == ["dataset.json", "test.beton", "train.beton"]
    with pytest.raises(DataError, match="cannot be replaced as a whole; remove dataset.json, test.beton, train.beton"):
        convert(tmp_path / "pets", small_disk, overwrite=True)
    load_dataset(small_disk)


def test_an_overwritten_data_set_caught_between_two_renames_is_put_back(tmp_path):
    old = tmp_path / f".out.old-{dead_pid()}"
    old.mkdir()
    (old / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="already holds a converted data set"), staged_folder(tmp_path / "out"):
        pass
    assert visible(tmp_path) == ["out"]
