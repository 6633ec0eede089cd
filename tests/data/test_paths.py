"""What the program says about itself works where it is said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rsengine.data.paths import convert_command

ROOT = Path(__file__).parents[2]


def call(command, folder, *arguments, **environment):
    words = [sys.executable if word == "python" else word for word in command.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*words, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("folder", "command"), [(ROOT, "python data/convert.py"), (None, "python -m rsengine.data")])
def test_the_command_that_converts_is_one_that_works_here(tmp_path, monkeypatch, folder, command):
    folder = folder or tmp_path
    monkeypatch.chdir(folder)
    assert convert_command() == command
    done = call(command, folder, "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {command} [-h]")
    done = call(command, folder, "none", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("error: none: no such file")


def test_another_project_s_script_of_that_name_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/convert.py").write_text("")
    assert convert_command() == "python -m rsengine.data"


def test_no_message_names_the_script_itself():
    """Only what :func:`convert_command` gives is true outside a checkout."""
    for house in ("rsengine", "data", "kernels"):
        for path in (ROOT / house).rglob("*.py"):
            text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
            assert not re.search(r"data/convert\.py", code), path
