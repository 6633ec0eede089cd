"""The recorder of file operations, compiled once."""

import shutil
import sys

import pytest

from tests.crash.scenarios import Recorder, compiled


@pytest.fixture(scope="session")
def recorder(tmp_path_factory) -> Recorder:
    if not sys.platform.startswith("linux") or not shutil.which("cc"):
        pytest.skip("file operations are recorded through LD_PRELOAD of Linux, which needs a C compiler")
    folder = tmp_path_factory.mktemp("recorder").resolve()
    return Recorder(compiled(folder), folder)
