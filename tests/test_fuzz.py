"""Damaged inputs of every kind end in one line. `scripts/fuzz_check.py` does a thousand; here are a few dozen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "scripts" / "fuzz_check.py")]


@pytest.mark.slow
def test_a_few_dozen_damaged_inputs(tmp_path):
    result = subprocess.run([*COMMAND, "36", "--keep", "faults"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\| all +\| 36 \| \d+ \| \d+ \| \d+ \| 0 \|$", result.stdout, re.MULTILINE)
    assert not (tmp_path / "faults").exists()
