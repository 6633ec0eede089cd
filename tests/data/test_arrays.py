"""NumPy arrays as data sets: the names and shapes that are published, and what is refused."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError
from rsengine.data.convert import main
from rsengine.data.sources import archives
from rsengine.data.sources.tree import digest_of_list
from tests.data.data_builders import pixels, tar, zipped
from tests.data.source_builders import assert_split, grey, npz, opened

TRAIN, TEST = pixels(6, 1, 28, 28), pixels(3, 2, 28, 28)
LABELS, TEST_LABELS = [2, 0, 1, 1, 0, 2], [0, 1, 2]


def arrays(images: np.ndarray = TRAIN, labels: object = LABELS, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {"train_images": images, "train_labels": np.array(labels), **more}


def whole(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return arrays(**{"test_images": TEST, "test_labels": np.array(TEST_LABELS, np.uint8), **changes})


def test_medmnist(tmp_path, converted):
    """Labels in a column of uint8, and a validation split that is passed over."""
    column = {"labels": np.array(LABELS, np.uint8)[:, None], "test_labels": np.array(TEST_LABELS, np.uint8)[:, None]}
    validation = {"val_images": pixels(2, 9, 28, 28), "val_labels": np.array([[0], [1]], np.uint8)}
    said: list[str] = []
    source = tmp_path / "bloodmnist.npz"
    np.savez_compressed(source, **whole(**column, **validation))
    dataset, images, labels = converted(source, log=said.append)
    np.testing.assert_array_equal(images["train"], TRAIN)
    np.testing.assert_array_equal(images["test"], TEST)
    assert labels == {"train": LABELS, "test": TEST_LABELS}
    assert dataset.name == "bloodmnist" and dataset.classes == ("0", "1", "2") and dataset.image_size == (28, 28)
    assert any("ignoring validation" in line for line in said) and any("numbered" in line for line in said)


@pytest.mark.parametrize("form", ["npz", "folder", "tar.gz", "split folders"])
def test_keras(tmp_path, form):
    names = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
    if form == "npz":
        source = npz(tmp_path / "mnist.npz", "{0}", **{})
        np.savez(source, **{names[key]: value for key, value in whole().items()})
    else:
        source = tmp_path / "mnist"
        for key, value in whole().items():
            path = source / (f"{key.replace('_', '/')}.npy" if form == "split folders" else f"{names[key]}.npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, value)
        if form == "tar.gz":
            source = tar(tmp_path / "mnist.tar.gz", source)
    found = opened(source, tmp_path)
    assert_split(found.train, TRAIN, LABELS)
    assert_split(found.test, TEST, TEST_LABELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, np.int64])
def test_labels_may_be_of_any_integer_type(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", **whole(labels=np.array(LABELS, dtype)))
    found = opened(tmp_path / "a.npz", tmp_path).train
    assert found.labels.dtype == np.int64 and found.labels.tolist() == LABELS


SHAPES = {
    "(N, H, W)": lambda rgb, single: (single, single),
    "(N, H, W, 1)": lambda rgb, single: (single[..., None], single),
    "(N, 1, H, W)": lambda rgb, single: (single[:, None], single),
    "(N, 3, H, W)": lambda rgb, single: (rgb.transpose(0, 3, 1, 2), rgb),
    "columns first": lambda rgb, single: (np.asfortranarray(rgb), rgb),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path, shape):
    stored, expected = SHAPES[shape](TRAIN, grey(6, 4))
    np.savez(tmp_path / "a.npz", **whole(images=stored))
    found = opened(tmp_path / "a.npz", tmp_path)
    assert_split(found.train, expected, LABELS)
    assert found.train.load(0)[0].flags.c_contiguous


def test_without_test_set_a_part_is_set_aside_or_validation_taken(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(20, 1), labels=np.arange(20) % 2)
    said: list[str] = []
    found = opened(tmp_path / "a.npz", tmp_path, said, test_fraction=0.2)
    assert (len(found.train), len(found.test)) == (16, 4) and "set aside" in said[1]
    np.savez(tmp_path / "b.npz", **arrays(valid_images=TEST, valid_labels=np.array(TEST_LABELS)))
    assert_split(opened(tmp_path / "b.npz", tmp_path).test, TEST, TEST_LABELS)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in whole().items() if key != name}


def renamed(**names: str) -> dict[str, np.ndarray]:
    return {names.get(key, key): value for key, value in whole().items()}


BAD = {
    "floats": (whole(images=TRAIN / 255), ["train_images.npy", "float64, not uint8", "0 to 255"]),
    "wide integers": (whole(images=TRAIN.astype(np.int64)), ["int64, not uint8"]),
    "truth values": (whole(images=TRAIN > 100), ["bool, not uint8"]),
    "transparency": (whole(images=np.zeros((6, 8, 8, 4), np.uint8)), ["(6, 8, 8, 4)", "transparency"]),
    "volumes": (whole(images=np.zeros((6, 28, 28, 28), np.uint8)), ["(6, 28, 28, 28)"]),
    "coloured volumes": (whole(images=np.zeros((6, 8, 8, 8, 3), np.uint8)), ["(6, 8, 8, 8, 3)"]),
    "rows": (whole(images=np.zeros((6, 784), np.uint8)), ["(6, 784)", "(N, H, W)"]),
    "either axis": (whole(images=np.zeros((6, 3, 8, 3), np.uint8)), ["cannot be told which axis"]),
    "no pixels": (whole(images=np.zeros((6, 0, 8, 3), np.uint8)), ["no pixels"]),
    "no images": (whole(images=TRAIN[:0], labels=np.array([], int)), ["no pixels"]),
    "no test images": (whole(test_images=TEST[:0], test_labels=np.array([], int)), ["test_images.npy", "no pixels"]),
    "too large": (whole(images=np.zeros((6, 1, 65536), np.uint8)), ["65536×1 pixels is too large"]),
    "too few labels": (whole(labels=LABELS[:5]), ["6 images, but 5 labels"]),
    "float labels": (whole(labels=np.array(LABELS, float)), ["float64, not whole numbers", "astype('int64')"]),
    "NaN": (whole(labels=np.array([np.nan] * 6)), ["not whole numbers"]),
    "text labels": (
        whole(labels=np.array(list("abcabc"))),
        ["<U1, not whole", "np.unique(labels, return_inverse=True)"],
    ),
    "bytes labels": (
        whole(labels=np.array(list("abcabc"), "S")),
        ["not whole", "np.unique(labels, return_inverse=True)"],
    ),
    "one-hot": (whole(labels=np.eye(3, dtype=int)[LABELS]), ["3 columns", "argmax"]),
    "single label": (whole(labels=np.array(1)), ["labels of shape ()"]),
    "negative": (whole(labels=[0, 1, 2, 0, 1, -1]), ["image 5", "label -1 out of range"]),
    "enormous": (whole(labels=np.array([0, 1, 2, 0, 1, 2**63], np.uint64)), ["9223372036854775808 out of range"]),
    "too many classes": (whole(labels=[0, 1, 2, 0, 1, 2**62]), ["image 5", "out of range 0 … 8"]),
    "objects": (whole(labels=np.array([{}] * 6, object)), ["train_labels.npy", "Python objects"]),
    "no labels": (without("train_labels"), ["train_images.npy", "without labels of train"]),
    "no test labels": (without("test_labels"), ["test_images.npy", "without labels of test"]),
    "no train": ({k: v for k, v in whole().items() if "test" in k}, ["no arrays of train"]),
    "twice": (whole(x_train=TRAIN), ["x_train", "train_images", "remove one"]),
    "two sets": (renamed(test_images="cifar_test_images"), ["belong to different data sets"]),
    "unknown split": (renamed(test_images="eval_images"), ["do not say which is for training"]),
    "unsaid split": (renamed(train_images="images", train_labels="labels"), ["neither train nor test"]),
    "other names": ({"a": TRAIN, "b": np.array(LABELS)}, ["no arrays called images and labels", "x_train"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(tmp_path, capsys, case):
    content, words = BAD[case]
    np.savez(tmp_path / "bad.npz", **content)
    assert main([str(tmp_path / "bad.npz"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words), line


def forged(path: Path, header: str, content: bytes = b"") -> Path:
    """An .npz whose train_images.npy has this header."""
    good = io.BytesIO()
    np.savez(good, **whole())
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "train_images.npy":
                data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content
            target.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000, 32, 32, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-6, 28, 28, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (6, 28, 28, 3)}",  # and no content
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '|u1'}",
        "__import__('os').getcwd()",
        "((((((((",
    ],
)
def test_forged_headers(tmp_path, header):
    with pytest.raises(DataError, match="train_images.npy: damaged array"):
        opened(forged(tmp_path / "bad.npz", header), tmp_path)


def test_pickles_are_not_loaded(tmp_path):
    import pickle

    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    content = pickle.dumps(Bad())
    for data in (content, b"\x93NUMPY\x01\x00" + content):
        with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
            archive.writestr("x_train.npy", data)
            archive.writestr("y_train.npy", data)
        with pytest.raises(DataError, match="damaged array"):
            opened(tmp_path / "bad.npz", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_one_array_alone_and_a_truncated_file(tmp_path):
    np.save(tmp_path / "x_train.npy", TRAIN)
    with pytest.raises(DataError, match="x_train.npy: images without labels of train; add them"):
        opened(tmp_path / "x_train.npy", tmp_path)
    np.savez(tmp_path / "cut.npz", **whole())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    with pytest.raises(DataError, match="cut.npz: truncated or damaged archive"):
        opened(tmp_path / "cut.npz", tmp_path)


@pytest.mark.parametrize("labels", [[-1, 0, 1, 2, 0, 1], [0, 1000, 2000, 0, 1000, 2000]])
def test_of_labels_out_of_range_nothing_is_said_before(tmp_path, labels):
    np.savez(tmp_path / "a.npz", **whole(labels=labels))
    said: list[str] = []
    with pytest.raises(DataError, match="out of range"):
        opened(tmp_path / "a.npz", tmp_path, said)
    assert said == []


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("files", ["one", "one a split", "one beside arrays"])
def test_npz_files_in_a_folder_or_an_archive(tmp_path, form, files):
    folder = tmp_path / "mnist"
    folder.mkdir()
    if files == "one":
        np.savez(folder / "a.npz", **whole())
    elif files == "one a split":
        np.savez(folder / "train.npz", images=TRAIN, labels=LABELS)
        np.savez_compressed(folder / "test.npz", x=TEST, y=TEST_LABELS)
    else:
        np.savez(folder / "train.npz", images=TRAIN, labels=LABELS)
        np.save(folder / "test_images.npy", TEST)
        np.save(folder / "test_labels.npy", TEST_LABELS)
    source = {
        "folder": lambda: folder,
        "zip": lambda: zipped(tmp_path / "mnist.zip", folder),
        "tar.gz": lambda: tar(tmp_path / "mnist.tar.gz", folder),
    }[form]()
    found = opened(source, tmp_path)
    assert_split(found.train, TRAIN, LABELS)
    assert_split(found.test, TEST, TEST_LABELS)
    if form == "folder":
        digests = [(path.name, hashlib.sha256(path.read_bytes()).digest()) for path in folder.iterdir()]
        assert found.checksum == digest_of_list(digests)


def test_damaged_npz_files_in_an_archive(tmp_path, monkeypatch):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name in ("train", "test"):
        np.savez_compressed(folder / f"{name}.npz", images=np.zeros((100, 32, 32), np.uint8), labels=np.arange(100) % 2)
    whole_file = (folder / "test.npz").read_bytes()
    monkeypatch.setattr(archives, "LARGEST_SMALL", 150_000)  # enough for one of the two
    monkeypatch.setattr(archives, "LARGEST_RATIO", 1)
    with pytest.raises(DataError, match="test.npz: unpacks to more than|train.npz: unpacks to more than"):
        opened(zipped(tmp_path / "mnist.zip", folder), tmp_path)
    for content in (whole_file[:-50], b"no zip", b""):
        (folder / "test.npz").write_bytes(content)
        with pytest.raises(DataError, match="mnist.zip: mnist/test.npz: truncated or damaged archive"):
            opened(zipped(tmp_path / "mnist.zip", folder), tmp_path)
