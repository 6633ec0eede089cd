"""Whatever a kill or a full disk kept from being written is made again from the checkpoint, or its loss is said."""

import os
import shutil

import pytest
import torch

from rsengine import evaluate as evaluate_module
from rsengine import train as train_module
from rsengine import trainer as trainer_module
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.log import RunLog
from rsengine.run.recovery import lost_records
from rsengine.run.weights import load_weights
from rsengine.trainer import Trainer
from tests.test_train import RECIPE

MADE_AGAIN = "made again from the checkpoint, because missing, damaged or out of date: "


@pytest.fixture
def train(tmp_path, toy_dataset, monkeypatch):
    """Runs the command on the toy data, into the folder ``run``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(RECIPE)

    def run(*arguments):
        options = ["--recipe", "toy.toml", "--device", "cpu", "--out", "run", "--data", str(toy_dataset.folder)]
        return train_module.main([*options, *arguments])

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_dataset):
    """The folder of a run whose best epoch was its last."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "toy.toml").write_text(RECIPE)
    options = ["--recipe", folder / "toy.toml", "--data", toy_dataset.folder, "--device", "cpu", "--epochs", "1"]
    assert train_module.main([str(each) for each in [*options, "--out", folder / "run"]]) == 0
    return folder / "run"


def assert_agrees(folder):
    """Weights, best checkpoint and recipe are those of the checkpoint, which is of the last and best epoch."""
    state = load_checkpoint(folder / "checkpoint.pt")
    weights = load_weights(folder)
    assert all(torch.equal(value, state["step"]["ema"][name]) for name, value in weights.model.state_dict().items())
    assert (folder / "recipe.toml").read_text() == state["recipe"]
    if state["best"]["epoch"] == state["epoch"]:
        assert (folder / "best.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def aged(path):
    """Another network's, whole: as after an earlier epoch."""
    if path.name == "weights.safetensors":
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: value * 2 for name, value in state.items()}, path, metadata)
    elif path.suffix == ".pt":
        torch.save(torch.load(path) | {"epoch": 0}, path)
    else:
        path.write_text(path.read_text().replace("epochs = 1", "epochs = 2"))


@pytest.mark.parametrize("spoil", [os.unlink, zeroed, cut, aged], ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", ["weights.safetensors", "best.pt", "recipe.toml"])
def test_what_a_finished_run_lacks_is_made_again(train, finished, tmp_path, capsys, name, spoil):
    shutil.copytree(finished, tmp_path / "run")
    spoil(tmp_path / "run" / name)
    assert train("--epochs", "1", "--resume") == 0
    assert MADE_AGAIN + name in capsys.readouterr().out
    assert_agrees(tmp_path / "run")


def test_what_agrees_is_left_alone(train, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    names = "weights.safetensors", "best.pt", "recipe.toml", "checkpoint.pt", "metrics.jsonl"
    before = [(tmp_path / "run" / name).stat().st_ino for name in names]
    assert train("--epochs", "1", "--resume") == 0
    output = capsys.readouterr().out
    assert "made again" not in output and "lost" not in output
    assert [(tmp_path / "run" / name).stat().st_ino for name in names] == before


@pytest.mark.parametrize("name", ["save_weights", "copy_best"])
def test_a_full_disk_after_the_last_checkpoint_leaves_nothing_stale(
    train, tmp_path, toy_dataset, monkeypatch, capsys, name
):
    """The report told the last epoch's accuracy, and the weights beside it were those of the epoch before."""
    plain = getattr(trainer_module, name)

    def full(folder, *arguments):
        if load_checkpoint(folder / "checkpoint.pt")["epoch"] == 2:
            raise OSError(28, "No space left on device")
        return plain(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, name, full)
        assert train("--epochs", "2", "--set", "ema.decay=0.5") == 2 or name == "copy_best"
    capsys.readouterr()
    assert train("--epochs", "2", "--set", "ema.decay=0.5", "--resume") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert_agrees(tmp_path / "run")
    assert evaluate_module.main(["run", "--data", str(toy_dataset.folder), "--device", "cpu"]) == 0
    accuracy = RunLog(tmp_path / "run").records("epoch")[-1]["test_accuracy_ema"]
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out and f"{accuracy:.2%}" in said


def test_a_best_checkpoint_that_cannot_be_made_again_is_said(train, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt") | {"best": {"accuracy": 1.0, "epoch": 5}}
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    for spoil, says in [(lambda path: None, "of epoch 1"), (zeroed, "damaged"), (os.unlink, "missing")]:
        spoil(tmp_path / "run" / "best.pt")
        assert train("--epochs", "1", "--resume") == 0
        assert f"best.pt: {says}; it cannot be made again" in capsys.readouterr().out


def test_temporaries_of_killed_writers_are_removed_at_the_next_start(train, finished, tmp_path, dead_pid):
    shutil.copytree(finished, tmp_path / "run")
    names = [f".{name}.{dead_pid}.tmp" for name in ("checkpoint.pt", "weights.safetensors", "report.md")]
    for name in [*names, f".best.pt.{os.getppid()}.tmp"]:
        (tmp_path / "run" / name).write_bytes(b"half")
    assert train("--epochs", "1", "--resume") == 0
    left = [path.name for path in (tmp_path / "run").glob(".*")]
    assert left == [f".best.pt.{os.getppid()}.tmp"]  # its process is alive
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run" / names[0]).write_bytes(b"half")  # killed at its first checkpoint, and started anew
    assert train("--epochs", "1") == 0
    assert list((tmp_path / "run").glob(".*")) == []


def test_records_are_synced_before_the_checkpoint_that_counts_on_them(train, monkeypatch):
    order, sync, save = [], os.fsync, Trainer.save

    def synced(file):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")).split(".")[-1 if "tmp" in order else 0])
        sync(file)

    def saved(self):
        order.clear()
        records = self.log.path.read_bytes()
        save(self)
        assert order[0] == "metrics" and len(order) > 2, order
        assert self.log.path.read_bytes() == records  # nothing was added in between

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Trainer, "save", saved)
    assert train("--epochs", "1") == 0


def test_lines_that_are_doubled_or_torn_are_repaired_at_resume(train, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole + whole[:50])
    assert train("--epochs", "1", "--resume") == 0
    assert path.read_bytes() == whole and "lost" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (("start", "interval"), "(the evaluation after epoch 1)"),
        (("start", "epoch"), "(steps 0 to 9)"),
        (("interval", "epoch"), "(the start)"),
        ((), "(steps 0 to 9, the start, the evaluation after epoch 1)"),
        (None, "(steps 0 to 9, the start, the evaluation after epoch 1)"),
    ],
    ids=["evaluation", "intervals", "start", "all lines", "the file"],
)
def test_lost_lines_are_said_at_resume(train, finished, tmp_path, capsys, kinds, says):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if any(f'"kind": "{kind}"' in line for kind in kinds or ())))
    if kinds is None:
        path.unlink()
    assert train("--epochs", "1", "--resume") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "records are lost" in line]
    assert len(said) == 1 and says in said[0]
    assert (tmp_path / "run" / "report.md").stat().st_mtime > (finished / "report.md").stat().st_mtime


def test_what_a_log_lacks(tmp_path):
    log = RunLog(tmp_path)
    log.append({"kind": "start", "step": 0})
    assert lost_records(log, step=0, interval=4, evaluated=[]) == ""
    for step in (4, 8, 9, 13, 17, 18):
        log.append({"kind": "interval", "step": step})
    options = {"interval": 4, "evaluated": []}
    assert lost_records(log, step=18, **options) == ""
    assert lost_records(log, step=20, **options) == "steps 18 to 20"
    assert lost_records(log, step=30, **options | {"evaluated": [1, 2, 3, 4, 5]}) == (
        "steps 18 to 30, the evaluation after epoch 1, the evaluation after epoch 2, the evaluation after epoch 3 "
        "and 2 more"
    )
