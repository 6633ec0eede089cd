"""What the tests of real runs in several processes share."""

import pytest

from tests.parallel.commands import RECIPE, ended, processes


@pytest.fixture(scope="package")
def options(tmp_path_factory):
    """The options of a short run on the digits, without ``--out``."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return ["--recipe", str(path), "--data", "digits", "--device", "cpu"]


@pytest.fixture(scope="package")
def whole(options, tmp_path_factory):
    """A run that was left alone: its folder ``run``, and how the command ended."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", ended(processes(*options, "--out", "run"), folder)
