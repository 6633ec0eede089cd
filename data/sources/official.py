"""The official CIFAR-10 and CIFAR-100 distributions, as archive or folder, in their python and binary versions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rsengine.checked import shown
from rsengine.data.errors import DataError
from rsengine.data.sources.archives import file_digest
from rsengine.data.sources.base import Source
from rsengine.data.sources.images import ArraySplit
from rsengine.data.sources.pickles import restricted_loads
from rsengine.data.sources.tree import Tree

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # bytes of an image: all red values, then green, then blue
NO_VERIFY = "download it again, or pass --no-verify if you know that it was changed on purpose"


@dataclass(frozen=True)
class Layout:
    """One of the four distributions.

    Attributes:
        name: name of the data set.
        version: "python" or "binary".
        classes: number of classes.
        archive, md5: the published archive and its md5.
        train, test, meta: names of the files with the images and with the class names.
        md5s: md5 of each file, where published (torchvision lists those of the python versions).
        label_key, names_key: keys of the labels and of the class names in the pickles.
        label_offset, label_bytes: where the label is in a binary record, and how many bytes precede the pixels.
    """

    name: str
    version: str
    classes: int
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    meta: str
    md5s: dict[str, str]
    label_key: str = ""
    label_offset: int = 0
    label_bytes: int = 1
    names_key: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


LAYOUTS = (
    Layout(
        name="cifar10",
        version="python",
        classes=10,
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        md5s={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        label_key="labels",
        names_key="label_names",
    ),
    Layout(
        name="cifar100",
        version="python",
        classes=100,
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        meta="meta",
        md5s={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
    Layout(
        name="cifar10",
        version="binary",
        classes=10,
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        meta="batches.meta.txt",
        md5s={},
    ),
    Layout(
        name="cifar100",
        version="binary",
        classes=100,
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train=("train.bin",),
        test="test.bin",
        meta="fine_label_names.txt",
        md5s={},
        label_offset=1,  # the first byte is the coarse label
        label_bytes=2,
    ),
)
BY_ARCHIVE = {layout.archive: layout for layout in LAYOUTS}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
TRAIN_COUNT, TEST_COUNT = 50_000, 10_000


def verify_archive(layout: Layout, tree_root: str, actual: str) -> None:
    """Raise DataError unless `actual` is the published md5."""
    if actual != layout.md5:
        raise DataError(
            f"{tree_root}: its md5 is {actual}, not {layout.md5} as published: incomplete or changed; {NO_VERIFY}"
        )


def find_layout(tree: Tree) -> tuple[Layout, str] | None:
    """The official distribution in `tree` and the folder it lies in ("" for the root), if there is one.

    Raises:
        DataError: there are several, or one with files missing.
    """
    found = []
    for folder in ("", *sorted(name for name in tree.folders if name.count("/") < 2)):
        prefix = folder + "/" if folder else ""
        for layout in LAYOUTS:
            present = [name for name in layout.files if prefix + name in tree.files]
            # Two files of the set make it that set; `train` or `meta` alone may be anything.
            if len(present) >= 2:
                missing = [name for name in layout.files if name not in present]
                if missing:
                    raise DataError(
                        f"{tree.where(prefix + missing[0])}: missing from this copy of {layout.archive}; "
                        "unpack the archive again"
                    )
                found.append((layout, folder))
    if len(found) > 1:
        folders = ", ".join(folder or "." for _, folder in found)
        raise DataError(f"{tree.root}: holds several data sets ({folders}); give one of them")
    return found[0] if found else None


def open_official(tree: Tree, layout: Layout, folder: str, *, verify: bool, log: Callable[[str], None]) -> Source:
    """Read one of the official distributions into memory (180 MB) after checking it.

    Raises:
        DataError: wrong checksum or number of images (with `verify`), damaged content, label out of range.
    """
    prefix = folder + "/" if folder else ""
    contents = {name: tree.read(prefix + name) for name in layout.files}
    if verify:
        _verify(tree, layout, prefix, contents, log)
    read = _read_pickle if layout.version == "python" else _read_binary
    parts = {name: read(layout, contents[name], tree.where(prefix + name)) for name in (*layout.train, layout.test)}
    classes = _classes(layout, contents[layout.meta], tree.where(prefix + layout.meta))
    train = [parts[name] for name in layout.train]
    splits = [
        ArraySplit(np.concatenate([i for i, _ in train]), np.concatenate([n for _, n in train]), f"{tree.root} train"),
        ArraySplit(*parts[layout.test], f"{tree.root} test"),
    ]
    if verify and (len(splits[0]), len(splits[1])) != (TRAIN_COUNT, TEST_COUNT):
        raise DataError(
            f"{tree.root}: {len(splits[0])} training and {len(splits[1])} test images, "
            f"not {TRAIN_COUNT} and {TEST_COUNT}; {NO_VERIFY}"
        )
    return Source(
        name=layout.name,
        form=f"official {layout.version} version, {tree.kind}",
        classes=classes,
        train=splits[0],
        test=splits[1],
        checksum=tree.checksum(prefix + name for name in layout.files),
    )


def _verify(tree: Tree, layout: Layout, prefix: str, contents: dict[str, bytes], log: Callable[[str], None]) -> None:
    if tree.kind == "archive":
        actual = file_digest(tree.root, "md5")
        # A repacked python version can still be checked file by file.
        if actual == layout.md5 or not layout.md5s:
            verify_archive(layout, str(tree.root), actual)
            return
    for name, expected in layout.md5s.items():
        actual = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
        if actual != expected:
            raise DataError(
                f"{tree.where(prefix + name)}: its md5 is {actual}, not {expected} as published; {NO_VERIFY}"
            )
    if not layout.md5s:
        log(f"{tree.root}: no checksums are published for the unpacked binary version; sizes and labels are checked")


def _read_pickle(layout: Layout, content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _string_keys(restricted_loads(content, where), where)
    data, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{where}: data is not an array of N×{PIXELS} bytes; get the official file again")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(n) is int for n in labels):
        raise DataError(f"{where}: {layout.label_key} is no list of {len(data)} numbers; get the official file again")
    return _images(data), _labels(layout, np.array(labels, object), where)


def _read_binary(layout: Layout, content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = layout.label_bytes + PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{where}: {len(content)} bytes is no multiple of {record}, the size of a record: truncated; get it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _images(records[:, layout.label_bytes :]), _labels(layout, records[:, layout.label_offset], where)


def _images(planes: np.ndarray) -> np.ndarray:
    """(N, 3072) uint8, channel by channel -> (N, 32, 32, 3) uint8."""
    return np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _labels(layout: Layout, labels: np.ndarray, where: str) -> np.ndarray:
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.classes))
    if len(wrong):
        label = shown(int(labels[wrong[0]]))
        raise DataError(
            f"{where}: image {wrong[0]} has label {label}, out of range 0 … {layout.classes - 1}; "
            "get the official file again"
        )
    return labels.astype(np.int64)


def _classes(layout: Layout, content: bytes, where: str) -> tuple[str, ...]:
    if layout.version == "python":
        names = _string_keys(restricted_loads(content, where), where).get(layout.names_key)
    else:
        names = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    named = isinstance(names, list) and all(isinstance(name, str | bytes) for name in names)
    if not named or len(names) != layout.classes:
        raise DataError(f"{where}: does not name {layout.classes} classes; get the official file again")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _string_keys(content: object, where: str) -> dict[str, object]:
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds a {type(content).__name__}, not a dictionary; get the official file again")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
