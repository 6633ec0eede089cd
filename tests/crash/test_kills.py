"""A run that is killed again and again ends with the bits of one that was left alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
def test_twenty_kills_change_nothing():
    environment = os.environ | {"PYTHON": sys.executable}
    command = [REPOSITORY / "scripts" / "kill_check.sh", "20", "3"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.match(r"kill check: 20 kills \(.*\), \d+ runs, .* nothing was left$", last), last
