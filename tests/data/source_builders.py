"""Tiny data sets in the layouts that torchvision, Kaggle, Keras and others publish, and a way to look into a source."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rsengine.data.sources.base import Source
from rsengine.data.sources.images import Split
from rsengine.data.sources.open import open_source
from tests.data.data_builders import official_python, pixels, png

Samples = tuple[np.ndarray, list[int]]


def opened(source: object, folder: Path, said: list[str] | None = None, **options: object) -> Source:
    """open_source() with a new scratch folder."""
    scratch = folder / f"scratch{len(list(folder.glob('scratch*')))}"
    scratch.mkdir()
    lines = [] if said is None else said
    return open_source(str(source), scratch, log=lines.append, **options)  # type: ignore[arg-type]


def samples(split: Split) -> Samples:
    """All images, of one size, and labels."""
    return np.stack([split.load(i)[0] for i in range(len(split))]), split.labels.tolist()


def assert_split(split: Split, images: np.ndarray, labels: list[int]) -> None:
    found, numbers = samples(split)
    assert numbers == labels
    np.testing.assert_array_equal(
        found, np.broadcast_to(images[..., None], (*images.shape, 3)) if images.ndim == 3 else images
    )


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def grey(count: int, seed: int, side: int = 28) -> np.ndarray:
    return pixels(count, seed, side, side)[..., 0]


def idx(path: Path, array: np.ndarray) -> None:
    """A file of the MNIST family: two zeros, type, dimensions, sizes, content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def mnist(
    root: Path, name: str, classes: int = 10, first: int = 0, prefixes: tuple[str, str] = ("train", "t10k")
) -> dict[str, Samples]:
    content = {}
    for seed, (split, prefix) in enumerate(zip(("train", "test"), prefixes, strict=True)):
        images, labels = grey(2 * classes, seed), [first + i % classes for i in range(2 * classes)]
        idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", np.array(labels))
        # Pixels of EMNIST are the other way round, and torchvision gives them so.
        content[split] = images, [label - first for label in labels]
    return content


def emnist(root: Path, part: str, classes: int, first: int = 0) -> dict[str, Samples]:
    return mnist(root, "EMNIST", classes, first, (f"emnist-{part}-train", f"emnist-{part}-test"))


def cifar(root: Path, classes: int, patch: pytest.MonkeyPatch) -> dict[str, Samples]:
    """torchvision compares checksums, so it is told those of the files made here."""
    from torchvision import datasets

    from tests.data.data_builders import official_parts

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = official_python(root / kind.base_folder, classes)
    for path in folder.iterdir():  # the keys are text in the originals
        if path.suffix != ".html":
            content = {key.decode(): value for key, value in pickle.loads(path.read_bytes()).items()}
            content = {k: [n.decode() for n in v] if k.endswith("names") else v for k, v in content.items()}
            path.write_bytes(pickle.dumps(content, protocol=4))
    patch.setattr(kind, "train_list", [(name, md5(folder / name)) for name, _ in kind.train_list])
    patch.setattr(kind, "test_list", [(name, md5(folder / name)) for name, _ in kind.test_list])
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    parts = official_parts(classes)
    train = [parts[key] for key in parts if not key.startswith("test")]
    test = parts["test_batch" if classes == 10 else "test"]
    return {"train": (np.concatenate([i for i, _ in train]), sum((n for _, n in train), [])), "test": test}


def svhn(root: Path, patch: pytest.MonkeyPatch) -> dict[str, Samples]:
    import scipy.io
    from torchvision.datasets import SVHN

    root.mkdir(parents=True)
    content, known = {}, {}
    for seed, split in enumerate(("train", "test")):
        images, labels = pixels(20, seed), [i % 10 for i in range(20)]
        path = root / f"{split}_32x32.mat"
        stored = np.array([label or 10 for label in labels], np.uint8)[:, None]  # the digit 0 is class 10
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": stored})
        known[split] = ["http://unused", path.name, md5(path)]
        content[split] = images, labels
    patch.setattr(SVHN, "split_list", {**SVHN.split_list, **known})
    return content


def stl10(root: Path, patch: pytest.MonkeyPatch) -> dict[str, Samples]:
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    content = {}
    for seed, split in enumerate(("train", "test")):
        images, labels = pixels(20, seed, 96, 96), [i % 10 for i in range(20)]
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())  # columns first
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
        content[split] = images, labels
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / STL10.class_names_file).write_text("\n".join(f"thing{i}" for i in range(10)) + "\n")
    for attribute in ("train_list", "test_list"):
        patch.setattr(STL10, attribute, [[name, md5(folder / name)] for name, _ in getattr(STL10, attribute)])
    return content


def gtsrb(root: Path, size: Callable[[int], tuple[int, int]] = lambda i: (20, 20)) -> dict[str, Samples]:
    """Three of its classes. Training pictures lie in folders, test pictures in a list."""
    from PIL import Image

    base = root / "gtsrb"
    content, lines = {}, ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for split in ("train", "test"):
        images, labels = [], []
        for index in range(6):
            label = index // 2
            image = pixels(1, index + 10 * (split == "test"), *size(index))[0]
            folder = base / "GTSRB" / (f"Training/{label:05d}" if split == "train" else "Final_Test/Images")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:05d}.ppm")
            lines += [f"{index:05d}.ppm;20;20;0;0;9;9;{label}"] if split == "test" else []
            images.append(image)
            labels.append(label)
        content[split] = images, labels
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return {split: (np.stack(i) if len({x.shape for x in i}) == 1 else i, n) for split, (i, n) in content.items()}


def npz(path: Path, names: str, **arrays: np.ndarray) -> Path:
    """An .npz file; `names` has {split} and {kind} in it."""
    np.savez_compressed(path, **{names.format(*key.split("_")): value for key, value in arrays.items()})
    return path


def kaggle(root: Path, header: str = "id,label") -> dict[str, Samples]:
    """CIFAR-10 as Kaggle gives it: training pictures with a table, and test pictures without labels."""
    images, names = pixels(12, 3), ["cat", "frog", "ship"] * 4
    for split, part in (("train", images), ("test", pixels(4, 4))):
        (root / split).mkdir(parents=True)
        for number, image in enumerate(part, start=1):
            (root / split / f"{number}.png").write_bytes(png(image))
    lines = [header, *(f"{number},{name}" for number, name in enumerate(names, start=1))]
    (root / "trainLabels.csv").write_text("\n".join(lines) + "\n")
    (root / "sampleSubmission.csv").write_text("id,label\n" + "".join(f"{i},cat\n" for i in range(1, 5)))
    return {"train": (images, [["cat", "frog", "ship"].index(name) for name in names])}


def tiny_imagenet(root: Path) -> dict[str, Samples]:
    """Three of its classes, with the lists of boxes beside the pictures and test pictures without labels."""
    numbers = ["n01443537", "n01629819", "n02124075"]
    content = {}
    train, labels = pixels(6, 1, 64, 64), [0, 0, 1, 1, 2, 2]
    for index, (image, label) in enumerate(zip(train, labels, strict=True)):
        folder = root / "train" / numbers[label] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{numbers[label]}_{index}.png").write_bytes(png(image))
        (folder.parent / f"{numbers[label]}_boxes.txt").write_text(f"{numbers[label]}_{index}.png\t0\t10\t63\t58\n")
    content["train"] = train, labels
    test, order = pixels(3, 2, 64, 64), [2, 0, 1]
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for index, image in enumerate(test):
            (root / split / "images" / f"{split}_{index}.png").write_bytes(png(image))
    lines = [f"val_{index}.png\t{numbers[label]}\t0\t32\t44\t62" for index, label in enumerate(order)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(numbers)) + "\n")
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"
    (root / "words.txt").write_text(words + "n02124075\tgoldfish\n")
    content["test"] = test, order
    return content
