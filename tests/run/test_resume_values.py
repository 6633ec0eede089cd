"""A checkpoint whose tensors or position are not those of the run is refused at resume, and names the field."""

import shutil

import pytest
import torch

from rsengine import train
from tests.test_train import RECIPE


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_dataset):
    """The options of a finished run of two epochs of three steps, and its folder."""
    folder = tmp_path_factory.mktemp("values")
    (folder / "toy.toml").write_text(RECIPE)
    options = ["--recipe", folder / "toy.toml", "--data", toy_dataset.folder, "--device", "cpu", "--epochs", "2"]
    options = [str(each) for each in [*options, "--limit-train-batches", "3"]]
    assert train.main([*options, "--out", str(folder / "run")]) == 0
    return options, folder / "run"


def put(*keys, value):
    """Replaces what the keys lead to by ``value``, or by what it makes of it."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


BIAS = ("step", "model", "fc.bias")
CASES = {
    "NaN in a weight": (put(*BIAS, value=lambda t: t * float("nan")), "step.model.fc.bias: expected finite numbers"),
    "NaN in the EMA": (
        put("step", "ema", "fc.bias", value=lambda t: t + float("inf")),
        "step.ema.fc.bias: expected fin",
    ),
    "another dtype": (
        put(*BIAS, value=lambda t: t.double()),
        "step.model.fc.bias: expected float32 (3,); got float64 (3",
    ),
    "another shape": (
        put(*BIAS, value=lambda t: t[None]),
        "step.model.fc.bias: expected float32 (3,); got float32 (1, 3",
    ),
    "no tensor": (put(*BIAS, value=[0.0] * 3), "step.model.fc.bias: expected float32 (3,); got a value of type list"),
    "a gradient": (put(*BIAS, value=lambda t: t.requires_grad_()), "step.model.fc.bias: expected float32 (3,); got"),
    "a tensor too few": (lambda state: state["step"]["model"].pop("fc.bias"), "step.model.fc.bias: missing"),
    "a tensor too many": (put("step", "model", "x", value=torch.ones(1)), "step.model: expected the tensors of the re"),
    "a buffer too few": (lambda state: state["step"]["momentum"].pop(), "step.momentum: expected a list of"),
    "a momentum of text": (put("step", "momentum", 0, value="x"), "step.momentum[0]: expected float32"),
    "no EMA": (put("step", "ema", value=None), "step.ema: expected names with values; got None"),
    "a counter of text": (
        put("step", "counter", value="6"),
        "step.counter: expected int64 (); got a value of type str",
    ),
    "another counter": (
        put("step", "counter", value=lambda t: t + 1),
        "step.counter: expected 6, the steps in 2 epochs",
    ),
    "an epoch too many": (put("epoch", value=3), "epoch: expected an integer from 0 to 2; got 3"),
    "a batch too many": (put("batch", value=1), "batch: expected an integer from 0 to 0; got 1"),
    "a recipe of text": (put("recipe", value="x"), "not valid TOML"),
    "a recipe out of range": (
        put("recipe", value="[train]\nepochs = 0"),
        "train.epochs: expected an integer >= 1; got 0",
    ),
}


@pytest.mark.parametrize(("change", "words"), CASES.values(), ids=CASES)
def test_a_checkpoint_at_odds_with_its_run_is_refused(run, tmp_path, capsys, change, words):
    options, folder = run
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert train.main([*options, "--resume", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {words}") and error.count("\n") == 1
    assert path.read_bytes() == before
