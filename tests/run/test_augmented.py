"""The picture of what augmentation does, from a run's recipe and from the command line."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsengine.augment.__main__ import main
from rsengine.config import AugmentSection
from rsengine.data import find_dataset
from rsengine.run.augmented import draw_augmented


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield find_dataset("digits")


def test_the_first_row_is_the_originals_and_the_others_differ(digits, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("rsengine.run.plots.image_grid", lambda rows, path, **how: drawn.update(rows=rows, **how))
    augment = AugmentSection(policy="autoaugment", cutout_holes=4, cutout_size=4)
    draw_augmented(digits, augment, tmp_path / "a.png", title="t", seed=3, images=5, epochs=4)
    labels = [label for label, _ in drawn["rows"]]
    assert labels == ["original", "epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    originals = drawn["rows"][0][1]
    assert originals.shape == (5, 32, 32, 3)
    for _, images in drawn["rows"][1:]:
        assert (images != originals).any(axis=(1, 2, 3)).all()
    assert drawn["captions"][0] == [""] * 5 and len(drawn["captions"]) == 5
    assert any(caption for row in drawn["captions"] for caption in row)  # 20 images, half of all slots apply


def test_without_a_policy_there_are_no_captions(digits, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("rsengine.run.plots.image_grid", lambda rows, path, **how: drawn.update(rows=rows, **how))
    draw_augmented(digits, AugmentSection(crop_padding=0, flip=False), tmp_path / "a.png", title="t")
    assert drawn["captions"] == ()
    for _, images in drawn["rows"][1:]:
        np.testing.assert_array_equal(images, drawn["rows"][0][1])


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment", "augmix"])
def test_the_command_draws_every_policy(digits, tmp_path, capsys, policy):
    path = tmp_path / "a.png"
    arguments = ["--policy", policy, "--data", str(digits.folder), "--out", str(path), "--images", "3", "--rows", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    assert Image.open(path).size[1] > 3 * 32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images", "0"], "--images and --rows: expected at least 1"),
        (["--set", "cutout_hole=4"], "did you mean augment.cutout_holes?"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--policy", "none", "--set", "policy=randaugment"], "--policy none: --set policy=randaugment says otherwise"),
    ],
)
def test_bad_input_is_one_line(digits, tmp_path, capsys, arguments, says):
    given = ["--out", str(tmp_path / "a.png"), "--data", str(digits.folder), *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rsengine.augment", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--policy" in done.stdout
