"""The one folder for what can be made again, and that all who keep something there ask for it."""

from pathlib import Path

import pytest

from rsengine.cache import cache_folder
from rsengine.data import find_dataset
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
