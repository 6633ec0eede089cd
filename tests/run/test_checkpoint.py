"""Checkpoints and weights: written whole or not at all, refused when damaged, never overwriting what is not theirs."""

import contextlib
import errno
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rsengine.config import Recipe
from rsengine.engine.build import build_model
from rsengine.run import checkpoint as module
from rsengine.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from rsengine.run.files import WriteError, write_atomically
from rsengine.run.log import RunLog
from rsengine.run.weights import WeightsError, load_weights, save_weights

STATE = {
    "recipe": "x",
    "versions": {"torch": "2"},
    "dataset": {},
    "epoch": 3,
    "batch": 0,
    "seconds": 1.5,
    "totals": {"epoch_seconds": 0.0, "loss": 0.0, "correct": 0, "images": 0},
    "best": {"accuracy": 0.5, "epoch": 2},
    "step": {"w": torch.arange(5000.0)},
    "rng": {"cpu": torch.Generator().get_state(), "cuda": None},
}


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

    def torn(target, data):
        target.open("wb").write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, STATE | {"epoch": 4})
    assert load_checkpoint(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.fixture
def file_limit():
    """Lets files end at 8 KiB while a block runs, as ``ulimit -f`` does."""

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def full_disk(monkeypatch):
    """Every flush finds the disk full."""

    def refuse(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors", "report.md", "metrics.jsonl"])
def test_a_file_size_limit_is_one_line_and_the_old_file_stays(tmp_path, toy_dataset, file_limit, name):
    path, log = tmp_path / name, RunLog(tmp_path)
    model = build_model(Recipe().with_settings(["model.blocks=[1, 1]", "model.width_multiplier=0.25"]), 3)
    log.append({"kind": "start", "step": 0})
    write = {
        "checkpoint.pt": lambda: save_checkpoint(path, STATE),
        "weights.safetensors": lambda: save_weights(tmp_path, model, Recipe(), toy_dataset),
        "report.md": lambda: write_atomically(path, b"x" * 10_000),
        "metrics.jsonl": lambda: log.append({"kind": "start", "step": 0, "text": "x" * 10_000}),
    }[name]
    if name not in ("report.md", "metrics.jsonl"):
        write()
    before = path.read_bytes() if path.exists() else None
    with file_limit(), pytest.raises(WriteError) as caught:
        write()
    words = f"{path}: cannot be written (File too large): it is larger than files may be here; raise the limit (ulimit"
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value) and caught.value.status == 2
    if name == "metrics.jsonl":
        assert len(log.records()) == 1
    else:
        assert (path.read_bytes() if path.exists() else None) == before
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".tmp"]


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    full_disk(monkeypatch)
    with pytest.raises(WriteError, match=r"checkpoint.pt: cannot be written \(No space left on device\): the disk is"):
        save_checkpoint(path, STATE | {"epoch": 4})
    assert load_checkpoint(path)["epoch"] == 3 and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_error_of_pytorch_that_is_not_the_disk_s_stays_what_it_is(tmp_path, monkeypatch):
    def fail(_state, target):
        target.write(b"half")
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_checkpoint(tmp_path / "checkpoint.pt", STATE)


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
    with pytest.raises(WeightsError, match="weights.safetensors: image_size: missing; give the weights of another"):
        load_weights(tmp_path)


TENSOR = torch.Generator().get_state()
FIELDS = {
    "recipe": [None, 3, b"x", torch.zeros(1), "\ud800"],
    "versions": [None, [], {"torch": 2}, {3: "x"}],
    "dataset": [None, "x", {"name": 1}, {"counts": [1]}, {"counts": [1, "2"]}, {"options": 3}, {"image_size": [0, 1]}],
    "epoch": [None, "3", 3.0, True, -1, 2**70, torch.tensor(3)],
    "batch": [None, "3", 0.0, -1, 2**70],
    "seconds": [None, "3", -1.0, float("nan"), float("inf"), 10**400, torch.tensor(3.0)],
    "totals": [None, {}, STATE["totals"] | {"more": 1}, STATE["totals"] | {"loss": float("nan")}]
    + [STATE["totals"] | {"correct": 0.5}, STATE["totals"] | {"images": -1}],
    "best": [None, {}, {"accuracy": 2.0, "epoch": 2}, {"accuracy": float("nan"), "epoch": 2}]
    + [{"accuracy": "x", "epoch": 2}, {"accuracy": 0.5, "epoch": -1}, {"accuracy": 0.5}],
    "step": [None, [], {1: 2}, 7],
    "rng": [None, {}, {"cpu": None, "cuda": None}, {"cpu": TENSOR[:-1], "cuda": None}, {"cpu": TENSOR}]
    + [{"cpu": torch.full_like(TENSOR, 255), "cuda": None}, {"cpu": TENSOR.float(), "cuda": None}]
    + [{"cpu": TENSOR, "cuda": 3}, {"cpu": TENSOR, "cuda": TENSOR.long()}, {"cpu": TENSOR.to_sparse(), "cuda": None}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FIELDS.items() for value in values])
def test_a_field_of_another_type_or_out_of_range_is_named(tmp_path, key, value):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE | {key: value})
    with pytest.raises(CheckpointError, match=rf"checkpoint.pt: {key}\S*: (expected|missing)") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_grows_when_it_is_unpacked_is_refused_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="checkpoint.pt: truncated or not a checkpoint .it would grow when"):
        load_checkpoint(path)


@pytest.mark.parametrize("version", [None, [1], True, 10**300, "1", torch.zeros(3)])
def test_a_version_of_any_type_is_no_traceback(tmp_path, version):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "rsengine-checkpoint", "version": version}, path)
    with pytest.raises(CheckpointError, match="checkpoint version .*, this program reads 1"):
        load_checkpoint(path)
