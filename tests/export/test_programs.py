"""ONNX files and programs of PyTorch: they give our logits, say how to be fed, and need no rsengine."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from rsengine.errors import SettingsError
from rsengine.export import export, load_classifier
from rsengine.model.preprocess import Preprocess

from .conftest import CLASSES, Data

BATCHES = (1, 7, 256)


@pytest.fixture
def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("uint8", [False, True], ids=["normalised", "pixels"])
def test_onnx_gives_our_logits_at_every_batch(onnxruntime, run, tmp_path, images, uint8):
    folder, weights = run
    export(folder, "onnx", tmp_path, uint8=uint8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    again = load_classifier(tmp_path)
    assert "ONNX" in again.kind and again.classes == CLASSES
    for count in BATCHES:
        pixels = images(count)
        x = Preprocess(weights.mean, weights.std)(pixels).contiguous()
        with torch.no_grad():
            expected = weights.model(x)
        (logits,) = session.run(None, {"images": (pixels if uint8 else x).numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)
        torch.testing.assert_close(again.logits(pixels), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, given.name, taken.shape[0]) == ("images", "logits", "batch")
    assert taken.shape[1:] == ([32, 32, 3] if uint8 else [3, 32, 32])
    said = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(said["classes"])) == CLASSES and json.loads(said["mean"]) == list(Data.mean)
    assert said["input"] == ("pixels" if uint8 else "normalised")


def test_the_opset_may_be_chosen(onnxruntime, run, tmp_path):
    import onnx

    export(run[0], "onnx", tmp_path, opset=18)
    assert [each.version for each in onnx.load(tmp_path / "model.onnx").opset_import if not each.domain] == [18]
    with pytest.raises(SettingsError, match="--opset 3: PyTorch (writes version|refuses)|--to onnx: PyTorch refuses"):
        export(run[0], "onnx", tmp_path, opset=3)


ALONE = """
import sys
sys.modules["rsengine"] = None  # importing it fails
import torch
program = torch.export.load(sys.argv[1])
assert not [n for n in program.graph.nodes if "rsengine" in str(n.target)]
inputs = torch.load(sys.argv[2])
torch.save([program.module()(x) for x in inputs], sys.argv[2])
"""


@pytest.mark.parametrize("uint8", [False, True], ids=["normalised", "pixels"])
def test_a_program_of_torch_export_runs_without_rsengine(run, tmp_path, images, uint8):
    folder, weights = run
    export(folder, "torch", tmp_path, uint8=uint8)
    pixels = [images(count) for count in BATCHES]
    inputs = [Preprocess(weights.mean, weights.std)(each).contiguous() for each in pixels]
    with torch.no_grad():
        expected = [weights.model(x) for x in inputs]
    torch.save(pixels if uint8 else inputs, tmp_path / "tensors")
    subprocess.run([sys.executable, "-c", ALONE, tmp_path / "model.pt2", tmp_path / "tensors"], check=True)
    again = load_classifier(tmp_path / "model.pt2")
    assert "torch.export" in again.kind and again.classes == CLASSES and not again.any_size
    for images_, logits, theirs in zip(pixels, expected, torch.load(tmp_path / "tensors"), strict=True):
        torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(again.logits(images_), logits, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_machine_code_by_aot_inductor(run, tmp_path, images):
    folder, weights = run
    export(folder, "torch", tmp_path, compiled=True, uint8=True)
    again = load_classifier(tmp_path)
    assert "AOTInductor" in again.kind and again.classes == CLASSES
    for count in BATCHES:
        pixels = images(count)
        with torch.no_grad():
            expected = weights.model(Preprocess(weights.mean, weights.std)(pixels))
        torch.testing.assert_close(again.logits(pixels), expected, rtol=0, atol=1e-4)


def test_the_network_that_is_exported_stays_as_it_is(run, tmp_path):
    folder, weights = run
    before = (folder / "weights.safetensors").read_bytes()
    export(folder, "torch", tmp_path)
    assert (folder / "weights.safetensors").read_bytes() == before
