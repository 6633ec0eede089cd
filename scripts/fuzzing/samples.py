"""Whole, valid inputs of every kind that the program reads, made from fixed seeds so that their bytes are the same."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from rsengine import train
from rsengine.data import convert
from tests.data.data_builders import class_folders, jpeg, official_python, parquet, pixels, png

SIZE, EACH = 16, 8
ORIENTATION = 0x0112
SMALL = ("model.blocks=[1]", "model.stem_width=8", "model.width_multiplier=0.25", "train.batch_size=8")
SETTINGS = [word for setting in (*SMALL, "train.loader=resident") for word in ("--set", setting)]
TIMES = {"seconds": 1.0, "epoch_seconds": 1.0, "eval_seconds": 1.0, "time_to_first_step": 1.0, "images_per_second": 1.0}
TIMES |= {"loader_seconds": 0.5, "checkpoint_seconds": 0.5}


@dataclass(frozen=True)
class Sample:
    """An input that the program takes.

    Attributes:
        files: relative path -> content.
        targets: the files to damage.
    """

    files: dict[str, bytes]
    targets: tuple[str, ...]


def make_samples(folder: Path) -> dict[str, list[Sample]]:
    """Samples of each kind. ``folder``, which is new, keeps a data set in ``data`` and a finished run in ``run``."""
    class_folders(folder / "pictures", each=EACH, size=(SIZE, SIZE))
    convert(folder / "pictures", folder / "data", workers=1, log=lambda line: None)
    out = ["--out", str(folder / "run"), "--data", str(folder / "data"), "--epochs", "1", "--device", "cpu"]
    if train.main([*out, *SETTINGS]) != 0:
        raise SystemExit("the run to damage could not be made")
    _fix_times(folder / "run")
    data, run = read_tree(folder / "data", "data/"), read_tree(folder / "run", "run/")
    # A resume reads none of the pictures.
    run = {name: content for name, content in run.items() if not name.endswith((".png", ".md", ".lock"))}
    small = read_small(folder)
    python = read_tree(official_python(folder / "python" / "cifar-10-batches-py").parent)
    batches = tuple(name for name in python if not name.endswith("html"))
    rows = parquet(folder / "rows.parquet", pixels(12, 3, SIZE, SIZE), [0, 1, 2] * 4, ["cat", "dog", "eel"])
    return {
        "beton": [Sample(data, (name,)) for name in ("data/train.beton", "data/test.beton")],
        "dataset.json": [Sample(data, ("data/dataset.json",))],
        "checkpoint": [Sample(run, ("run/checkpoint.pt",))],
        "metrics": [Sample(run, ("run/metrics.jsonl",))],
        "recipe": [Sample({"recipe.toml": run["run/recipe.toml"]}, ("recipe.toml",))],
        "weights": [Sample({"weights.safetensors": run["run/weights.safetensors"]}, ("weights.safetensors",))],
        "tar": [Sample({"pets.tar": tar(small)}, ("pets.tar",))],
        "tar.gz": [Sample({"pets.tar.gz": gzip.compress(tar(small), mtime=0)}, ("pets.tar.gz",))],
        "zip": [Sample({"pets.zip": zipped(small)}, ("pets.zip",))],
        "cifar": [
            Sample({f"cifar/{name}": python[name] for name in python}, tuple(f"cifar/{name}" for name in batches))
        ],
        "parquet": [Sample({"rows.parquet": rows.read_bytes()}, ("rows.parquet",))],
        "picture": [Sample({name: content}, (name,)) for name, content in pictures().items()],
    }


def read_tree(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Relative path, behind ``prefix``, -> content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {prefix + str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_small(folder: Path) -> dict[str, bytes]:
    """A few of the pictures, in class folders."""
    return {name: data for name, data in read_tree(folder / "pictures").items() if int(Path(name).stem) % EACH < 2}


def tar(files: Mapping[str, bytes]) -> bytes:
    """An archive without times or owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """The same as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """One picture of each format, some with EXIF, a palette, transparency or 16 bits."""
    image = pixels(1, 5, SIZE, SIZE)[0]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = {"a.png": png(image), "b.jpg": jpeg(image, exif=exif), "c.jpg": jpeg(image, progressive=True)}
    options: dict[str, tuple[str, dict[str, object]]] = {
        "d.gif": ("P", {}),
        "e.bmp": ("RGB", {}),
        "f.webp": ("RGB", {"exif": exif}),
        "g.webp": ("RGBA", {"lossless": True}),
        "h.tif": ("RGB", {"compression": "tiff_lzw"}),
        "i.png": ("P", {"exif": exif, "transparency": 3}),
        "j.ppm": ("RGB", {}),
        "k.png": ("I;16", {}),
        "l.jpg": ("CMYK", {}),
    }
    for name, (mode, given) in options.items():
        buffer = io.BytesIO()
        picture = Image.fromarray(image)
        picture = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        picture.save(buffer, Image.registered_extensions()[name[1:]], **given)
        found[name] = buffer.getvalue()
    return found


def _fix_times(run: Path) -> None:
    """Put fixed numbers in the place of times, which differ each time that the run is made."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"seconds": 1.0}, run / "checkpoint.pt")
    (run / "best.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    fixed = [{key: TIMES.get(key, value) for key, value in record.items()} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in fixed))


class Canary:
    """Makes a folder called ``canary`` where a pickle that holds it is loaded without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, ("canary",)


def canary_pickle() -> bytes:
    return pickle.dumps({b"data": Canary()}, protocol=2)
