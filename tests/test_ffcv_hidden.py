"""``needs_ffcv`` skips, and says why, where FFCV is hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_ffcv

ROOT = Path(__file__).parent.parent
TEST = """
from tests.conftest import needs_ffcv

@needs_ffcv
def test_of_ffcv():
    import ffcv
"""


@pytest.mark.parametrize(("value", "outcome"), [
    ("1", "SKIPPED [1] test_of.py:4: FFCV is not installed"),
    pytest.param(None, "1 passed", marks=needs_ffcv),
])  # fmt: skip
def test_a_test_of_ffcv_is_skipped_with_the_reason(tmp_path, value, outcome):
    (tmp_path / "test_of.py").write_text(TEST)
    environment = {key: word for key, word in os.environ.items() if key != "RSENGINE_NO_FFCV"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"RSENGINE_NO_FFCV": value} if value else {})
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_of.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and outcome in done.stdout, done.stdout
