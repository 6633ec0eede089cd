"""The command, the model card, and what is refused on writing and on reading."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsengine import evaluate, predict
from rsengine.data.sources.images import resize_and_crop
from rsengine.errors import SettingsError
from rsengine.export import FORMATS, export, load_classifier
from rsengine.export.__main__ import main
from rsengine.run.log import RunLog
from rsengine.run.weights import WeightsError, holds_weights

from .conftest import CLASSES, Data

ROOT = Path(__file__).parents[2]


def fails(capsys, *arguments):
    """The one line with which the command ends."""
    assert main([str(each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_safetensors_are_the_state_dict_with_a_description(run, tmp_path, capsys):
    folder, weights = run
    assert main([str(folder), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "weights.safetensors"
    assert f"wrote {path} ({path.stat().st_size:,} bytes)" in capsys.readouterr().out
    state = load_file(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.model.state_dict().items())
    with safe_open(path, framework="pt") as file:
        assert tuple(json.loads(file.metadata()["classes"])) == CLASSES
    assert load_classifier(path).classes == CLASSES


def test_a_file_may_be_named_and_weights_given(run, tmp_path):
    (path,) = export(run[1], "torch", tmp_path / "deep" / "net.pt2")
    assert [each.name for each in path.parent.iterdir()] == ["net.pt2"] and load_classifier(path).classes == CLASSES
    (path,) = export(run[1], "safetensors", tmp_path / "net.safetensors")
    assert holds_weights(path, run[1].model, run[1].recipe, Data)
    with pytest.raises(SettingsError, match="not the suffix of a file of --to safetensors; name such a file, or a"):
        export(run[1], "safetensors", tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_exporting_into_the_run_itself_keeps_its_weights(run):
    assert main([str(run[0]), "--to", "safetensors", "--out", str(run[0])]) == 0
    assert holds_weights(run[0] / "weights.safetensors", run[1].model, run[1].recipe, Data)
    (run[0] / "README.md").unlink()


def test_the_card_has_results_preprocessing_and_use(trained, tmp_path):
    folder, _ = trained()
    scores = {"train_loss": 1.0, "train_accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 1.0, "seconds": 1.0}
    tests = {"test_loss": 0.7, "test_accuracy": 0.6, "test_loss_ema": 0.6543, "test_accuracy_ema": 0.7951}
    times = {"epoch_seconds": 1.0, "eval_seconds": 1.0}
    RunLog(folder).append({"kind": "epoch", "step": 9, "epoch": 3, **scores, **tests, **times})
    assert main([str(folder), "--to", "timm", "--out", str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "timm"\n') and 'metrics: ["accuracy"]' in card
    for words in ("79.51%", "0.6543", "EMA weights after epoch 3", "32×32", "0.5, 0.4, 0.3", "local-dir:DIR",
                  "AutoModelForImageClassification", "猫, two words", "\\<b>"):  # fmt: skip
        assert words in card, words


NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "timm": ("timm", "transformers")}
CARDS = [("torch",), ("torch", "--uint8"), ("onnx",), ("onnx", "--uint8"), ("timm",), ("safetensors",)]


@pytest.mark.parametrize("options", CARDS, ids=" ".join)
def test_the_code_in_the_card_runs(trained, tmp_path, monkeypatch, capsys, options):
    from PIL import Image

    for package in NEEDS.get(options[0], ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    assert main([str(trained()[0]), "--out", ".", "--to", *options]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (40, 96, 3), np.uint8)
    Image.fromarray(pixels).save("picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    more = {"safetensors": "\nprint(about['classes'])", "timm": ""}
    code = code.replace("DIR", str(tmp_path)) + more.get(options[0], "\nnp.save('picture.npy', picture)")
    # As its readers run it: in a process of its own. What torch.export and transformers leave in one made a later
    # torch.compile end it by a signal (PyTorch 2.14).
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip()
    if options[0] == "safetensors":
        assert json.loads(found) == list(CLASSES)
        return
    if options[0] != "timm":
        assert np.array_equal(np.load("picture.npy"), resize_and_crop(pixels, 32))
    capsys.readouterr()
    assert predict.main([".", "picture.png", "--top", "1"]) == 0
    assert f"picture.png: {found} " in capsys.readouterr().out


REFUSED = {
    "an option of another format": (["--to", "timm", "--uint8"], "--uint8: only for --to onnx and torch"),
    "an opset of no ONNX": (["--to", "torch", "--opset", "18"], "--opset: only for --to onnx"),
    "machine code of no program": (["--to", "onnx", "--aot-inductor"], "--aot-inductor: only for --to torch"),
    "strides that timm has not": (["--to", "timm"], "train it with model.stem_stride=2 and model.stem_pool_stride=2"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_options_that_do_not_fit_are_refused(run, tmp_path, capsys, options, words):
    assert words in fails(capsys, run[0], *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_and_a_run_without_weights_are_refused(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is no folder" in fails(capsys, run[0], "--to", "timm", "--out", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no such file" in fails(capsys, tmp_path / "empty", "--to", "timm", "--out", tmp_path / "out")


def test_a_missing_package_is_named_with_the_command_that_brings_it(run, tmp_path, capsys, monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else plain(name))
    error = fails(capsys, run[0], "--to", "onnx", "--out", tmp_path)
    assert "needs onnx, onnxscript" in error and "pip install 'rsengine[export]'" in error
    (tmp_path / "model.onnx").write_bytes(b"")
    assert predict.main([str(tmp_path), "x.png"]) == 2
    assert "needs onnxruntime" in (error := capsys.readouterr().err) and "pip install 'rsengine[export]'" in error


def broken(tmp_path, run, name, change):
    """A file of an export, after ``change``."""
    format = {"model.pt2": "torch", "config.json": "timm", "model.safetensors": "timm", "model.onnx": "onnx"}[name]
    assert main([str(run[0]), "--to", format, "--out", str(tmp_path)]) == 0
    change(tmp_path / name)


def edit(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a program cut short": ("model.pt2", cut, "model.pt2: not a program of torch.export"),
    "a program with a wrong bit": ("model.pt2", flip, "model.pt2: not a program of torch.export .checksum of"),
    "names of too few classes": ("config.json", edit(label_names=["a"]), r"tensors.fc.weight: expected float32 \(1,"),
    "names that are none": ("config.json", edit(label_names=3), "label_names: expected a list; got 3"),
    "a configuration without a size": ("config.json", edit(pretrained_cfg={"mean": [0] * 3, "std": [1] * 3}),
                                       "pretrained_cfg.input_size: missing"),
    "a configuration without a mean": ("config.json", edit(pretrained_cfg={"input_size": [3, 32, 32]}),
                                       "pretrained_cfg.mean"),
    "a configuration that is none": ("config.json", lambda path: path.write_text("{"), "not valid JSON|Expecting"),
    "tensors cut short": ("model.safetensors", cut, "model.safetensors: damaged, or not the weights"),
    "an ONNX file cut short": ("model.onnx", cut, "model.onnx: not an ONNX file that can be run"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_exports_are_refused_in_a_line(trained, tmp_path, capsys, name, change, words):
    if name == "model.onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    broken(tmp_path, trained(), name, change)
    with pytest.raises(WeightsError, match=words) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    capsys.readouterr()
    assert predict.main([str(tmp_path), "x.png"]) == 2 == evaluate.main([str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("name", ["none", "none.onnx", "none.pt2", "none.safetensors"])
def test_what_is_not_there_is_said_to_be_missing(tmp_path, capsys, name):
    assert predict.main([str(tmp_path / name), "x.png"]) == 2
    assert "no such file; give a run folder" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_program_of_others_is_refused(tmp_path):
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), tmp_path / "model.pt2")
    with pytest.raises(WeightsError, match="without a description of classes and preprocessing"):
        load_classifier(tmp_path)


def test_weights_of_timms_own_are_read(tmp_path, images):
    """As on the Hub, where most name no classes."""
    import timm

    theirs = timm.create_model("resnetrs50", num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    config = {"architecture": "resnetrs50", "num_classes": 3}
    values = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": values}))
    ours, pixels = load_classifier(tmp_path), images(2)
    with torch.no_grad():
        expected = theirs(((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    torch.testing.assert_close(ours.logits(pixels), expected, rtol=0, atol=1e-5)
    assert ours.classes == ("0", "1", "2")


def test_programs_run_on_the_cpu_alone(run, tmp_path, capsys):
    assert main([str(run[0]), "--to", "torch", "--out", str(tmp_path)]) == 0
    assert evaluate.main([str(tmp_path), "--precision", "bf16"]) == 2
    assert "runs on the CPU in float32; leave out --device and --precision" in capsys.readouterr().err


def test_every_format_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    words = capsys.readouterr().out
    assert all(name in words for name in FORMATS) and "example: python -m rsengine.export" in words
