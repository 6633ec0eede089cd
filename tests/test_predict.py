"""Classifying pictures: any number of them, bad ones among them, folders, names in any script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsengine import predict as predict_module
from rsengine.config import Recipe
from rsengine.model.preprocess import Preprocess
from rsengine.run import pictures as pictures_module
from rsengine.run.weights import load_weights, save_weights

ROOT = Path(__file__).parent.parent
CLASSES = ("猫", "caf\udce9", "two\nlines")  # the second: a byte that is not UTF-8, as file names may hold
RNG = np.random.default_rng(0)


class Data:
    """What weights say of the data that they were trained on."""

    classes, image_size, mean, std = CLASSES, (16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from rsengine.engine.build import build_model

    folder = tmp_path_factory.mktemp("run")
    settings = ["model.blocks=[1]", "model.width_multiplier=0.25", "model.stem_width=8"]
    recipe = Recipe().with_settings(settings)
    torch.manual_seed(0)
    save_weights(folder, build_model(recipe, len(CLASSES)), recipe, Data)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(name, side=16):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return pixels


def call(run, *arguments):
    return predict_module.main([str(run), "--device", "cpu", *map(str, arguments)])


def test_batches_are_bounded_and_give_what_single_pictures_give(run, folder, monkeypatch, capsys):
    seen, plain = [], predict_module.predict
    monkeypatch.setattr(predict_module, "PIXELS", 4 * 16 * 16 + 1)
    monkeypatch.setattr(predict_module, "predict", lambda w, images: seen.append(len(images)) or plain(w, images))
    names = [f"{i}.png" for i in range(10)]
    images = np.stack([draw(name) for name in names])
    assert call(run, *names, "--top", 1) == 0
    assert seen == [4, 4, 2]
    weights = load_weights(run)
    scores = weights.model(Preprocess(Data.mean, Data.std)(torch.from_numpy(images))).softmax(1).detach()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"weights: {run}/weights.safetensors, weights in safetensors: 3 classes, images of 16x16"
    shown = [re.fullmatch(r"(\d\.png): (.+) ([\d.]+)%", line).groups() for line in lines[1:]]
    assert [name for name, *_ in shown] == names
    for row, (_, words, percent) in zip(scores, shown, strict=True):
        assert words == predict_module.escaped(CLASSES[row.argmax()])
        assert float(percent) == pytest.approx(100 * float(row.max()), abs=0.06)


def test_what_was_classified_is_printed_before_the_next_pictures_are_read(run, folder, monkeypatch, capsys):
    printed, plain = [], pictures_module.read_image
    monkeypatch.setattr(predict_module, "PIXELS", 2 * 16 * 16)

    def reading(path, size):
        printed.append(capsys.readouterr().out.count("\n"))
        return plain(path, size)

    monkeypatch.setattr(pictures_module, "read_image", reading)
    for i in range(5):
        draw(f"{i}.png")
    assert call(run, *(f"{i}.png" for i in range(5))) == 0
    assert printed == [1, 0, 2, 0, 2]  # the first line is on the weights


def test_bad_pictures_are_named_and_the_others_are_classified(run, folder, capsys):
    draw("a.png")
    draw("b.png", 40)
    Path("bad.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("words.txt").write_text("no picture")
    assert call(run, "a.png", "bad.png", "words.txt", "none.png", "b.png") == 1
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()] == ["weights", "a.png", "b.png"]
    errors = captured.err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == ["bad.png", "words.txt", "none.png"]
    assert all(line.startswith("error: ") for line in errors)


def test_without_a_single_picture_the_status_is_that_of_bad_input(run, folder, capsys):
    Path("bad.png").write_bytes(b"")
    assert call(run, "bad.png", "none.png") == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and len(captured.err.splitlines()) == 2
    assert call(run, "bad.png", "--json") == 2 and capsys.readouterr().out == ""


def test_a_folder_stands_for_the_pictures_below_it_in_order(run, folder, capsys):
    for name in ("in/b.PNG", "in/a.png", "in/cats/10.bmp", "in/cats/2.bmp", "in/.hidden.png", "last.png"):
        draw(name)
    Path("in/readme.txt").write_text("about them")
    Path("empty").mkdir()
    assert call(run, "in", "empty", "last.png") == 1
    captured = capsys.readouterr()
    names = [line.split(":")[0] for line in captured.out.splitlines()]
    assert names == ["weights", "in/a.png", "in/b.PNG", "in/cats/10.bmp", "in/cats/2.bmp", "last.png"]
    assert captured.err.startswith("error: empty: holds no pictures") and captured.err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text exist on Linux only")
@pytest.mark.parametrize("settings", [{}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
                                      {"PYTHONIOENCODING": "ascii"}], ids=["as here", "LC_ALL=C", "ascii"])  # fmt: skip
def test_names_of_any_bytes_are_printed_one_a_line(run, folder, settings):
    draw("a.png")
    for name in (b"caf\xe9.png", "図\n.png".encode(), b"\x1b[2J.png"):
        os.link(b"a.png", name)
    Path(os.fsdecode(b"bad\xff.png")).write_bytes(b"no picture")
    command = [sys.executable, "-m", "rsengine.predict", str(run), ".", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 1 + 4 and done.stdout.count(b"%") == 12
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(b"error: bad")
    assert b"\x1b" not in done.stdout and b"\\x1b[2J.png: " in done.stdout


def test_interrupting_says_so_in_one_line(run, folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    draw("a.png")
    monkeypatch.setattr(pictures_module, "read_image", interrupt)
    assert call(run, "a.png") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_results_go_into_a_file_in_place_of_lines(run, folder, capsys):
    shown = [draw(f"{i}.png") for i in range(3)]
    Path("bad.png").write_bytes(b"")
    assert call(run, *(f"{i}.png" for i in range(3)), "bad.png", "--out", "deep/x.npy", "--top", 5) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == ["wrote deep/x.npy: 3 pictures"] and captured.err.startswith("error: bad")
    expected = predict_module.predict(load_weights(run), np.stack(shown)).numpy()
    assert np.array_equal(np.load("deep/x.npy"), expected)


def test_labelled_input_is_measured(run, folder, capsys):
    images = RNG.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    best = predict_module.predict(load_weights(run), images).argmax(1).numpy()
    labels = best.copy()
    labels[:5] = (best[:5] + 1) % 3
    np.savez("x.npz", images=images, labels=labels)
    assert call(run, "x.npz", "--pictures", "drawn") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("x.npz[0]: ") and "accuracy 75.00% on 20 labelled images" in lines
    assert {path.name for path in Path("drawn").iterdir()} == {"confusion.png", "mistakes.png"}
    assert call(run, "x.npz") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("--pictures DIR draws")


def test_folders_that_are_no_class_are_named_with_what_is_not_scored(run, folder, capsys):
    for name in ("猫/1", "猫/2", "caf\udce9/deep/1", "Dog/1", "Dog/deep/2", "x\ny/1", "loose"):
        draw(f"in/{name}.png")
    assert call(run, "in") == 0
    lines = capsys.readouterr().out.splitlines()
    said = "in: Dog (2 pictures), x\\ny (1 picture) are no classes of the network, so 3 pictures are not scored"
    assert lines[1] == said and sum(line.startswith("in/") for line in lines) == 7
    assert any(line.endswith("on 3 labelled images") for line in lines)
    shutil.rmtree("in/Dog")
    assert call(run, "in") == 0
    said = "in: x\\ny (1 picture) is no class of the network, so 1 picture is not scored"
    assert capsys.readouterr().out.splitlines()[1] == said


def test_labels_in_another_case_are_no_classes_and_folders_without_any_are_no_labels(run, folder, capsys):
    draw("in/TWO\nLINES/1.png"), draw("other/2026/1.png"), draw("right/猫/1.png")
    assert call(run, "in", "other", "right") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "of the network" in line]
    hint = "did you mean two\\nlines?"
    assert line.startswith(f"in: TWO\\nLINES (1 picture; {hint}) is no class")


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--top", 0], "--top 0: expected at least 1"), (["--out", "x.txt"], "--out x.txt: expected a name that ends")],
)
def test_options_out_of_range_are_one_line(run, folder, capsys, options, words):
    draw("a.png")
    assert call(run, "a.png", *options) == 2
    assert (error := capsys.readouterr().err).startswith(f"error: {words}") and error.count("\n") == 1


def test_pictures_of_unlabelled_input_are_said_to_be_lacking(run, folder, capsys):
    draw("a.png")
    assert call(run, "a.png", "--pictures", "drawn") == 0
    assert "no picture that was read has a label" in capsys.readouterr().out and not Path("drawn").exists()
