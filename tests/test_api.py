"""The Python API on a toy data set: the same run as by the command, read, plotted, stopped, and asked."""

import importlib
import inspect
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rsengine
from rsengine import api
from rsengine.config import Recipe, RecipeError
from rsengine.data.errors import UserError
from rsengine.engine.step import TrainStep
from rsengine.predict import predict
from rsengine.run.log import RunLog
from rsengine.run.pictures import read_image
from tests.test_train import RECIPE, assert_same_tensors, state_of


@pytest.fixture(scope="module")
def toy(toy_dataset):
    def run(out, **options):
        options = {"set": {"train.epochs": 2}} | options
        return rsengine.train(Recipe.from_toml(RECIPE), data=toy_dataset.folder, out=out, device="cpu", **options)

    return run


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    return toy(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def model(run):
    return rsengine.load(run)


def test_a_run_has_its_accuracy_and_tables(run):
    epochs, intervals = (RunLog(run.folder).records(kind) for kind in ("epoch", "interval"))
    assert len(epochs) == 2 and run.recipe == Recipe.from_toml(RECIPE).with_settings(["train.epochs=2"])
    assert run.accuracy == epochs[-1]["test_accuracy_ema"] and not run.stopped
    assert f"{run.accuracy:.2%} after epoch 2" in repr(run)
    assert run.history["train_loss"] == [record["train_loss"] for record in epochs]
    assert run.intervals["step"] == [record["step"] for record in intervals]
    assert {len(column) for column in run.history.values()} == {2} and "kind" not in run.history
    assert rsengine.Run(run.folder).history == run.history


def test_the_history_is_a_data_frame_where_pandas_is_installed(run):
    pytest.importorskip("pandas")
    frame = run.history.to_pandas()
    assert list(frame.columns) == list(run.history) and frame["epoch"].tolist() == [1, 2]


def test_time_to_the_first_step_begins_with_the_call(run):
    (start,) = RunLog(run.folder).records("start")
    own = RunLog(run.folder).records("epoch")[-1]["seconds"]
    assert 0 < start["time_to_first_step"] < own + 60


def test_a_plot_has_the_curves_of_the_history(run):
    loss, accuracy, rate = run.plot().axes
    drawn = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    assert drawn["test, EMA weights"] == pytest.approx([100 * value for value in run.history["test_accuracy_ema"]])
    assert Image.open(io.BytesIO(run.plot()._repr_png_())).size == (756, 792)  # what notebooks look for
    assert loss.get_ylabel() == "Loss" and rate.get_ylabel() == "Learning rate"


def test_every_kind_of_image_gives_the_same_answer(model, toy_dataset, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = predict(model.weights, pixels).numpy()
    pictures = [Image.fromarray(image) for image in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    last = torch.from_numpy(pixels)
    for images in (
        paths,
        [str(path) for path in paths],
        pictures,
        pixels,
        list(pixels),
        last,
        last.permute(0, 3, 1, 2),
    ):
        assert np.array_equal(model.predict(images).probabilities, expected)
    mixed = model.predict([paths[0], pictures[1], pixels[2]])
    assert np.array_equal(mixed.probabilities, expected) and len(mixed) == 3
    for single in (paths[0], pictures[0], pixels[0], last[0].permute(2, 0, 1)):
        assert model.predict(single).probabilities == pytest.approx(expected[:1], abs=1e-6)
    assert mixed.labels == [model.classes[i] for i in expected.argmax(axis=1)]
    best = mixed.top(2)[1]
    order = np.argsort(-expected[1])[:2]
    assert best == [(model.classes[i], expected[1, i]) for i in order]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pillow_images_of_any_mode_and_size_are_read_as_files_are(model, tmp_path, mode):
    noise = np.random.default_rng(1).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(noise, "RGBA").convert("RGB" if mode not in ("RGBA", "LA") else "RGBA").convert(mode)
    file = tmp_path / "picture.tif"
    (picture.convert("RGB") if mode in ("F", "YCbCr", "CMYK") else picture).save(file)
    expected = predict(model.weights, read_image(file, (32, 32))[None]).numpy()
    assert np.array_equal(model.predict(picture).probabilities, expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_images_without_a_range_are_refused_as_files_are(model, mode):
    with pytest.raises(UserError, match=f"images: pixels of type {mode} have no agreed range"):
        model.predict(Image.new(mode, (32, 32), 3))


def test_a_rotation_in_exif_is_applied_to_pillow_images_too(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    turned = model.predict(np.rot90(pixels, -1)).probabilities
    assert np.array_equal(model.predict(Image.open(path)).probabilities, turned)
    assert np.array_equal(model.predict(path).probabilities, turned)


@pytest.mark.parametrize("images, words", [
    (np.zeros((32, 32, 3), np.float32), "images: expected uint8 RGB pixels .* not normalised; got float32"),
    (np.zeros((3, 32, 32), np.uint8), r"images: expected uint8 RGB pixels \(N, H, W, 3\).*got uint8 \(3, 32, 32\)"),
    (np.zeros((0, 0, 3), np.uint8), "images: expected uint8"),
    (torch.zeros(32, 32), "channels first or last.*got float32"),
    ([], "images: expected at least one"),
    (["no.png"], "no.png: cannot be read .No such file"),
    ([7], r"images\[0\]: expected paths, Pillow images, uint8 arrays or tensors; got int"),
    ({"a": 1}, "images: expected paths"),
])  # fmt: skip
def test_what_is_no_image_is_refused_in_one_line(model, images, words):
    with pytest.raises(UserError, match=words) as caught:
        model.predict(images)
    assert "\n" not in str(caught.value)


def test_many_images_go_through_in_bounded_batches(model, monkeypatch):
    sizes = []
    plain = importlib.import_module("rsengine.predict").predict

    def counted(weights, part):
        sizes.append(len(part))
        return plain(weights, part)

    monkeypatch.setattr("rsengine.predict.predict", counted)
    assert len(model.predict(np.zeros((300, 32, 32, 3), np.uint8))) == 300 and sizes == [256, 44]


def test_ctrl_c_returns_a_run_that_can_go_on(toy, tmp_path, monkeypatch, capsys, run):
    plain = TrainStep.__call__

    def stopping(self, *inputs):
        plain(self, *inputs)
        if int(self.counter) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopping)
        stopped = toy(tmp_path / "run")
    assert stopped.stopped and "stopped after step 5 of 18" in capsys.readouterr().out
    with pytest.raises(UserError, match="no epoch has been evaluated"):
        stopped.accuracy  # noqa: B018
    assert rsengine.Run(tmp_path / "run").stopped and "stopped" in repr(stopped)
    whole = toy(tmp_path / "run", resume=True)
    assert not rsengine.Run(tmp_path / "run").stopped and not whole.stopped and whole.accuracy == run.accuracy
    assert_same_tensors(state_of(run.folder)["step"], state_of(whole.folder)["step"])


def test_sigterm_ends_the_process_with_everything_saved(toy, tmp_path, monkeypatch):
    plain = TrainStep.__call__

    def ended(self, *inputs):
        plain(self, *inputs)
        if int(self.counter) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainStep, "__call__", ended)
    with pytest.raises(SystemExit) as caught:
        toy(tmp_path / "run")
    assert caught.value.code == 143 and (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_in_another_thread_works(toy, tmp_path, run):
    found = []
    thread = threading.Thread(target=lambda: found.append(toy(tmp_path / "run", quiet=True)))
    thread.start()
    thread.join()
    assert found[0].accuracy == run.accuracy


def test_quiet_prints_nothing(toy, tmp_path, capfd):
    toy(tmp_path / "run", quiet=True, set=["train.epochs=1"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("settings, words", [
    ({"train.epoch": 5}, "train.epoch: no such key; did you mean train.epochs"),
    ({"train.epochs": "five"}, "train.epochs: expected an integer"),
    ({"train": 5}, r"train: expected a section"),
    (["train.epochs"], "--set train.epochs: expected section.key=value"),
])  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(toy, tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        toy(tmp_path / "run", set=settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["out", "data", "init", "recipe"])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_text_names_nothing(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: got an empty text; give a value, or leave it out$"):
        rsengine.train(**{"recipe": "nothing", name: text})
    for open_run in (rsengine.Run, rsengine.load):
        with pytest.raises(UserError, match="got an empty text"):
            open_run(text)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        rsengine.Run(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        rsengine.load(tmp_path)


def test_exporting_is_the_commands(model, tmp_path):
    (written,) = model.export("safetensors", tmp_path / "model.safetensors")
    state = load_file(written)
    assert state.keys() == model.weights.model.state_dict().keys()
    with pytest.raises(UserError, match="expected one of .*onnx"):
        model.export("onyx", tmp_path / "model")


def test_train_is_a_function_whatever_was_imported_before():
    for first in ("import rsengine.train", "from rsengine.training import train", "pass"):
        code = f"import rsengine, inspect\n{first}\nprint(list(inspect.signature(rsengine.train).parameters))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(list(inspect.signature(api.train).parameters))
    assert set(rsengine.__all__) <= set(dir(rsengine))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rsengine.trian  # noqa: B018


def test_every_public_name_is_documented():
    text = Path(__file__).parent.parent.joinpath("docs", "api.md").read_text()
    for name in rsengine.__all__:
        assert inspect.getdoc(getattr(api, name)) and f"{name}" in text
    for option in inspect.signature(api.train).parameters:
        assert f"{option}:" in inspect.getdoc(api.train) and f"`{option}`" in text, option
