"""Checkpoints and weights: written whole or not at all, refused when damaged, never overwriting what is not theirs."""

import pytest
import torch
from safetensors.torch import save_file

from rsengine.config import Recipe
from rsengine.engine.build import build_model
from rsengine.run import checkpoint as module
from rsengine.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from rsengine.run.weights import WeightsError, load_weights, save_weights

STATE = {key: None for key in module._KEYS} | {"step": {"w": torch.arange(5000.0)}, "epoch": 3, "recipe": "x"}


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    save_checkpoint(path, STATE | {"epoch": 4})
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 4 and torch.equal(loaded["step"]["w"], STATE["step"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_interrupted_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)

    def torn(state, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, STATE | {"epoch": 4})
    assert load_checkpoint(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def damaged(path, how):
    save_checkpoint(path, STATE)
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[data.find(torch.arange(5000.0).numpy().tobytes()[400:440])] ^= 1
    elif how == "text":
        data = b"not a checkpoint"
    elif how == "empty":
        data = b""
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "flipped"])
def test_damage_is_an_error_in_one_line(tmp_path, how):
    path = tmp_path / "checkpoint.pt"
    damaged(path, how)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["truncated", "text", "foreign"])
def test_what_is_not_a_checkpoint_is_never_overwritten(tmp_path, how):
    path = tmp_path / "checkpoint.pt"
    if how == "foreign":
        torch.save({"model": {}}, path)
    else:
        damaged(path, how)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        save_checkpoint(path, STATE)
    assert path.read_bytes() == before


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_no_code_in_a_checkpoint_runs(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "rsengine-checkpoint", "version": 1, "evil": Evil()}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)
    assert "this ran" not in capsys.readouterr().out


def test_incomplete_missing_and_newer_ones_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no checkpoint there; start the run without --resume"):
        load_checkpoint(path)
    torch.save({"format": "rsengine-checkpoint", "version": 1, "recipe": ""}, path)
    with pytest.raises(CheckpointError, match="incomplete, it lacks versions"):
        load_checkpoint(path)
    torch.save({"format": "rsengine-checkpoint", "version": 2}, path)
    with pytest.raises(CheckpointError, match="version 2"):
        load_checkpoint(path)


def test_weights_come_back_with_all_that_is_needed_to_use_them(tmp_path, toy_dataset):
    recipe = Recipe().with_settings(["model.blocks=[1, 1]", "model.width_multiplier=0.25"])
    model = build_model(recipe, 3)
    save_weights(tmp_path, model, recipe, toy_dataset)
    weights = load_weights(tmp_path)
    assert weights.recipe == recipe and weights.classes == toy_dataset.classes and not weights.model.training
    assert weights.mean == toy_dataset.mean and weights.std == toy_dataset.std and weights.image_size == (32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights.model.parameters(), strict=True))


def test_weights_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(tmp_path)
    path.write_bytes(b"rubbish")
    with pytest.raises(WeightsError, match="damaged or not a safetensors file"):
        load_weights(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="not written by rsengine"):
        load_weights(tmp_path)
    save_file({"x": torch.zeros(1)}, path, {"format": "rsengine-weights-1", "recipe": "", "classes": '["a"]'})
    with pytest.raises(WeightsError, match="do not fit together"):
        load_weights(tmp_path)
