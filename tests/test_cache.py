"""The one folder for what can be made again, and that all who keep something there ask for it."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rsengine.cache import cache_folder, keep_compiled_code
from rsengine.data import DataError, convert, find_dataset, load_dataset
from rsengine.kernels.native import library


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """Sets the variables that decide, and only these. The home folder is ``tmp_path``, and so is the current one."""

    def set_only(**wanted):
        for name in ("RSENGINE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": str(tmp_path)} | wanted).items():
            monkeypatch.setenv(name, value)

    monkeypatch.chdir(tmp_path)
    return set_only


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"RSENGINE_CACHE": "/a"}, "/a"),
        ({"RSENGINE_CACHE": "~/a", "HOME": "/home/someone"}, "/home/someone/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/rsengine"),
        ({"XDG_CACHE_HOME": "~/b", "HOME": "/home/someone"}, "/home/someone/b/rsengine"),
        ({"HOME": "/c"}, "/c/.cache/rsengine"),
    ],
)
def test_cache_folder(variables, given, expected):
    variables(**given)
    assert cache_folder() == Path(expected)


def test_native_code_and_data_sets_are_kept_in_it(variables, tmp_path):
    variables(RSENGINE_CACHE="~/kept")
    library.load.__wrapped__()
    find_dataset("digits", log=lambda line: None)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["datasets", "native"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]  # and no folder whose name is ~


def no_such_user(*_):
    raise KeyError("uid not found")


@pytest.fixture
def homeless(variables, monkeypatch, tmp_path):
    """A user whom the machine does not know, as containers have; temporary files go below ``tmp_path``."""
    variables()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # set first, so that what the code sets is undone


def test_a_user_without_a_home_has_a_private_folder(homeless, tmp_path):
    folder = cache_folder()
    assert folder == tmp_path / f"rsengine-{os.getuid()}" == cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(OSError, match="others may write there; set RSENGINE_CACHE"):
        cache_folder()


def test_a_tilde_without_a_home_is_refused_in_one_line(homeless, monkeypatch, tmp_path):
    for name in ("RSENGINE_CACHE", "XDG_CACHE_HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "~/a")
            with pytest.raises(OSError, match=f"{name}=~/a: there is no home folder to stand for ~; give the whole"):
                cache_folder()
    for use in (
        lambda: find_dataset("~nobody-here/data", log=print),
        lambda: load_dataset("~/data"),
        lambda: convert("digits", "~/out"),
        lambda: convert("~/data", tmp_path / "out"),
    ):
        with pytest.raises(DataError, match="there is no home folder to stand for ~"):
            use()


def test_compiled_code_is_kept_in_it_unless_told_otherwise(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled_code()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "kept" / "numba")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kept" / "inductor")
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "kept" / "matplotlib")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_compiled_code_goes_to_a_private_folder_where_the_cache_cannot_be_written(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("RSENGINE_CACHE", "/proc/kept")
    keep_compiled_code()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / f"rsengine-{os.getuid()}" / "numba")


@pytest.mark.parametrize("home", [None, "/proc/nowhere"], ids=["no home, no name", "a home that cannot be written"])
def test_a_run_needs_no_home_and_no_name(tmp_path, toy_dataset, home):
    code = (
        "import pwd, sys\n"
        "def no_such_user(*_): raise KeyError('uid not found')\n"
        "pwd.getpwuid = no_such_user\n"
        "from rsengine.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    hidden = {
        "HOME",
        "NUMBA_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "MPLCONFIGDIR",
        "USER",
        "LOGNAME",
    }
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"RSENGINE_CACHE": str(tmp_path / "cache")} | ({"HOME": home} if home else {})
    options = ["--data", toy_dataset.folder, "--device", "cpu", "--out", tmp_path / "run", "--epochs", "1"]
    options += ["--set", "model.blocks=[1]", "--set", "train.batch_size=16", "--limit-train-batches", "2"]
    command = [sys.executable, "-c", code, *map(str, options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert {"numba", "native"} <= {path.name for path in (tmp_path / "cache").iterdir()}
