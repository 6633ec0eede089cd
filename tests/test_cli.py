"""The command ``rsengine``: its commands, their help, what scripts read, and what ``doctor`` and ``--dry-run`` say."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rsengine import cli, doctor, recipe_table
from rsengine import train as train_module
from rsengine.config import Recipe, load_recipe, recipe_names
from rsengine.data import find_dataset
from rsengine.data.find import NotConverted
from rsengine.output import program
from tests.test_setup import ROOT
from tests.test_train import RECIPE

HERE = [name for name, command in cli.COMMANDS.items() if importlib.util.find_spec(command.module)]


def test_help_lists_every_command_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert command.summary in text and f"rsengine {name} {command.example}".strip() in text
    assert cli.main([]) == 2 and capsys.readouterr().out == text
    assert all(name in (ROOT / "docs" / "commands.md").read_text() for name in cli.COMMANDS)


@pytest.mark.parametrize("name", HERE)
def test_a_command_is_handed_the_rest_of_the_line(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "convert", "augment", "recipes", "doctor"])
def test_the_help_of_a_command_has_an_example_under_the_name_it_was_started_by(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rsengine", name])
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert f"usage: rsengine {name} " in text and f"example: rsengine {name}" in text


@pytest.mark.parametrize("started, usage", [
    ("/usr/bin/rsengine", "rsengine train"),
    (r"rsengine.exe", "rsengine train"),
    ("/x/bin/rsengine-script.py", "rsengine train"),
    ("/x/rsengine/__main__.py", "python -m rsengine train"),
    ("/x/rsengine/train.py", "python -m rsengine.train"),
    ("/usr/bin/pytest", "python -m rsengine.train"),
])  # fmt: skip
def test_usage_lines_name_what_was_typed(monkeypatch, started, usage):
    monkeypatch.setattr(sys, "argv", [started])
    assert program("train") == usage


@pytest.mark.parametrize("started", ["rsengine", "python -m rsengine"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_error_of_usage_names_the_command_as_it_was_started(monkeypatch, capsys, started, name):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rsengine" if started == "rsengine" else "/x/rsengine/__main__.py"])
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--nonsense"])
    *usage, error = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and usage[0].startswith("usage: ") and error.startswith(f"{started} {name}: error: ")


@pytest.mark.parametrize("arguments, words", [
    (["tran"], "error: tran: no such command; did you mean train?"),
    (["x"], "error: x: no such command; expected one of train, convert"),
    (["train", "--recipe", "nothing"], "error: --recipe nothing: expected one of"),
    (["recipes", "nothing"], "error: recipe nothing: expected one of"),
    (["recipes", "nothing.toml"], "error: recipe nothing.toml: no such file"),
    (["train", "--set", "=5"], "error: --set =5: expected section.key=value"),
    (["train", "--seed", "-1"], "error: train.seed: expected an integer from 0 to 2,147,483,647; got -1"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(words) and output.err.count("\n") == 1


@pytest.mark.parametrize("arguments, option", [
    (["train", "--data", "digits", "--out", ""], "--out"),
    (["train", "--out=", "--data", "digits"], "--out"),
    (["train", "--recipe", ""], "--recipe"),
    (["train", "--data", ""], "--data"),
    (["train", "--init", ""], "--init"),
    (["convert", "digits", "--out", ""], "--out"),
    (["convert", "", "--out", "x"], "argument"),
    (["evaluate", "run", "--data", ""], "--data"),
    (["evaluate", ""], "argument"),
    (["predict", "run", "x.png", "--out", ""], "--out"),
    (["predict", "run", "x.png", "--pictures="], "--pictures"),
    (["predict", "run", ""], "argument"),
    (["export", "run", "--to", "onnx", "--out", ""], "--out"),
    (["compare", "a", "b", "--out", ""], "--out"),
    (["augment", "--data", "digits", "--out", ""], "--out"),
    (["recipes", ""], "argument"),
])  # fmt: skip
def test_an_empty_word_names_nothing(arguments, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and not list(tmp_path.iterdir())
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"error: {option}: got an empty text; give a value, or leave it out\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0 and "example: " in capsys.readouterr().out


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from rsengine.cli import main; main(['--help']); main(['--version']); "
        "assert not {'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rsengine 0.1.0" in done.stdout


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "rsengine", "tran"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean train?" in done.stderr
    assert "rsengine = rsengine.cli:main" in (ROOT / "setup.py").read_text()


def test_recipes_are_a_table_and_json(capsys):
    assert recipe_table.main([]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2 : 2 + len(recipe_names())]] == recipe_names()
    assert recipe_table.main(["--json"]) == 0
    recipes = json.loads(capsys.readouterr().out)
    assert recipes["quickstart"]["model.blocks"] == list(load_recipe("quickstart").model.blocks) != []
    assert recipes["report-1"]["schedule.milestones"] == list(load_recipe("report-1").schedule.milestones)
    assert list(recipes) == recipe_names() and recipes["quickstart"]["train.epochs"] == 8
    assert recipe_table.main(["speedrun"]) == 0
    assert Recipe.from_toml(capsys.readouterr().out).name == "speedrun"


def test_doctor_finds_this_machine_ready(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    found = {each["subject"]: each for each in report["findings"]}
    assert {"machine", "cache", "device", "loader", "layers", "kernels", "data", "torch"} <= set(found)
    assert all(each["remedy"] for each in report["findings"] if each["state"] == doctor.OPTIONAL and "not installed" in
               each["what"])  # fmt: skip
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready to train"


HIDDEN = """
import importlib.metadata, sys
plain, hidden, installed = importlib.metadata.version, {modules!r}, {installed!r}
def version(name):
    if name in {names!r} and not installed:
        raise importlib.metadata.PackageNotFoundError(name)
    return plain(name)
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
importlib.metadata.version = version
sys.meta_path.insert(0, Hiding())
from rsengine.cli import main
sys.exit(main(["doctor"]))
"""


def doctor_without(names, *, installed=False):
    """The lines of ``doctor`` that begin with !!, where the packages ``names`` cannot be imported."""
    code = HIDDEN.format(names=names, modules=[doctor.NEEDED[name] for name in names], installed=installed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1].startswith("not ready")
    return [line for line in done.stdout.splitlines() if line.startswith(doctor.WRONG)]


def test_doctor_names_every_missing_package_with_the_command_that_brings_it():
    lines = doctor_without(list(doctor.NEEDED))
    assert len(lines) == len(doctor.NEEDED)
    for name, line in zip(doctor.NEEDED, lines, strict=True):
        assert line.split()[1] == name and f"not installed; pip install {name}" in line


@pytest.mark.parametrize("missing", ["numpy", "tqdm", "pillow", "safetensors"])
def test_doctor_names_a_missing_package_and_what_breaks_without_it(missing):
    lines = doctor_without([missing])
    own = next(line for line in lines if line.split()[1] == missing)
    assert own.endswith(f"not installed; pip install {missing}")
    assert all(line.endswith(f"; mend {missing} first") for line in lines if line != own)  # others that import it


def test_a_package_that_is_installed_and_cannot_be_imported_is_wrong():
    line = next(line for line in doctor_without(["tqdm"], installed=True) if line.split()[1] == "tqdm")
    assert "cannot be imported (ModuleNotFoundError" in line and line.endswith("pip install --force-reinstall tqdm")


def test_a_folder_in_place_of_a_package_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "tqdmless").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._needed("tqdm", "tqdmless")
    assert finding.state == doctor.WRONG and finding.what == "its files are missing"


def test_doctor_looks_at_what_setup_requires():
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    names = set(re.findall(r'"([\w-]+)>=', required))
    # triton is for GPUs, and scipy comes with scikit-learn
    assert names - {"triton", "scipy"} == set(doctor.NEEDED) | {"scikit-learn"}


def test_what_doctor_cannot_examine_is_a_finding():
    def broken():
        raise RuntimeError("no\nluck")

    finding = doctor._examined(broken)
    assert finding.state == doctor.WRONG and "RuntimeError: no luck" in finding.what


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RSENGINE_DATA", "")
    Path("toy.toml").write_text(RECIPE)
    return tmp_path


def made(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(place, toy_dataset, capsys):
    arguments = ["--dry-run", "--recipe", "toy.toml", "--data", str(toy_dataset.folder), "--out", "run"]
    assert train_module.main([*arguments, "--epochs", "7"]) == 0
    text = capsys.readouterr().out
    for words in ("epochs = 7", "150 train and 21 test images, 32x32, 3 classes", "device: ", "loader: batches ",
                  "kernel: bottleneck", "for 7 epochs of 9 steps (predicted from 6 steps of "):  # fmt: skip
        assert words in text
    assert train_module.main([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps_per_epoch"] == 9 and planned["epochs"] == 3 and planned["recipe"]["train.epochs"] == 3
    step = float(planned["measured"].split(" steps of ")[1].split(" ms")[0]) / 1000
    assert planned["predicted_seconds"] > 3 * 9 * step * 0.99
    assert {name for name in made(place) if not name.startswith("cache/")} == {"toy.toml"}
    assert not (place / "cache" / "datasets").exists()


def test_a_dry_run_converts_and_downloads_nothing(place, toy_dataset, capsys, monkeypatch):
    source = toy_dataset.folder.parent / "source"
    assert train_module.main(["--dry-run", "--recipe", "toy.toml", "--data", str(source), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert "a run would convert it into" in planned["data"] and planned["predicted_seconds"] is None
    assert not (place / "cache" / "datasets").exists()
    monkeypatch.delenv("RSENGINE_DATA")
    with pytest.raises(NotConverted, match="a run would download CIFAR-10 first"):
        find_dataset(conversion=False)
    with pytest.raises(NotConverted, match="torchvision:CIFAR10: a run would download it"):
        find_dataset("torchvision:CIFAR10", conversion=False)
    assert find_dataset(toy_dataset.folder, conversion=False) == toy_dataset


def test_a_dry_run_on_the_digits_leaves_no_conversion(place, capsys):
    assert train_module.main(["--dry-run", "--data", "digits", "--set", "train.batch_size=32"]) == 0
    assert "1,438 train and 359 test images" in capsys.readouterr().out
    assert not (place / "cache" / "datasets").exists() and not (place / "runs").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--resume"], "--dry-run: says what a new run would do; leave out --resume"),
    (["--recipe", "nothing"], "--recipe nothing: expected one of"),
    (["--data", "nowhere"], "nowhere: no such file or folder"),
])  # fmt: skip
def test_a_dry_run_refuses_what_a_run_would(place, capsys, arguments, words):
    assert train_module.main(["--dry-run", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started_as", "command"),
    [
        ("/usr/bin/rsengine", "rsengine train"),
        ("/x/rsengine/__main__.py", "python -m rsengine train"),
        ("/x/rsengine/train.py", "python -m rsengine.train"),
    ],
)
def test_a_run_is_resumed_as_it_was_started(monkeypatch, started_as, command):
    from rsengine.training import Request, resume_command

    monkeypatch.setattr("sys.argv", [started_as])
    assert resume_command(Request(), Path("runs/a b")) == f"{command} --resume --out 'runs/a b'"
