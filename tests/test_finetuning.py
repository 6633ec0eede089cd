"""Fine-tuning by the command: what a run takes from given weights, what it records of them, resuming without them."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rsengine import evaluate as evaluate_module
from rsengine import train as train_module
from rsengine.config import Recipe
from rsengine.data import convert
from rsengine.engine.step import TrainStep
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.log import RunLog
from rsengine.run.weights import load_weights
from rsengine.trainer import Trainer
from tests.conftest import draw_classes
from tests.test_train import RECIPE, assert_same_tensors, state_of

TUNED = [
    "--epochs=2",
    "--set=train.batch_size=16",
    "--set=train.eval_batch_size=10",
    "--set=schedule.learning_rate=0.05",
]
STEPS = {
    "frozen": ["--set=train.freeze=stem", "--set=optimizer.body_rate=0.1"],
    "muon": ["--set=optimizer.name=muon", "--set=optimizer.body_rate=0.5"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, toy_dataset):
    """The folder of a run on the toy data."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "toy.toml").write_text(RECIPE)
    options = [
        "--recipe",
        folder / "toy.toml",
        "--data",
        toy_dataset.folder,
        "--device",
        "cpu",
        "--out",
        folder / "run",
    ]
    assert train_module.main([str(option) for option in options]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    """The toy data with two other classes, and pixels of another mean."""
    folder = tmp_path_factory.mktemp("other")
    draw_classes(folder / "source" / "train", 30, seed=2)
    draw_classes(folder / "source" / "test", 6, seed=3)
    for split in ("train", "test"):
        shutil.rmtree(folder / "source" / split / "circle")
        (folder / "source" / split / "square").rename(folder / "source" / split / "zigzag")
    return convert(folder / "source", folder / "converted", progress=False, log=lambda line: None)


@pytest.fixture
def tune(tmp_path, base, other_dataset, monkeypatch):
    """Runs the command on the other data in a folder of its own, from the base run unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, out="tuned", init=base, data=other_dataset):
        options = ["--data", str(data.folder), "--device", "cpu", "--out", out, *TUNED]
        return train_module.main([*options, *(["--init", str(init)] if init else []), *arguments])

    return run


def test_a_run_begins_with_the_weights_and_the_normalisation_of_another(tune, base, other_dataset, capsys):
    assert tune("--set=train.freeze=stem,stage1", "--set=optimizer.body_rate=0") == 0
    output = capsys.readouterr().out
    assert "a new classifier for 2 classes, because that of the weights has 3" in output
    assert "frozen: stem, stage1, with batch norm in evaluation mode; " in output and "random weights" not in output
    before, after, state = load_weights(base), load_weights("tuned"), state_of("tuned")
    assert after.recipe.model == before.recipe.model == Recipe.from_toml(RECIPE).model
    assert (after.mean, after.std) == (before.mean, before.std) and other_dataset.mean != before.mean
    assert after.classes == other_dataset.classes
    old = before.model.state_dict()
    for kind in ("model", "ema"):
        for name, value in state["step"][kind].items():
            if name.startswith(("stem.", "stages.0.")):
                assert torch.equal(value, old[name]), name
            elif "running" in name:
                assert not torch.equal(value, old[name]), name
            elif not name.startswith("fc.") and "num_" not in name:
                torch.testing.assert_close(value, old[name], rtol=1e-6, atol=0)  # the rate of the body is 0
    assert RunLog(Path("tuned")).records("epoch")[-1]["test_accuracy_ema"] > 0.9
    accuracy = RunLog(Path("tuned")).records("epoch")[-1]["test_accuracy_ema"]
    assert evaluate_module.main(["tuned", "--data", str(other_dataset.folder), "--device", "cpu"]) == 0
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out  # pixels are normalised in the same way


def test_the_origin_is_recorded(tune, base):
    import hashlib

    assert tune("--epochs=1") == 0
    sha256 = hashlib.sha256((base / "weights.safetensors").read_bytes()).hexdigest()
    (start,) = RunLog(Path("tuned")).records("start")
    for origin in (start["origin"], load_checkpoint(Path("tuned/checkpoint.pt"))["origin"]):
        assert (origin["path"], origin["sha256"]) == (str(base / "weights.safetensors"), sha256)
    report = Path("tuned/report.md").read_text()
    assert f"Began with the weights in `{base}/weights.safetensors`, sha256 `{sha256}`" in report
    assert "--recipe recipe.toml --init WEIGHTS --data" in report
    assert load_checkpoint(base / "checkpoint.pt")["origin"] is None
    assert "--init" not in (base / "report.md").read_text()


@pytest.mark.parametrize("kind", ["run", "timm"])
def test_weights_in_a_folder_whose_name_is_no_text(tune, base, tmp_path, kind):
    folder = tmp_path / os.fsdecode(b"l\xe4ufe")
    folder.mkdir()
    if kind == "run":
        shutil.copy(base / "weights.safetensors", folder)
    else:
        save_file(load_weights(base).model.state_dict(), folder / "model.safetensors")
    assert tune("--epochs=1", "--set=model.stem_stride=2", init=folder) == 0
    for text in (Path("tuned/report.md").read_text(), Path("tuned/metrics.jsonl").read_text().replace("\\\\", "\\")):
        assert f"{tmp_path}/l\\xe4ufe/" in text
    assert tune("--resume", "--epochs=1", init=None) == 0


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_resumed_run_needs_the_weights_no_more_and_ends_with_the_same_bits(
    tune, base, tmp_path, monkeypatch, capsys, settings
):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(base / "weights.safetensors", copy)
    assert tune(*settings, init=copy, out="whole") == 0
    plain = TrainStep.__call__

    def stopping(self, *batch):
        plain(self, *batch)
        if int(self.counter) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopping)
        assert tune(*settings, init=copy, out="parts") == 130
    copy.unlink()
    capsys.readouterr()
    assert tune("--resume", init=None, out="parts") == 0
    assert "init:" not in capsys.readouterr().out
    whole, parts = state_of("whole"), state_of("parts")
    assert_same_tensors(whole["step"], parts["step"])
    assert whole["origin"] == parts["origin"]
    assert load_weights("parts").mean == load_weights("whole").mean == load_weights(base).mean
    assert ("muon_lengths" in whole["step"]) == ("--set=optimizer.name=muon" in settings)
    assert "Began with the weights" in Path("parts/report.md").read_text()


def test_the_same_weights_go_on_where_they_ended(tune, base, toy_dataset, capsys):
    """On the data of the base run all of it is taken over: before the first step it is the network that was saved."""
    scores = []
    plain = Trainer.run

    def evaluated_first(self):
        scores.append({name: result.accuracy for name, result in self.evaluate().items()})
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", evaluated_first)
        assert tune("--epochs=1", data=toy_dataset) == 0
    assert "weights and batch-norm averages, the classifier too; pixels are" in capsys.readouterr().out
    expected = RunLog(base).records("epoch")[-1]["test_accuracy_ema"]
    assert scores == [{"raw": expected, "ema": expected}]


REFUSALS = {
    "nowhere": (["--init", "nowhere"], "--init nowhere: no such file or folder"),
    "resume": (["--resume"], "--init: a run that is resumed has its weights already; leave out --init, or --resume"),
    "recipe": (["--recipe", "quickstart"], "model.blocks: (1, 2, 2) against (1, 1)"),
    "stride": (["--set", "model.stem_stride=1"], "model.stem_stride: 1 against 2"),
    "parts": (["--set", "train.freeze=stage3"], "train.freeze: expected some of stem, stage1, stage2, joined by"),
    "a checkpoint": (["--init", "BASE/best.pt"], "a checkpoint of rsengine; give its folder, or the weights"),
    "a log": (["--init", "BASE/metrics.jsonl"], "damaged, or not the weights of a network alone"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_weights_that_a_run_cannot_begin_with_are_one_line_and_leave_no_folder(tune, base, capsys, refusal):
    arguments, words = REFUSALS[refusal]
    assert tune(*(argument.replace("BASE", str(base)) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not Path("tuned").exists()


def test_the_recipe_may_be_given_where_its_network_is_that_of_the_weights(tune, tmp_path):
    (tmp_path / "own.toml").write_text(RECIPE.replace("drop_path = 0.1", "drop_path = 0.2\ndropout = 0.1"))
    assert tune("--recipe", "own.toml", "--epochs=1") == 0
    assert Recipe.from_toml(Path("tuned/recipe.toml").read_text()).model.drop_path == 0.2


def test_frozen_parts_of_random_weights_are_said(tune, capsys):
    assert tune("--set=train.freeze=stem", "--epochs=1", init=None) == 0
    assert "frozen: these parts keep their random weights; --init begins with" in capsys.readouterr().out
