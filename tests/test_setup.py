"""What ``make`` sets up, with FFCV or without, and what a wheel holds."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "setup.sh"
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

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin)} | variables
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
    done = programs.run("/bin/sh", SCRIPT, "python3", programs.bin / "no-environment-yet")
    assert (done.returncode, programs.reached()) == (2, [])
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and f"{problem}; rsengine needs Python 3.11 or later: {remedy}" in line


def test_an_environment_of_an_old_python_is_refused(programs):
    """Making it anew is what helps: the newer PYTHON would not be asked."""
    (programs.bin / "venv" / "bin").mkdir(parents=True)
    programs.add("venv/bin/python", interpreter(3, 10))
    programs.add("python3.12", interpreter(3, 12))
    done = programs.run("/bin/sh", SCRIPT, "python3.12", programs.bin / "venv")
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


FFCV_PACKAGES = "libopencv-dev libturbojpeg0-dev"
WITHOUT = "going on without FFCV, {}. rsengine's own loader takes its place"


class SetUp:
    """Runs the script with a Python that makes an environment of itself, and a pip that only notes what it is asked."""

    def __init__(self, programs: Programs) -> None:
        self.programs, self.venv = programs, programs.bin / "venv"
        programs.add("id", "echo 1000")
        (programs.bin / "apt-get").unlink()
        (programs.bin / "sudo").unlink()
        self.python()

    def python(self, *, fails_at: str = "nothing", lacks: str = "nothing") -> None:
        """``fails_at``: what pip cannot install; ``lacks``: what cannot be imported."""
        self.programs.add(
            "python3",
            f"""
case "$1 $2" in
    "-m venv") /bin/mkdir -p "$3/bin"; /bin/cp "$0" "$3/bin/python" ;;
    "-m pip") echo "pip $*" >> "{self.programs.mark}"
        case "$*" in *"{fails_at}"*) echo "a page of errors" >&2; exit 1 ;; esac ;;
    *"{lacks}"*) exit 1 ;;
    *) exit 0 ;;
esac""",
        )

    def __call__(self, **variables: str) -> tuple[int, list[str]]:
        """The exit status, and all lines that were printed."""
        done = self.programs.run("/bin/sh", SCRIPT, "python3", self.venv, **variables)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    @property
    def installed(self) -> list[str]:
        """What pip was asked for, in order."""
        return [line.split()[-1] for line in self.programs.reached() if line.startswith("pip ")]


@pytest.fixture
def set_up(programs):
    return SetUp(programs)


def test_ffcv_is_installed_where_its_libraries_are(set_up):
    assert set_up() == (0, []) and set_up.installed == [".[test]", ".[ffcv]"]
    assert set_up() == (0, [])  # into the environment that is there


def test_missing_libraries_that_nobody_can_install_leave_ffcv_out(set_up):
    set_up.programs.add("pkg-config", "exit 1")
    why = f"because these packages (Debian's names) are missing: {FFCV_PACKAGES}; install them with your system's"
    status, (line,) = set_up()
    assert status == 0 and line == WITHOUT.format(f"{why} package manager; then run make -B setup")
    set_up.programs.add("apt-get", "exit 1")
    status, (line,) = set_up()
    command = f"apt-get update && apt-get install -y --no-install-recommends {FFCV_PACKAGES}"
    assert status == 0 and f"as root, run: {command}; then run make -B setup." in line
    assert set_up.installed == [".[test]"] * 2


def test_the_libraries_are_installed_by_root(set_up):
    set_up.programs.add("id", "echo 0")
    set_up.programs.add("pkg-config", "exit 1")
    set_up.programs.add("apt-get", f'echo "apt-get $*" >> "{set_up.programs.mark}"')
    assert set_up() == (0, [f"installing Debian packages: {FFCV_PACKAGES}"])
    assert f"apt-get install -y --no-install-recommends {FFCV_PACKAGES}" in set_up.programs.reached()
    assert set_up.installed == [".[test]", ".[ffcv]"]
    set_up.programs.add("apt-get", "exit 1")
    status, (_, line) = set_up()
    assert status == 0 and "installing failed; as root, run: apt-get" in line and line.startswith("going on without")


def test_an_ffcv_that_cannot_be_built_or_loaded_is_left_out(set_up):
    for fault in ({"fails_at": ".[ffcv]"}, {"lacks": "import ffcv"}):
        shutil.rmtree(set_up.venv, ignore_errors=True)
        set_up.python(**fault)
        log = set_up.venv / "ffcv.log"
        assert set_up() == (0, [WITHOUT.format(f"because it cannot be built and loaded here ({log} says why)")])
        assert log.read_text() == ("a page of errors\n" if "fails_at" in fault else "")


def test_a_variable_leaves_ffcv_out(set_up):
    set_up.programs.add("pkg-config", "exit 1")
    assert set_up(RSENGINE_NO_FFCV="1") == (0, [WITHOUT.format("as RSENGINE_NO_FFCV asks")])
    assert set_up.installed == [".[test]"]


def test_what_nothing_works_without_is_an_error(set_up):
    set_up.python(lacks="ensurepip")
    status, (line,) = set_up()
    assert status == 2 and line.startswith("error: ") and "missing: python3-venv; install" in line
    assert set_up.installed == []
    set_up.python(fails_at=".[test]")
    status, lines = set_up()
    assert status and lines == ["a page of errors"]


HOUSES = ("rsengine", "kernels", "data")
# Where a module's package has another name.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w"}


def requirements(monkeypatch) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the packages that setup.py asks for: always, and by extra."""
    given = {}
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")

    def names(wanted: list[str]) -> list[str]:
        return [re.match(r"[\w-]+", each)[0] for each in wanted]

    return names(given["install_requires"]), {extra: names(of) for extra, of in given["extras_require"].items()}


def test_every_imported_package_is_asked_for(monkeypatch):
    always, extras = requirements(monkeypatch)
    assert "ffcv" not in always and "ffcv" in extras["ffcv"]
    imported = set()
    for house in HOUSES:
        for path in (ROOT / house).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
    others = {PACKAGES.get(name, name) for name in imported - sys.stdlib_module_names - {"rsengine", "bench"}}
    assert others - set(always) <= {name for names in extras.values() for name in names}
    assert set(always) <= others | {"torchvision"}  # the latter is imported by name


def sources() -> set[Path]:
    """The files of the packages, relative to the checkout. data/ may hold data sets too."""
    kinds = ("*.py", "*.toml", "*.css", "*.js", "*.c", "*.h", "py.typed")
    found = {path.relative_to(ROOT) for house in HOUSES for kind in kinds for path in (ROOT / house).rglob(kind)}
    return {path for path in found if path.parts[:2] not in (("rsengine", "kernels"), ("rsengine", "data"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy of the sources whose links came out as text, as on systems that make none."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for path in sources():
        (folder / "tree" / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "tree" / path)
    for house in HOUSES[1:]:
        (folder / "tree" / "rsengine" / house).write_text(f"../{house}")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "tree")
    command = [sys.executable, "-m", "pip", "wheel", ".", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run(command, cwd=folder / "tree", check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_source_file(wheel):
    expected = {path if path.parts[0] == "rsengine" else Path("rsengine", path) for path in sources()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.as_posix() for path in expected}


@pytest.mark.parametrize("command", [
    ("rsengine.train", "--list-settings"),
    ("rsengine.data", "digits", "--out", "converted"),
    ("rsengine.train", "--data", "digits", "--epochs", "1", "--limit-train-batches", "2"),
], ids=" ".join)  # fmt: skip
def test_what_a_wheel_installs_runs_outside_the_checkout(wheel, tmp_path, command):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "report.html: not written" not in done.stdout  # it needs files that are no modules
    where = subprocess.run([sys.executable, "-c", "import rsengine; print(rsengine.__file__)"], env=environment,
                           cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert where.stdout.startswith(str(tmp_path))
