"""Pictures of any format, size and mode, arrays and .beton files: what is read of them, and what is named as wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from rsengine.data import DataError
from rsengine.run.pictures import pictures

CLASSES = ("circle", "square", "stripes")  # of the toy data
RNG = np.random.default_rng(0)


def read(*given, size=(16, 16), classes=CLASSES, say=lambda line: pytest.fail(line)):
    return list(pictures([Path(each) for each in given], size, classes, say))


def images(count, side=16):
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


MODES = [("1", "png"), ("L", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg"),
         ("I;16", "png"), ("RGB", "tga"), ("RGB", "qoi"), ("RGB", "ico"), ("RGB", "pcx"), ("RGB", "bmp"),
         ("RGB", "webp"), ("RGB", "tiff"), ("RGB", "avif"), ("RGB", "jp2")]  # fmt: skip


@pytest.mark.parametrize(("mode", "ending"), MODES)
@pytest.mark.parametrize("size", [(16, 16), (37, 21)])
def test_every_mode_and_format_gives_pixels_of_the_networks_size(tmp_path, mode, ending, size):
    feature = {"avif": "avif", "jp2": "jpg_2000", "webp": "webp"}.get(ending)
    if feature and not features.check(feature):
        pytest.skip(f"Pillow has no {ending} here")
    grey = Image.fromarray(np.full((size[1], size[0]), 200, np.uint8))
    picture = Image.fromarray(np.full((size[1], size[0]), 200 * 257, np.uint16)) if mode == "I;16" else grey
    picture = picture if mode == "I;16" else grey.convert(mode)
    picture.save(tmp_path / f"a.{ending}")
    (found,) = read(tmp_path / f"a.{ending}")
    assert found.pixels.shape == (16, 16, 3) and found.pixels.dtype == np.uint8 and found.label is None
    assert abs(found.pixels.mean() - 200) < 60 if mode == "1" else np.ptp(found.pixels) <= 4
    assert mode == "1" or abs(found.pixels.mean() - 200) <= 3


def test_what_starts_programs_is_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (error,) = read(tmp_path / "a.eps")
    assert isinstance(error, DataError) and "a.eps: not an image this program reads" in str(error)


def test_folders_named_as_classes_label_their_pictures(tmp_path):
    for name in ("circle/a.png", "stripes/deep/b.png", "other/c.png", "d.png", "circle.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(1)[0]).save(tmp_path / name)
    said = []
    found = {Path(each.name).name: each.label for each in read(tmp_path, say=said.append)}
    assert said == [f"{tmp_path}: other (1 picture) is no class of the network, so 1 picture is not scored"]
    assert found == {"a.png": 0, "b.png": 2, "c.png": None, "d.png": None, "circle.png": None}


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays_give_their_images_in_order(tmp_path, ending):
    path, content = tmp_path / f"x.{ending}", images(5)
    np.save(path, content) if ending == "npy" else np.savez(path, images=content)
    found = read(path)
    assert [each.name for each in found] == [f"{path}[{i}]" for i in range(5)]
    assert np.array_equal(np.stack([each.pixels for each in found]), content)
    assert {each.label for each in found} == {None}


def test_arrays_of_another_size_are_scaled_as_pictures_are(tmp_path):
    content = images(1, 40)
    np.save(tmp_path / "x.npy", content)
    Image.fromarray(content[0]).save(tmp_path / "x.png")
    of_array, of_picture = read(tmp_path / "x.npy", tmp_path / "x.png")
    assert np.array_equal(of_array.pixels, of_picture.pixels)


def test_labels_of_an_archive_of_arrays_are_taken(tmp_path):
    np.savez(tmp_path / "x.npz", x=images(3), y=np.array([[2], [0], [1]], np.int32))
    assert [each.label for each in read(tmp_path / "x.npz")] == [2, 0, 1]


def test_a_beton_gives_its_images_and_labels(toy_dataset):
    found = read(toy_dataset.test_beton, size=(32, 32))
    assert [each.label for each in found] == [0] * 7 + [1] * 7 + [2] * 7
    channels = [each.pixels.mean(axis=(0, 1)).argmax() for each in found]
    assert channels == [each.label for each in found]


def test_labels_of_other_classes_are_not_used(toy_dataset, tmp_path):
    said = []
    found = read(toy_dataset.test_beton, size=(32, 32), classes=("a", "b", "c"), say=said.append)
    assert {each.label for each in found} == {None} and "its classes are others than the network's" in said[0]
    (tmp_path / "alone.beton").write_bytes(toy_dataset.test_beton.read_bytes())
    found = read(tmp_path / "alone.beton", size=(32, 32), classes=("a", "b"), say=said.append)
    assert {each.label for each in found} == {None} and "labels are not among the network's 2 classes" in said[1]


BAD = {
    "floats": (lambda p: np.save(p, np.zeros((2, 16, 16, 3))), "npy", r"expected images \(N, H, W, 3\) uint8; got"),
    "grey": (lambda p: np.save(p, np.zeros((2, 16, 16), np.uint8)), "npy", r"expected images \(N, H, W, 3\) uint8"),
    "objects": (lambda p: np.save(p, np.array([{}])), "npy", "not an array of NumPy's, or damaged"),
    "no array": (lambda p: p.write_bytes(b"x"), "npy", "not an array of NumPy's, or damaged"),
    "nothing": (lambda p: p.write_bytes(b""), "npz", "not an array of NumPy's, or damaged"),
    "no file": (lambda p: None, "npy", "cannot be read"),
    "cut short": (lambda p: (np.save(p, images(9)), p.write_bytes(p.read_bytes()[:999])), "npy", "not an array of"),
    "two arrays without names": (lambda p: np.savez(p, images(1), images(1)), "npz", "one array called images; found"),
    "labels of other classes": (lambda p: np.savez(p, images=images(2), labels=[0, 3]), "npz",
                                "labels: expected 2 integers from 0 to 2; got .* from 0 to 3"),
    "too few labels": (lambda p: np.savez(p, images=images(2), labels=[0]), "npz", "labels: expected 2 integers"),
    "a beton that is none": (lambda p: p.write_bytes(b"x" * 100), "beton", "x.beton"),
    "no beton": (lambda p: None, "beton", "x.beton"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "ending", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_an_error_in_its_place(tmp_path, write, ending, words):
    path = tmp_path / f"x.{ending}"
    write(path)
    Image.fromarray(images(1)[0]).save(tmp_path / "after.png")
    error, after = read(path, tmp_path / "after.png")
    assert isinstance(error, DataError) and str(error).startswith(str(path)) and "\n" not in str(error)
    assert after.pixels.shape == (16, 16, 3)
    with pytest.raises(DataError, match=words):
        raise error


def test_a_network_for_images_that_are_not_square_takes_its_size_alone(tmp_path):
    Image.fromarray(images(1)[0]).save(tmp_path / "a.png")
    (error,) = read(tmp_path / "a.png", size=(16, 8))
    assert isinstance(error, DataError) and "16x16 pixels; this network takes 16x8" in str(error)
