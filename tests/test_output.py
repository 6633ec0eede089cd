"""What is printed may find no reader: the work goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsengine.output import counted, escaped, patient_output

CODE = """
import sys
from rsengine.errors import run_command
def work():
    for i in range(3000):
        print("line", i, flush=True)
        print("aside", i, file=sys.stderr, flush=True)
    open("done", "w").close()
    return 3
sys.exit(run_command(work))
"""


def start(folder, code=CODE, **options):
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, **options)


@pytest.mark.parametrize("early", ["stdout", "stderr"])
def test_a_reader_that_leaves_ends_nothing_and_is_not_spoken_of(tmp_path, early):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    left, stays = (process.stdout, process.stderr)[:: 1 if early == "stdout" else -1]
    left.readline()
    left.close()
    rest = stays.read().splitlines()
    assert process.wait() == 3 and (tmp_path / "done").exists()
    assert len(rest) == 3000  # and no word of a pipe


def test_an_output_that_was_closed_from_the_start_is_as_good(tmp_path):
    command = f"{sys.executable} -c '{CODE}' >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 3
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_an_output_on_a_full_disk_is_said_once(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    errors = process.communicate()[1].splitlines()
    assert process.returncode == 3
    said = [line for line in errors if not line.startswith("aside")]
    assert said == ["standard output cannot be written (No space left on device); going on without it"]


RESULT = """
import sys
from rsengine.errors import run_command
from rsengine.output import print_json
sys.exit(run_command(lambda: print_json({"accuracy": 0.5, "classes": ["x"] * 100_000}) or 0))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_result_on_a_full_disk_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, RESULT, stdout=full, stderr=subprocess.PIPE, text=True)
    error = "error: standard output: the result cannot be written (No space left on device); send it elsewhere\n"
    assert process.communicate()[1] == error and process.returncode == 1


def test_a_result_whose_reader_left_is_none(tmp_path):
    process = start(tmp_path, RESULT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("command", [
    "rsengine.recipe_table --json",
    "rsengine.recipe_table quickstart",
    "rsengine.train --list-settings",
    pytest.param(
        "rsengine.train --data digits --recipe digits --epochs 1 --limit-train-batches 2 --json --quiet",
        marks=pytest.mark.thorough,
    ),
    "rsengine.data.convert digits --out converted --json --quiet",
])  # fmt: skip
def test_every_command_whose_result_is_lost_says_so(tmp_path, command):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-m", *command.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "error: standard output: the result cannot be written" in done.stderr


def test_characters_that_the_output_lacks_are_escaped(tmp_path):
    code = "import sys\nfrom rsengine.errors import run_command\nsys.exit(run_command(lambda: print('32×32') or 0))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(tmp_path, code, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0] == "32\\xd732\n" and process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="file names have another encoding there")
def test_a_name_that_the_locale_cannot_write_is_an_error_with_the_remedy(tmp_path):
    code = "import sys; from rsengine.errors import run_command; sys.exit(run_command(lambda: open('runs/猫', 'w')))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = start(tmp_path, code.encode("unicode_escape"), env=environment, stderr=subprocess.PIPE, text=True)
    (line,) = process.communicate()[1].splitlines()
    assert line.startswith("error: runs/\\u732b: file names are in ascii here") and "PYTHONUTF8=1" in line
    assert process.returncode == 2


def test_what_no_line_of_text_holds_is_escaped():
    assert escaped("a\nb\x1b[2J\u2028\x85caf\udce9 猫 قطة") == "a\\nb\\x1b[2J\\u2028\\x85caf\\udce9 猫 قطة"


def test_one_thing_is_no_plural():
    assert [counted(n, "epoch") for n in (0, 1, 2, 1438)] == ["0 epochs", "1 epoch", "2 epochs", "1,438 epochs"]
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


def test_streams_that_are_not_the_process_s_own_stay(capsys):
    before = sys.stdout
    with patient_output():
        assert sys.stdout is before
        print("heard")
    assert capsys.readouterr().out == "heard\n"


HELP = """
import importlib
commands = ("train", "evaluate", "predict", "capture_check", "gpu_check")
for name in (*commands, "augment.__main__", "export.__main__", "data.convert"):
    try:
        importlib.import_module(f"rsengine.{name}").main(["--help"])
    except SystemExit as end:
        assert end.code == 0, name
"""


def test_the_help_of_every_command_is_printed_in_any_encoding(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = start(tmp_path, HELP, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0].count("usage: ") == 8 and process.returncode == 0


COMMANDS = [
    ("-m", "rsengine.train", "--list-settings"),
    ("-m", "rsengine.train", "--data", "digits", "--recipe", "digits", "--epochs", "1", "--limit-train-batches", "2"),
    pytest.param(("-m", "rsengine.capture_check", "--launch-table"), marks=pytest.mark.thorough),
    ("data/convert.py", "digits", "--out", "{folder}/converted"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words))
def test_every_command_outlives_its_readers(tmp_path, command):
    root = Path(__file__).parent.parent
    words = [word.format(folder=tmp_path) for word in command]
    words[0] = str(root / words[0]) if words[0].endswith(".py") else words[0]
    environment = os.environ | {"PYTHONPATH": str(root)}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )  # noqa: E501
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    if "digits" in words:
        assert (tmp_path / "converted" / "dataset.json").exists() or list(tmp_path.glob("runs/*/checkpoint.pt"))
