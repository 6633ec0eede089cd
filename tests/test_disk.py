"""Flushing to the disk: a file system that cannot is no fault, a disk that fails is one."""

import errno
import os
import subprocess
import sys

import pytest

from rsengine import temporaries
from rsengine.data import convert
from rsengine.disk import sync
from rsengine.run.files import write_atomically


@pytest.fixture
def refusing(monkeypatch):
    """Lets ``os.fsync`` fail with a number."""

    def refuse(number):
        def fsync(_descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_is_no_fault(refusing, tmp_path, number):
    refusing(number)
    sync(tmp_path)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_folder_that_cannot_be_read_is_left_and_a_file_is_a_fault(monkeypatch, tmp_path):
    """As on Windows, where no folder can be opened, and in a folder that one may pass through and write to alone."""

    def refuse(path, _flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "open", refuse)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "file")


def test_neither_is_it_in_a_conversion(refusing, tmp_path):
    refusing(errno.EINVAL)
    assert convert("digits", tmp_path / "out", progress=False, log=lambda line: None).train_count == 1438


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_conversion_needs_no_locks_of_its_file_system(monkeypatch, tmp_path, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(temporaries.fcntl, "flock", refuse)
    assert convert("digits", tmp_path / "out", progress=False, log=lambda line: None).train_count == 1438


def test_the_package_is_imported_where_the_system_has_no_locks():
    code = "import sys; sys.modules['fcntl'] = None; import rsengine.data, rsengine.run.folder"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_one(refusing, tmp_path, number):
    refusing(number)
    with pytest.raises(OSError) as caught:
        sync(tmp_path)
    assert caught.value.errno == number
