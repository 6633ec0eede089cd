"""Accuracy, mirror images, calibration, classes and sizes: against plain PyTorch on the same pixels."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rsengine.config import Recipe
from rsengine.data import convert
from rsengine.data.beton.reader import BetonReader
from rsengine.engine.build import build_model
from rsengine.evaluate import class_table, main, measure
from rsengine.export import export, load_classifier
from rsengine.model.preprocess import Preprocess
from rsengine.run.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_dataset):
    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe().with_settings(["model.blocks=[1, 1]", "model.width_multiplier=0.25", "model.stem_width=8"])
    torch.manual_seed(0)
    model = build_model(recipe, 3)
    with torch.no_grad():
        model.fc.weight.mul_(100)
    save_weights(folder, model, recipe, toy_dataset)
    return folder


@pytest.fixture(scope="module")
def pixels(toy_dataset):
    reader = BetonReader(toy_dataset.test_beton)
    return torch.from_numpy(np.stack([reader.image(i) for i in range(len(reader))])), torch.from_numpy(reader.labels)


def call(run, toy_dataset, capsys, *options):
    arguments = [str(run), "--data", str(toy_dataset.folder), "--device", "cpu", "--precision", "fp32", *options]
    assert main(arguments) == 0
    return capsys.readouterr().out


def plain(run, images, flip):
    weights = load_weights(run)
    x = Preprocess(weights.mean, weights.std)(images)
    with torch.no_grad():
        shares = weights.model(x).double().softmax(1)
        if flip:
            shares = (shares + weights.model(x.flip(3)).double().softmax(1)) / 2
    return shares


@pytest.mark.parametrize("flip", [False, True])
def test_figures_are_those_of_plain_pytorch(run, toy_dataset, pixels, capsys, flip):
    images, labels = pixels
    shares = plain(run, images, flip)
    out = call(run, toy_dataset, capsys, *["--flip"] * flip)
    accuracy, loss = float((shares.argmax(1) == labels).double().mean()), float(F.nll_loss(shares.log(), labels))
    how = " (mean of each image and its mirror image)" if flip else ""
    assert f"accuracy {accuracy:.2%}{how}, cross-entropy {loss:.4f} on 21 test images" in out
    brier = float((shares - F.one_hot(labels, 3)).square().sum(1).mean())
    assert f"Brier score {brier:.4f}" in out and re.search(r"ECE 0\.\d{4} \(15 bins\)", out)
    assert re.search(r"throughput: [\d,]+ images/s", out)
    assert out.startswith(f"weights: {run}/weights.safetensors, weights in safetensors: 3 classes")


def test_flipping_changes_the_figures(run, pixels):
    assert not torch.equal(plain(run, pixels[0], True), plain(run, pixels[0], False))


def test_batches_of_any_size_give_the_same(run, pixels):
    classifier = load_classifier(run, "cpu")
    whole = measure(classifier, [pixels])
    parts = measure(classifier, zip(pixels[0].split(8), pixels[1].split(8), strict=True))
    assert np.array_equal(whole.predictions.predicted, parts.predictions.predicted)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6) and parts.images_per_second > 0


def test_a_table_of_the_classes(run, toy_dataset, pixels, capsys):
    out = call(run, toy_dataset, capsys, "--per-class")
    predictions = measure(load_classifier(run, "cpu"), [pixels]).predictions
    head, *rows = class_table(predictions, toy_dataset.classes)
    assert head.split()[:4] == ["class", "images", "accuracy", "precision"] and "\n".join([head, *rows]) in out
    for number, row in enumerate(rows):
        name, images, recall, *_ = row.split()
        own = predictions.labels == number
        assert (name, images) == (toy_dataset.classes[number], "7")
        assert recall == f"{(predictions.predicted[own] == number).mean():.2%}"


@pytest.mark.parametrize(
    "format", ["torch", "safetensors", pytest.param("onnx", id="onnx"), pytest.param("timm", id="timm")]
)
def test_every_format_gives_the_same_figures(run, toy_dataset, tmp_path, capsys, format):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    export(run, format, tmp_path, say=lambda line: None)
    own, theirs = (call(each, toy_dataset, capsys).splitlines() for each in (run, tmp_path))
    assert own[1:3] == theirs[1:3]
    kinds = {"torch": "a program of torch.export", "onnx": "an ONNX file", "timm": "timm and the Hub"}
    assert kinds.get(format, "weights in safetensors") in theirs[0]


def test_another_size_is_refused_unless_it_is_asked_for(run, toy_dataset, tmp_path, capsys):
    source = toy_dataset.folder.parent / "source"
    large = convert(source, tmp_path / "large", size=48, progress=False, log=lambda line: None)
    arguments = [str(run), "--data", str(large.folder), "--device", "cpu", "--precision", "fp32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "its images are 48x48; the network learned 32x32" in error and "--size N" in error
    for size in (48, 40):
        assert main([*arguments, "--size", str(size)]) == 0
        assert re.search(rf"accuracy [\d.]+% \(at {size}x{size}\)", capsys.readouterr().out)
    assert main([*arguments, "--size", "0"]) == 2
    assert "--size 0: expected pixels from 1" in capsys.readouterr().err


def test_a_program_takes_its_own_size_alone(run, toy_dataset, tmp_path, capsys):
    export(run, "torch", tmp_path, say=lambda line: None)
    arguments = [str(tmp_path), "--data", str(toy_dataset.folder), "--size", "48"]
    assert main(arguments) == 2
    assert "takes 32x32 alone; leave out --size" in capsys.readouterr().err
