"""Tiny data sets in every form a user may have."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "eel")
NAMES10 = [f"class{i}" for i in range(10)]
NAMES100 = [f"fine{i:02d}" for i in range(100)]


def pixels(count: int, seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """(count, height, width, 3) uint8 noise: any mix-up of channels, axes or images shows."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def planes(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) -> (N, 3072), as the official files keep them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def official_parts(classes: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pixels and labels of each batch; every class is in train and in test."""
    if classes == 10:
        parts = {f"data_batch_{i}": (pixels(4, i), [(4 * (i - 1) + k) % 10 for k in range(4)]) for i in range(1, 6)}
        parts["test_batch"] = (pixels(10, 9), list(range(10))[::-1])
        return parts
    return {"train": (pixels(100, 1), list(range(100))), "test": (pixels(100, 2), list(range(100))[::-1])}


def official_python(folder: Path, classes: int = 10) -> Path:
    """cifar-10-batches-py or cifar-100-python, as Python 3 pickles with the bytes keys of Python 2."""
    folder.mkdir(parents=True)
    key = b"labels" if classes == 10 else b"fine_labels"
    for name, (images, labels) in official_parts(classes).items():
        content = {b"data": planes(images), key: labels, b"filenames": [b"x.png"] * len(labels)}
        if classes == 100:
            content[b"coarse_labels"] = [0] * len(labels)
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    meta = {b"label_names": [n.encode() for n in NAMES10]}
    if classes == 100:
        meta = {b"fine_label_names": [n.encode() for n in NAMES100], b"coarse_label_names": [b"one"]}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(meta, protocol=4))
    (folder / "readme.html").write_text("about")
    return folder


def official_binary(folder: Path, classes: int = 10) -> Path:
    """cifar-10-batches-bin or cifar-100-binary."""
    folder.mkdir(parents=True)
    for name, (images, labels) in official_parts(classes).items():
        columns = [np.array(labels, np.uint8)[:, None], planes(images)]
        if classes == 100:
            columns.insert(0, np.full((len(labels), 1), 7, np.uint8))  # the coarse label
        (folder / f"{name}.bin").write_bytes(np.concatenate(columns, axis=1).tobytes())
    if classes == 10:
        (folder / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(NAMES100) + "\n")
        (folder / "coarse_label_names.txt").write_text("one\n")
    return folder


def class_folders(
    root: Path, splits: tuple[str, ...] = ("train", "test"), each: int = 3, size: tuple[int, int] = (8, 8)
) -> dict[str, tuple[np.ndarray, list[int]]]:
    """{split}/{class}/N.png; returns pixels and labels of each split in sorted order."""
    content = {}
    for number, split in enumerate(splits):
        images = pixels(each * len(CLASSES), number + 20, *size)
        labels = [label for label in range(len(CLASSES)) for _ in range(each)]
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:03d}.png").write_bytes(png(image))
        content[split] = images, labels
    return content


def parquet(path: Path, images: np.ndarray, labels: list, names: list[str] | None = None, **columns: str) -> Path:
    """One Parquet file in the layout of the Hugging Face Hub; `columns` renames img and label."""
    import json

    import pyarrow as arrow
    import pyarrow.parquet

    image, label = columns.get("img", "img"), columns.get("label", "label")
    rows = [{"bytes": png(each), "path": None} for each in images]
    table = arrow.table({image: rows, label: labels})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(table, path)
    return path


def tar(path: Path, folder: Path, inside: str = "", mode: str = "w:gz") -> Path:
    """A tar of `folder`, its content under the name `inside`."""
    with tarfile.open(path, mode) as archive:
        archive.add(folder, inside or folder.name)
    return path


def zipped(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, str(Path(folder.name) / file.relative_to(folder)))
    return path


def tree_of(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def visible(folder: Path) -> list[str]:
    """Names in a folder, but for the sources and the cache of a test."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("pets", "cache"))


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own session that runs `code` with the repository on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
