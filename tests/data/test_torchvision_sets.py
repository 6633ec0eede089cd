"""Data sets that torchvision reads, built in the layouts that it expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rsengine.data.find as find
from rsengine.data import DataError, find_dataset
from rsengine.data.convert import main
from rsengine.data.sources.torchvision_sets import TorchvisionName
from tests.data.data_builders import NAMES10, NAMES100, class_folders
from tests.data.source_builders import (
    assert_split,
    cifar,
    emnist,
    gtsrb,
    idx,
    mnist,
    opened,
    stl10,
    svhn,
)

DIGITS = tuple("0123456789")
BUILDERS = {
    "CIFAR10": lambda root, patch: (cifar(root, 10, patch), tuple(NAMES10)),
    "CIFAR100": lambda root, patch: (cifar(root, 100, patch), tuple(NAMES100)),
    "SVHN": lambda root, patch: (svhn(root, patch), DIGITS),
    "STL10": lambda root, patch: (stl10(root, patch), tuple(f"thing{i}" for i in range(10))),
    "MNIST": lambda root, patch: (mnist(root, "MNIST"), None),
    "FashionMNIST": lambda root, patch: (mnist(root, "FashionMNIST"), None),
    "KMNIST": lambda root, patch: (mnist(root, "KMNIST"), ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "EMNIST/digits": lambda root, patch: (emnist(root, "digits", 10), DIGITS),
    "EMNIST/letters": lambda root, patch: (emnist(root, "letters", 26, 1), tuple("abcdefghijklmnopqrstuvwxyz")),
    "GTSRB": lambda root, patch: (gtsrb(root), ("0", "1", "2")),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A download ends at once, as it does without a network."""
    import urllib.error

    def refuse(*arguments, **options):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", BUILDERS)
def test_images_and_labels_are_those_of_the_files(tmp_path, monkeypatch, name):
    content, classes = BUILDERS[name](tmp_path / "root", monkeypatch)
    source = opened(f"torchvision:{name}:{tmp_path / 'root'}", tmp_path)
    for split in ("train", "test"):
        assert_split(getattr(source, split), *content[split])
    assert source.name == name.lower().replace("/", "-")
    if classes is None:
        import torchvision

        classes = tuple(getattr(torchvision.datasets, name).classes)
    assert source.classes == classes
    again = opened(f"torchvision:{name}:{tmp_path / 'root'}", tmp_path)
    assert again.checksum == source.checksum and len(source.checksum) == 64


def test_a_set_without_splits_is_divided(tmp_path):
    class_folders(tmp_path / "root" / "eurosat", ("2750",), each=10)
    said: list[str] = []
    source = opened(f"torchvision:EuroSAT:{tmp_path / 'root'}", tmp_path, said, test_fraction=0.2)
    assert (len(source.train), len(source.test)) == (24, 6) and source.classes == ("cat", "dog", "eel")
    assert "set aside" in said[0]


def test_usps(tmp_path):
    """One of those whose names are not known here: a text of pixels from -1 to 1, and no names of classes."""
    import bz2

    pictures = {name: np.random.default_rng(seed).integers(0, 2, (20, 256)) for seed, name in enumerate(("", ".t"))}
    (tmp_path / "root").mkdir()
    for name, rows in pictures.items():
        lines = [
            f"{i % 10 + 1} " + " ".join(f"{k}:{2 * v - 1}" for k, v in enumerate(row, 1)) for i, row in enumerate(rows)
        ]
        (tmp_path / "root" / f"usps{name}.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    found = opened(f"torchvision:USPS:{tmp_path / 'root'}", tmp_path)
    for split, name in ((found.train, ""), (found.test, ".t")):
        assert_split(split, (255 * pictures[name]).reshape(-1, 16, 16), [i % 10 for i in range(20)])


def test_the_test_set_is_called_val_in_some(tmp_path):
    from torchvision.datasets import Imagenette

    base = tmp_path / "root" / "imagenette2-160"
    for split in ("train", "val"):
        for wnid in Imagenette._WNID_TO_CLASS:
            (base / split / wnid).mkdir(parents=True)
            from PIL import Image

            Image.new("RGB", (8, 8)).save(base / split / wnid / "1.JPEG")
    base.rename(tmp_path / "root" / "imagenette2")  # the full size, which is torchvision's default
    source = opened(f"torchvision:Imagenette:{tmp_path / 'root'}", tmp_path)
    assert (len(source.train), len(source.test)) == (10, 10) and source.classes[0] == "tench, Tinca tinca"


def test_sizes_that_differ_are_unified_or_refused(tmp_path, converted):
    gtsrb(tmp_path / "root", size=lambda i: (20 + i, 30))
    with pytest.raises(DataError, match="its images differ in size; convert it with .* --out DIR --size 32"):
        converted(f"torchvision:GTSRB:{tmp_path / 'root'}")
    dataset, images, labels = converted(f"torchvision:GTSRB:{tmp_path / 'root'}", size=16)
    assert dataset.image_size == (16, 16) and labels["test"] == [0, 0, 1, 1, 2, 2]


def test_conversion_of_colours(tmp_path, monkeypatch, converted):
    content = svhn(tmp_path / "root", monkeypatch)
    dataset, images, labels = converted(f"torchvision:SVHN:{tmp_path / 'root'}")
    np.testing.assert_array_equal(images["train"], content["train"][0])
    assert labels["test"] == content["test"][1] and dataset.source == "torchvision's SVHN"


def test_a_name_is_a_source_of_training_and_converted_once(tmp_path):
    content = mnist(tmp_path / "root", "MNIST")
    said: list[str] = []
    source = f"torchvision:MNIST:{tmp_path / 'root'}"
    first = find_dataset(source, log=said.append)
    assert first.folder.name.startswith("mnist-") and first.train_count == len(content["train"][1])
    assert first.classes[0] == "0 - zero"
    assert find_dataset(source, log=said.append) == first and "converted earlier" in said[-1]
    idx(tmp_path / "root" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.arange(20)[::-1] % 10)
    assert find_dataset(source, log=said.append).identity != first.identity


def test_two_sets_of_one_root_are_two_data_sets(tmp_path):
    mnist(tmp_path / "root", "MNIST")
    mnist(tmp_path / "root", "KMNIST")
    marks = {find.fingerprint(f"torchvision:{name}:{tmp_path / 'root'}") for name in ("MNIST", "KMNIST")}
    assert len(marks) == 2


def test_what_is_missing_is_downloaded_into_the_cache(tmp_path, monkeypatch):
    """The download is torchvision's; here it puts the files where torchvision would."""
    from torchvision.datasets import MNIST

    roots: list[Path] = []

    def download(self) -> None:
        roots.append(Path(self.root))
        if not self._check_exists():
            mnist(Path(self.root), "MNIST")

    monkeypatch.setattr(MNIST, "download", download)
    said: list[str] = []
    first = find_dataset("torchvision:MNIST", log=said.append)
    assert set(roots) == {tmp_path / "cache" / "torchvision" / "MNIST"} and "downloading" in said[0]
    count = len(roots)
    assert find_dataset("torchvision:MNIST", log=said.append).folder == first.folder
    assert len(roots) == count and "converted earlier" in said[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_parts_of_the_name():
    assert TorchvisionName.parse("torchvision:SVHN:/a:b").root == Path("/a:b")
    assert TorchvisionName.parse("torchvision:SVHN:C:\\data").root == Path("C:\\data")
    assert TorchvisionName.parse("torchvision:EMNIST/letters").title == "emnist-letters"


BAD = {
    "torchvision:": ["names no data set", "torchvision:MNIST"],
    "torchvision:mnist": ["no such data set", "did you mean torchvision:MNIST?"],
    "torchvision:os.system": ["names no data set"],
    "torchvision:VisionDataset": ["not a picture and a class"],
    "torchvision:CocoDetection": ["not a picture and a class"],
    "torchvision:FakeData": ["not a picture and a class"],
    "torchvision:EMNIST": ["name one of byclass", "torchvision:EMNIST/letters"],
    "torchvision:EMNIST/capitals": ["name one of byclass"],
    "torchvision:MNIST/letters": ["only EMNIST has parts", "leave out /letters"],
    "torchvision:MNIST": ["cannot read MNIST there", "no network in tests", "torchvision:MNIST:ROOT"],
    "torchvision:CIFAR10": ["cannot download it", "no network in tests", "torchvision:CIFAR10:ROOT"],
    "torchvision:USPS": ["cannot read USPS", "no network in tests"],
    "torchvision:FER2013": ["FER2013", "has no download", "torchvision:FER2013:ROOT"],
    "torchvision:MNIST:~nobody-here/x": ["no home folder"],
}


@pytest.mark.parametrize("source", BAD)
def test_names_that_are_refused(tmp_path, capsys, source):
    assert main([source, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in BAD[source]), line
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache" / "torchvision").glob("*"))


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    root = tmp_path / "root"
    mnist(root, "MNIST")
    cut(root / "MNIST" / "raw" / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match="cannot read MNIST there"):
        opened(f"torchvision:MNIST:{root}", tmp_path)
    mnist(root, "KMNIST")
    idx(root / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte", np.arange(30) % 10)
    with pytest.raises(DataError, match="KMNIST test: not one label for each image"):
        opened(f"torchvision:KMNIST:{root}", tmp_path)
    cifar(root, 10, monkeypatch)
    with (root / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"x")  # torchvision compares checksums
    with pytest.raises(DataError, match="cannot read CIFAR10 there.*corrupted"):
        opened(f"torchvision:CIFAR10:{root}", tmp_path)
    gtsrb(root)
    cut(root / "gtsrb" / "GTSRB" / "Training" / "00001" / "00002.ppm")
    with pytest.raises(DataError, match="GTSRB train, image 2: damaged"):
        opened(f"torchvision:GTSRB:{root}", tmp_path)


def test_labels_that_are_no_classes_are_refused(tmp_path):
    root = tmp_path / "root"
    gtsrb(root)
    text = (root / "gtsrb" / "GT-final_test.csv").read_text()
    (root / "gtsrb" / "GT-final_test.csv").write_text(text.replace(";2\n", f";{10**9}\n"))
    with pytest.raises(DataError, match="image 4: label 1000000000 out of range"):
        opened(f"torchvision:GTSRB:{root}", tmp_path)
    (root / "gtsrb" / "GT-final_test.csv").write_text(text.replace(";2\n", ";-1\n"))
    with pytest.raises(DataError, match="image 4: label -1 out of range"):
        opened(f"torchvision:GTSRB:{root}", tmp_path)


def test_sets_whose_items_are_something_else_are_refused(tmp_path):
    """Those of VOC are two pictures."""
    folder = tmp_path / "root" / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / "a.jpg")
    Image.new("L", (8, 8)).save(folder / "SegmentationClass" / "a.png")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match="VOCSegmentation: its items are not a picture and a class"):
        opened(f"torchvision:VOCSegmentation:{tmp_path / 'root'}", tmp_path)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    svhn(tmp_path / "root", monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="SVHN: needs scipy; run: pip install scipy$"):
        opened(f"torchvision:SVHN:{tmp_path / 'root'}", tmp_path)
