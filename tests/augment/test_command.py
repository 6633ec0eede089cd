"""The command ``augment``: what it draws, and what it says of that."""

import json

import pytest
from PIL import Image

from rsengine.augment.__main__ import main


@pytest.fixture
def call(toy_dataset, tmp_path, capsys):
    def call(out, *options):
        status = main(["--data", str(toy_dataset.folder), "--out", str(tmp_path / out), *options])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("asked, drawn", [(3, 3), (9999, 150)])
def test_the_images_are_those_that_were_drawn(call, tmp_path, asked, drawn):
    status, out, err = call("a.PNG", "--images", str(asked), "--rows", "1", "--json")
    assert status == 0 and json.loads(out)["images"] == drawn
    settings = json.loads(out)["settings"]
    assert settings["augment.policy"] == "autoaugment" and all(key.startswith("augment.") for key in settings)
    said = f"--images {asked}: drawn are all 150 images of the training set"
    assert (said in err.splitlines()) == (drawn < asked)
    assert Image.open(tmp_path / "a.PNG").format == "PNG"


@pytest.mark.parametrize("name", ["b.xyz", "b.jpg", "b"])
def test_what_it_does_not_write_is_refused(call, tmp_path, name):
    status, out, err = call(name)
    assert status == 2 and out == ""
    assert err == f"error: --out {tmp_path / name}: expected a name that ends in .png\n"
    assert not list(tmp_path.iterdir())
