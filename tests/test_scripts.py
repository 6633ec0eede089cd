"""What scripts read: with ``--json`` one object on standard output and nothing else there; with ``--quiet`` errors
alone. Whole commands, on the digits."""

import contextlib
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsengine import cli
from rsengine.config import Recipe
from rsengine.data import load_dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.engine.build import build_model
from rsengine.output import print_json
from rsengine.run.weights import save_weights
from tests.test_setup import ROOT


def call(*words):
    """The exit status of a command, and its lines on standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*map(str, words)])
    return status, out.getvalue().splitlines(), err.getvalue().splitlines()


def documented(command):
    """The fields that the documentation lists."""
    text = (ROOT / "docs" / "commands.md").read_text()
    return set(re.findall(r"`(\w+)`", re.search(rf"(?ms)^- `{command}`: (.*?)^(?=- |$)", text)[1]))


def parsed(*words):
    """The object that a command prints, and what it says on standard error."""
    status, out, err = call(*words, "--json")
    assert status == 0 and len(out) == 1, (out, err)
    found = json.loads(out[0])
    assert set(found) <= documented(words[0])
    return found, err


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The digits, and what the conversion printed."""
    folder = tmp_path_factory.mktemp("scripts") / "digits"
    return folder, *parsed("convert", "digits", "--out", folder)


@pytest.fixture(scope="module")
def run(converted):
    """Weights for the digits that no training has seen: what they say is as good as any."""
    folder = converted[0].parent / "run"
    recipe = Recipe().with_settings(["model.blocks=[1]", "model.width_multiplier=0.25", "model.stem_width=8"])
    folder.mkdir()
    torch.manual_seed(0)
    save_weights(folder, build_model(recipe, 10), recipe, load_dataset(converted[0]))
    return folder


@pytest.fixture(scope="module")
def photos(converted):
    """Forty digits as pictures in folders of their classes."""
    folder, reader = converted[0].parent / "photos", BetonReader(converted[0] / "test.beton")
    for i in range(40):
        path = folder / str(reader.labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(reader.image(i)).save(path)
    return folder


def test_convert(converted, tmp_path):
    folder, found, said = converted
    dataset = load_dataset(folder)
    assert found.pop("seconds") > 0
    assert found == {
        "folder": str(folder),
        "dataset": "digits",
        "classes": list(dataset.classes),
        "train_images": 1438,
        "test_images": 359,
        "image_size": [32, 32],
        "image_format": "raw",
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "identity": dataset.identity,
    }
    assert said[-1].startswith("Train on it with: ")
    assert call("convert", "digits", "--out", tmp_path / "quiet", "--quiet") == (0, [], [])


def test_evaluate(converted, run):
    arguments = ("evaluate", run, "--data", converted[0], "--device", "cpu", "--precision", "fp32")
    figures, said = parsed(*arguments, "--per-class")
    status, lines, errors = call(*arguments, "--per-class")
    assert status == 0 and errors == []
    assert [line for line in said if "throughput" not in line] == [line for line in lines if "throughput" not in line]
    (line,) = [line for line in lines if line.startswith("digits: accuracy")]
    assert f"accuracy {figures['accuracy']:.2%}, cross-entropy {figures['cross_entropy']:.4f} on 359 test" in line
    assert f"ECE {figures['ece']:.4f} (15 bins), Brier score {figures['brier']:.4f}" in "\n".join(lines)
    assert figures["weights"] == str(run / "weights.safetensors") and figures["dataset"] == "digits"
    assert (figures["flip"], figures["size"], figures["test_images"]) == (False, None, 359)
    classes = figures["classes"]
    assert [each["class"] for each in classes] == [str(i) for i in range(10)]
    assert sum(each["images"] for each in classes) == 359
    right = sum(each["images"] * each["accuracy"] for each in classes)
    assert right / 359 == pytest.approx(figures["accuracy"])
    assert None in [each["precision"] for each in classes]  # of a class that was never predicted
    assert call(*arguments, "--quiet") == (0, [], [])


def test_predict(run, photos, tmp_path):
    arguments = ("predict", run, photos, "--device", "cpu", "--top", 2)
    found, said = parsed(*arguments, "--pictures", tmp_path)
    assert (found["pictures"], found["unreadable"], found["out"]) == (40, 0, None)
    assert found["drawn"] == [str(tmp_path / name) for name in ("confusion.png", "mistakes.png")]
    labelled = found["labelled"]
    confusion = np.array(labelled["confusion"])
    assert labelled["pictures"] == confusion.sum() == 40
    assert labelled["accuracy"] == np.trace(confusion) / 40
    assert labelled["classes"] == [str(i) for i in range(10)]
    for each in found["predictions"]:
        assert Path(each["image"]).parent.name == each["true"] and len(each["classes"]) == 2
    best = [each["classes"][0]["class"] == each["true"] for each in found["predictions"]]
    assert np.mean(best) == labelled["accuracy"]
    assert len([line for line in said if line.startswith(str(photos))]) == 40


def test_predict_into_a_file(run, photos, tmp_path):
    arguments = ("predict", run, photos, "--device", "cpu")
    found, _ = parsed(*arguments, "--out", tmp_path / "a.csv")
    assert found["predictions"] is None and found["out"] == str(tmp_path / "a.csv") and found["pictures"] == 40
    assert call(*arguments, "--out", tmp_path / "b.csv", "--quiet") == (0, [], [])
    with open(tmp_path / "b.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 40
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_errors_stay_on_standard_error(run, photos, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    status, out, err = call("predict", run, photos, bad, "--device", "cpu", "--json", "--quiet")
    assert status == 1 and json.loads(out[0])["unreadable"] == 1 and len(out) == len(err) == 1
    assert err[0].startswith(f"error: {bad}: ")
    for words in (
        ["evaluate", "nowhere"],
        ["predict", "nowhere", bad],
        ["convert", "nowhere", "--out", tmp_path / "x"],
    ):
        status, out, err = call(*words, "--json", "--quiet")
        assert (status, out, len(err)) == (2, [], 1) and err[0].startswith("error: ")


def test_augment(converted, tmp_path):
    out = tmp_path / "drawn.png"
    arguments = ("augment", "--data", converted[0], "--out", out, "--policy", "none", "--images", 2, "--rows", 1)
    found, said = parsed(*arguments, "--set", "cutout_holes=2")
    assert (found["out"], found["dataset"], found["images"], found["rows"], found["seed"]) == (
        str(out), "digits", 2, 1, 0)  # fmt: skip
    assert (found["settings"]["augment.policy"], found["settings"]["augment.cutout_holes"]) == ("none", 2)
    assert said[-1] == f"wrote {out}" and out.stat().st_size > 0
    assert call(*arguments, "--quiet") == (0, [], [])


def test_what_json_does_not_know_is_null(capsys):
    print_json({"a": float("nan"), "b": [1.5, float("inf"), {"c": float("-inf")}], "d": "caf\udce9"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None, {"c": None}], "d": "caf\udce9"}
