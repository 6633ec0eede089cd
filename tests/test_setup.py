"""``make`` with a Python that is too old: one line, status 2, and nothing installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "system_packages.sh"
STUB = "echo 'no such version is installed' >&2\necho 'choose one' >&2\nexit 127"  # as a version manager leaves them


def interpreter(major: int, minor: int) -> str:
    """A Python that takes itself for another version, and runs what it is asked as that."""
    pretend = f"import sys; sys.version_info = ({major}, {minor}, 7); exec(sys.argv[1])"
    return f'exec "{sys.executable}" -c "{pretend}" "$2"'


class Programs:
    """A PATH of the test's own, in which whatever would install anything leaves a mark."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.mark = folder / "bin", folder / "mark"
        self.bin.mkdir()
        (self.bin / "sh").symlink_to("/bin/sh")
        for name in ("apt-get", "sudo", "c++", "pkg-config", "id"):
            self.add(name, f'echo "{name} $*" >> "{self.mark}"')

    def add(self, name: str, body: str) -> Path:
        program = self.bin / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return program

    def run(self, *command: object) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin)}
        return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    def reached(self) -> list[str]:
        return self.mark.read_text().splitlines() if self.mark.exists() else []


@pytest.fixture
def programs(tmp_path):
    return Programs(tmp_path)


@pytest.mark.parametrize(("present", "problem", "remedy"), [
    ({"python3": (3, 10)}, "python3 is Python 3.10.7, too old", "install one, then make PYTHON=/path/to/python3"),
    ({"python3": (2, 7), "python3.12": (3, 12)}, "python3 is Python 2.7.7, too old", "make PYTHON=python3.12"),
    ({"python3": (3, 10), "python3.11": None, "python3.13": (3, 13)}, "3.10.7, too old", "make PYTHON=python3.13"),
    ({"python3": (3, 10), "python3.11": None}, "3.10.7, too old", "install one, then make PYTHON=/path/to/python3"),
    ({"python3": None, "python3.14": (3, 14)}, "python3 does not run", "make PYTHON=python3.14"),
    ({"python3.11": (3, 11)}, "python3 not found", "make PYTHON=python3.11"),
    ({}, "python3 not found", "install one, then make PYTHON=/path/to/python3"),
])  # fmt: skip
def test_an_old_python_is_refused_in_one_line(programs, present, problem, remedy):
    for name, version in present.items():
        programs.add(name, interpreter(*version) if version else STUB)
    done = programs.run("/bin/sh", SCRIPT, "python3")
    assert (done.returncode, programs.reached()) == (2, [])
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and f"{problem}; rsengine needs Python 3.11 or later: {remedy}" in line


def test_an_environment_of_an_old_python_is_refused(programs):
    """Making it anew is what helps: the newer PYTHON would not be asked."""
    programs.add("venv-python", interpreter(3, 10))
    programs.add("python3.12", interpreter(3, 12))
    done = programs.run("/bin/sh", SCRIPT, "python3.12", programs.bin / "venv-python")
    assert (done.returncode, programs.reached()) == (2, [])
    assert done.stderr.endswith("needs Python 3.11 or later: make clean, then make PYTHON=python3.12\n")


def test_a_new_python_is_let_through(programs):
    programs.add("python3", interpreter(3, 11))
    programs.run("/bin/sh", SCRIPT, "python3", programs.bin / "no-environment-yet")
    assert programs.reached()[0] == "pkg-config --exists opencv4"  # what the script asks next


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_stops_before_it_installs(programs, tmp_path):
    programs.add("python3", interpreter(3, 10))
    programs.add("python3.12", interpreter(3, 12))
    done = programs.run(shutil.which("make"), "setup", "PYTHON=python3", f"VENV={tmp_path / 'venv'}")
    assert (done.returncode, programs.reached()) == (2, [])
    line = "error: python3 is Python 3.10.7, too old; rsengine needs Python 3.11 or later: make PYTHON=python3.12"
    assert line in done.stderr.splitlines()
    assert not (tmp_path / "venv").exists()
