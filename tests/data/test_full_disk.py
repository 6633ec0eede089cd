"""A disk that takes no more is named in one line, at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from rsengine.data import staging
from rsengine.data.convert import main
from tests.data.data_builders import class_folders, start, visible


@pytest.mark.parametrize("inside", [False, True], ids=["a folder on it", "the mount point itself"])
def test_a_full_disk_is_named_at_once(tmp_path, capsys, small_disk, inside):
    class_folders(tmp_path / "pets", each=30, size=(80, 80))
    out = small_disk if inside else small_disk / "a" / "out"
    assert main([str(tmp_path / "pets"), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: no space left on the disk at {small_disk} (") and error.count("\n") == 1
    assert "make room, or take another disk" in error
    assert not any(small_disk.iterdir())


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from rsengine.data.convert import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_limit_on_the_size_of_files_is_named_at_once(tmp_path):
    class_folders(tmp_path / "pets", each=30, size=(80, 80))
    process = start(LIMITED, tmp_path / "pets", "--out", tmp_path / "out", "--quiet")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {tmp_path / 'out'}: a file may not become as large") and "ulimit -f" in said
    assert visible(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("call", ["write", "flush", "close", "sync", "describe"])
def test_an_error_of_the_disk_at_any_moment_is_one_line(tmp_path, monkeypatch, capsys, number, call):
    class_folders(tmp_path / "pets")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    if call == "sync":
        monkeypatch.setattr(staging, "sync", fail)
    elif call == "describe":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        real = Path.open

        def opened(self: Path, *arguments: object, **options: object) -> object:
            file = real(self, *arguments, **options)
            if self.name != "test.beton" or arguments[0] != "xb":
                return file
            broken = mock.Mock(wraps=file)
            setattr(broken, call, mock.Mock(side_effect=OSError(number, os.strerror(number))))
            return broken

        monkeypatch.setattr(Path, "open", opened)
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    words = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EIO: "Input/output error"}
    assert error.startswith(f"error: {tmp_path / 'out'}: {words.get(number, 'a file may not become')}")
    assert error.count("\n") == 1
    assert visible(tmp_path) == []
