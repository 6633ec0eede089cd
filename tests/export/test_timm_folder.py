"""What timm and transformers build of an exported folder gives the logits of our network."""

import json

import pytest
import timm
import torch

from rsengine.config import load_recipe
from rsengine.engine.build import build_model
from rsengine.errors import SettingsError
from rsengine.export import export, load_classifier
from rsengine.export.timm_folder import timm_arguments
from rsengine.model import resnet_rs
from rsengine.model.preprocess import Preprocess

from .conftest import CLASSES, Data

NETWORKS = {
    "two stages": (),
    "four stages": ("model.blocks=[1, 1, 2, 1]",),
    "widths that are rounded": ("model.width_multiplier=0.3", "model.blocks=[1, 1, 1]"),
    "another stem": ("model.stem_width=12",),
    "a wide squeeze-and-excite": ("model.se_ratio=0.25", "model.width_multiplier=0.5"),
    "a narrow one": ("model.se_ratio=0.0625", "model.width_multiplier=0.5"),
    "one between": ("model.se_ratio=0.15", "model.width_multiplier=0.5"),
}


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_timm_gives_our_logits_and_we_read_the_folder(trained, tmp_path, images, settings):
    folder, weights = trained(*settings)
    export(folder, "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = images(7)
    x = Preprocess(weights.mean, weights.std)(pixels)
    with torch.no_grad():
        expected = weights.model(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(theirs(x), expected, rtol=0, atol=1e-5)
    again = load_classifier(tmp_path)
    torch.testing.assert_close(again.logits(pixels), expected, rtol=0, atol=1e-5)
    assert again.classes == CLASSES and again.image_size == (32, 32) and "timm" in again.kind
    config = timm.data.resolve_model_data_config(theirs)
    assert config["mean"] == list(Data.mean) and config["std"] == list(Data.std)
    assert config["input_size"] == [3, 32, 32] and config["crop_pct"] == 1.0


def test_transformers_gives_our_logits(trained, tmp_path, images):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, weights = trained()
    export(folder, "timm", tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = Preprocess(weights.mean, weights.std)(images(5))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, weights.model(x), rtol=0, atol=1e-5)
    assert tuple(theirs.config.id2label.values()) == CLASSES


def test_the_papers_networks_need_no_arguments():
    for depth in (50, 101):
        with torch.device("meta"):
            assert timm_arguments(resnet_rs(depth)) == {"architecture": f"resnetrs{depth}", "model_args": {}}


def test_the_reports_networks_differ_in_the_stem_and_the_squeeze_and_excite():
    with torch.device("meta"):
        arguments = timm_arguments(build_model(load_recipe("report-2"), 10))
    assert arguments["model_args"] == {"stem_width": 128, "block_args": {"attn_layer": "se"}}


REFUSED = {
    "its stem strides by 1 and 2": ("model.stem_stride=1",),
    "its stem strides by 2 and 1": ("model.stem_pool_stride=1",),
    "it has 5 stages": ("model.blocks=[1, 1, 1, 1, 1]",),
    "it has a single block": ("model.blocks=[1]",),
    "it has no squeeze-and-excite": ("model.se_ratio=0",),
    "it has the stem of ResNet": ("model.resnet_d=false",),
    "its squeeze-and-excite is wider": ("model.se_ratio=0.5", "model.width_multiplier=0.5"),
}


@pytest.mark.parametrize(("words", "settings"), REFUSED.items(), ids=REFUSED)
def test_what_timm_has_no_arguments_for_is_refused_in_a_line(trained, tmp_path, words, settings):
    folder, _ = trained(*settings)
    with pytest.raises(SettingsError, match=f"{words}.*; use --to onnx, torch or safetensors") as caught:
        export(folder, "timm", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_configuration_has_what_the_hub_shows(trained, tmp_path):
    folder, weights = trained()
    export(folder, "timm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnetrs50" and config["num_classes"] == 4 == len(config["label_names"])
    assert config["num_features"] == weights.model.fc.in_features
    assert config["model_args"] == {"layers": [1, 2, 0, 0], "channels": [16, 32, 32, 32], "stem_width": 8}
    assert config["pretrained_cfg"]["interpolation"] == "bicubic"
