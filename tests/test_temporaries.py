"""Temporary files and folders of dead processes are removed by who uses the place next; those of the living stay."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rsengine.data import find_dataset
from rsengine.temporaries import remove_abandoned, temporary_folder

PATTERN = re.compile(r"\..+\.(?P<pid>\d+)\.tmp")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_only_the_dead_s_files_and_folders_of_the_pattern_go(tmp_path, dead_pid):
    living = os.getppid()
    for name in (f".a.{dead_pid}.tmp", f".b.{living}.tmp", f"c.{dead_pid}.tmp", f".d.{dead_pid}.txt", "e"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".f.{dead_pid}.tmp" / "in").mkdir(parents=True)
    (tmp_path / f".g.{living}.tmp").mkdir()
    (tmp_path / f".h.{dead_pid}.tmp").symlink_to(tmp_path / "e")
    (tmp_path / f".i.{'9' * 30}.tmp").write_text("x")  # no process can have this number
    removed = remove_abandoned(tmp_path, PATTERN)
    assert [path.name[1] for path in removed] == ["a", "f", "h", "i"]
    assert names(tmp_path) == sorted(
        [f".b.{living}.tmp", f"c.{dead_pid}.tmp", f".d.{dead_pid}.txt", "e", f".g.{living}.tmp"]
    )
    assert remove_abandoned(tmp_path / "nowhere", PATTERN) == []


def test_those_of_other_users_are_left_alone(tmp_path, dead_pid, monkeypatch):
    (tmp_path / f".a.{dead_pid}.tmp").write_text("x")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remove_abandoned(tmp_path, PATTERN) == []


def test_a_lock_keeps_a_folder_whose_process_cannot_be_seen(tmp_path, dead_pid):
    folder = tmp_path / f".a.{dead_pid}.tmp"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_abandoned(tmp_path, PATTERN) == []
    assert remove_abandoned(tmp_path, PATTERN) == [folder]


def test_a_temporary_folder_goes_at_the_end_and_after_a_kill_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from rsengine.temporaries import temporary_folder\n"
        "with temporary_folder('work') as folder:\n"
        "    (folder / 'file').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    with temporary_folder("other"):
        assert left in names(tmp_path)  # of another purpose
    with temporary_folder("work") as first, temporary_folder("work") as second:  # ours does not count as dead
        assert names(tmp_path) == sorted([first.name, second.name])
    assert names(tmp_path) == []


def test_conversions_that_were_killed_leave_nothing_in_the_cache(tmp_path, monkeypatch, dead_pid):
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path))
    (tmp_path / "datasets" / f".pets-0123.tmp-{dead_pid}").mkdir(parents=True)
    (tmp_path / "datasets" / f".pets-4567.tmp-{os.getppid()}").mkdir()
    find_dataset("digits", log=lambda line: None)
    left = [name for name in names(tmp_path / "datasets") if name.startswith(".")]
    assert left == [f".pets-4567.tmp-{os.getppid()}"]


def test_a_download_that_was_killed_goes_with_the_next(tmp_path, monkeypatch, dead_pid):
    from rsengine.data import find

    left = tmp_path / "downloads" / f".rsengine-download-{dead_pid}-abc"
    left.mkdir(parents=True)
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(find, "network_problem", lambda: None)

    def download_url(url, root, filename, md5):
        assert not left.exists()
        raise RuntimeError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    with pytest.raises(find._NoDownload, match="no network in tests"):
        find.download_cifar10(lambda line: None)
    assert names(tmp_path / "downloads") == []
