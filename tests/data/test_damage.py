"""Whatever is wrong with a converted data set is found when it is opened, and said in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert, load_dataset
from rsengine.data.beton.reader import ALLOCATION, HEADER, METADATA, SAMPLE, BetonReader
from tests.data.data_builders import class_folders


class Beton:
    """The parts of the bytes of a .beton file, to be changed in place."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)
        self.header = np.frombuffer(self.bytes, HEADER, 1)
        count = int(self.header["samples"][0])
        self.samples = np.frombuffer(self.bytes, SAMPLE, count, METADATA)
        self.table = np.frombuffer(self.bytes, ALLOCATION, count, int(self.header["table"][0]))

    def move(self, index: int, pointer: int) -> None:
        self.samples["image"]["pointer"][index] = self.table["pointer"][index] = pointer


def swap_labels(beton: Beton) -> None:
    beton.samples["label"][[0, -1]] = beton.samples["label"][[-1, 0]]


def flip_pixel(beton: Beton) -> None:
    beton.bytes[int(beton.table["pointer"][3]) + 100] ^= 4


def flip_padding(beton: Beton) -> None:
    beton.bytes[int(beton.header["table"][0]) - 1] ^= 1


def set_to(part: str, name: str, value: int, inside: str | None = None) -> Callable[[Beton], None]:
    def change(beton: Beton) -> None:
        array = getattr(beton, part)
        (array[inside] if inside else array)[name][0] = value

    return change


DAMAGE: dict[str, tuple[Callable[[Beton], None], str]] = {
    "huge table": (set_to("header", "table", 2**63), "incomplete"),
    "table in the pages": (set_to("header", "table", METADATA), "incomplete"),
    "huge number of samples": (set_to("header", "samples", 2**60), "incomplete"),
    "no samples": (set_to("header", "samples", 0), "too long"),
    "something at its end": (lambda beton: setattr(beton, "bytes", beton.bytes + b"more"), "the file is too long"),
    "page of an odd size": (set_to("header", "page_size", 2**21 + 1), "pages of"),
    "page of no size": (set_to("header", "page_size", 0), "pages of"),
    "smaller pages": (lambda beton: beton.move(1, 2**21 - 5), "lies outside|over the end of a page"),
    "pointer beyond the file": (lambda beton: beton.move(0, 2**62), "outside the pages"),
    "pointer that goes round": (lambda beton: beton.move(0, 2**64 - 8), "outside the pages"),
    "pointer into the metadata": (lambda beton: beton.move(0, 8), "outside the pages"),
    "pointer to another image": (lambda beton: beton.move(0, int(beton.table["pointer"][1])), "lies on another image"),
    "pointer a byte further": (lambda beton: beton.move(2, int(beton.table["pointer"][2]) + 1), "lies on another"),
    "pointer in one place": (set_to("table", "pointer", 2**21 + 8), "disagree"),
    "huge length": (set_to("table", "size", 2**64 - 1), "outside the pages"),
    "other length": (set_to("table", "size", 5), "another length|no JPEG"),
    "sample twice": (set_to("table", "sample", 1), "each sample once"),
    "unknown mode": (set_to("samples", "mode", 7, "image"), "unknown storage mode"),
    "other mode": (lambda beton: change_modes(beton), "not stored as|another length|no JPEG"),
    "no height": (set_to("samples", "height", 0, "image"), "is empty"),
    "other shape": (set_to("samples", "height", 16, "image"), "another length|stated shape|another size"),
    "label of no class": (set_to("samples", "label", 3), "label 3 where dataset.json names 3 classes"),
    "negative label": (set_to("samples", "label", -1), "label -1"),
    "huge label": (set_to("samples", "label", 2**62), "label 4611686018427387904"),
    "another label": (set_to("samples", "label", 1), "other labels"),
    "swapped labels": (swap_labels, "contents have changed"),
    "flipped bit of a pixel": (flip_pixel, "contents have changed"),
    "flipped bit between the images": (flip_padding, "contents have changed"),
}


def change_modes(beton: Beton) -> None:
    beton.samples["image"]["mode"] ^= 1


@pytest.fixture(scope="module", params=["raw", "jpg"])
def whole(request, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A converted data set, and the bytes of its files."""
    folder = tmp_path_factory.mktemp(request.param)
    class_folders(folder / "pets", each=4)
    convert(folder / "pets", folder / "out", image_format=request.param, log=lambda line: None)
    return folder / "out", {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.fixture
def restored(whole) -> tuple[Path, dict[str, bytes]]:
    """The same, whole again."""
    folder, files = whole
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder, files


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_betons_are_refused_at_opening(restored, damage):
    folder, files = restored
    load_dataset(folder)
    for name in ("train.beton", "test.beton"):
        beton = Beton(files[name])
        change, message = DAMAGE[damage]
        change(beton)
        assert beton.bytes != files[name]
        (folder / name).write_bytes(beton.bytes)
        with pytest.raises(DataError, match=f"{name}: .*({message}).*convert") as caught:
            load_dataset(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(files[name])
    load_dataset(folder)


@pytest.mark.parametrize("loader", ["ffcv", "resident"])
@pytest.mark.parametrize(
    "damage",
    ["huge table", "pointer beyond the file", "pointer to another image", "label of no class", "swapped labels"],
)
def test_a_command_refuses_a_damaged_beton_in_one_line_with_either_loader(restored, capsys, loader, damage):
    from rsengine.train import main

    folder, files = restored
    beton = Beton(files["train.beton"])
    DAMAGE[damage][0](beton)
    (folder / "train.beton").write_bytes(beton.bytes)
    options = ["--data", str(folder), "--set", f'train.loader="{loader}"', "--out", str(folder.parent / "run")]
    assert main([*options, "--device", "cpu", "--epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'train.beton'}: ") and error.count("\n") == 1 and "convert" in error
    assert not (folder.parent / "run").exists()


@pytest.mark.parametrize("damage", ["huge table", "pointer beyond the file", "huge length", "other shape"])
def test_each_loader_checks_the_file_itself(restored, damage):
    from rsengine.input.resident import read_images
    from rsengine.input.stream import StreamLoader

    folder, files = restored
    beton = Beton(files["train.beton"])
    DAMAGE[damage][0](beton)
    (folder / "train.beton").write_bytes(beton.bytes)
    for use in (lambda path: StreamLoader(path, 2), read_images):
        with pytest.raises(DataError, match=DAMAGE[damage][1]):
            use(folder / "train.beton")


@pytest.mark.parametrize("length", [0, 10, 100, 3000, -1, -30])
def test_cut_betons_are_refused(restored, length):
    folder, files = restored
    (folder / "test.beton").write_bytes(files["test.beton"][:length])
    with pytest.raises(DataError, match="test.beton: .*convert"):
        load_dataset(folder)


def test_contents_are_read_once_on_a_machine(restored, monkeypatch, tmp_path):
    from rsengine.data import checksums

    folder, _ = restored
    read: list[str] = []
    plain = checksums.file_digest
    monkeypatch.setattr(checksums, "file_digest", lambda path, name: read.append(path.name) or plain(path, name))
    load_dataset(folder)
    load_dataset(folder)
    assert read == ["train.beton", "test.beton"] * 2  # written this moment: a change might have the same time
    monkeypatch.setattr(checksums, "RACE_SECONDS", -1.0)
    read.clear()
    load_dataset(folder)
    load_dataset(folder)
    assert read == ["train.beton", "test.beton"]
    os.utime(folder / "test.beton", ns=(1, 1))
    load_dataset(folder)
    assert read == ["train.beton", "test.beton", "test.beton"]
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "another machine"))
    load_dataset(folder)
    assert len(read) == 5
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "file" / "no folder"))
    load_dataset(folder)
    load_dataset(folder)
    assert len(read) == 9


def test_what_older_versions_wrote_is_loaded_without_checksums(restored):
    folder, files = restored
    content = json.loads(files["dataset.json"])
    del content["sha256"], content["identity"]
    (folder / "dataset.json").write_text(json.dumps(content))
    beton = Beton(files["train.beton"])
    flip_padding(beton)
    (folder / "train.beton").write_bytes(beton.bytes)
    assert load_dataset(folder).sha256 == {}


# --- dataset.json ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, object]] = [
    ("name", 3),
    ("name", None),
    ("classes", []),
    ("classes", "cat"),
    ("classes", ["cat", "dog", 3]),
    ("counts", [12, 12]),
    ("counts", {"train": 11, "test": 12}),
    ("counts", {"train": 12}),
    ("counts", {"train": True, "test": 12}),
    ("counts", {"train": 1e300, "test": 12}),
    ("class_counts", {"train": [4, 4], "test": [4, 4, 4]}),
    ("class_counts", {"train": [13, -1, 0], "test": [4, 4, 4]}),
    ("class_counts", {"train": [4.0, 4, 4], "test": [4, 4, 4]}),
    ("class_counts", {"train": "444", "test": [4, 4, 4]}),
    ("image_size", [8]),
    ("image_size", [8, -8]),
    ("image_size", [8, 10**9]),
    ("image_size", 8),
    ("image_format", "png"),
    ("image_format", ["raw"]),
    ("mean", [0.5, 0.5]),
    ("mean", [0.5, 0.5, float("nan")]),
    ("mean", [0.5, 0.5, 127.0]),
    ("mean", [0.5, 0.5, "0.5"]),
    ("std", [0.5, 0.5, -0.5]),
    ("std", [0.5, 0.5, float("inf")]),
    ("std", [0.5, 0.5, 10**400]),
    ("std", None),
    ("checksum", 5),
    ("source", ["a"]),
    ("identity", "abc"),
    ("identity", 5),
    ("sha256", "abc"),
    ("sha256", {"train": "abc", "test": "abc"}),
    ("sha256", {"train": "0" * 64}),
    ("versions", {"numpy": 2}),
    ("versions", []),
    ("options", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_every_field_of_the_description_is_checked(restored, name, value):
    folder, files = restored
    content = json.loads(files["dataset.json"]) | {name: value}
    (folder / "dataset.json").write_text(json.dumps(content))
    inner = "|train|test|class_counts" if name in ("counts", "class_counts", "sha256") else ""
    with pytest.raises(DataError, match=rf"dataset.json: ({name}{inner})\b.*convert") as caught:
        load_dataset(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    del content[name]
    if name not in ("identity", "sha256"):  # what older versions lacked
        (folder / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"dataset.json: {name}: expected .*, got nothing; convert"):
            load_dataset(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_size", [8, 9], "images of another size than 8×9"),
        ("classes", ["cat", "dog", "eel", "fox"], "class_counts|train: expected"),
        ("class_counts", {"train": [3, 5, 4], "test": [4, 4, 4]}, "train.beton: other labels"),
    ],
)
def test_descriptions_that_disagree_with_the_betons_are_refused(restored, name, value, message):
    folder, files = restored
    (folder / "dataset.json").write_text(json.dumps(json.loads(files["dataset.json"]) | {name: value}))
    with pytest.raises(DataError, match=f"({message}).*convert"):
        load_dataset(folder)


def texts(description: str) -> Sequence[tuple[str, str]]:
    return [
        (description.replace('"format_version": 1', '"format_version": 99'), "version 99"),
        (description.replace('"rsengine dataset"', '"something else"'), "not a description"),
        (description[1:], "not a description"),
        ("[]", "not a description"),
        ("[" * 100_000, "not a description"),
        ('{"format": ' + "9" * 10_000 + "}", "not a description"),
        ("", "not a description"),
    ]


def test_what_is_no_description_is_refused(restored, tmp_path):
    folder, files = restored
    with pytest.raises(DataError, match="no dataset.json"):
        load_dataset(tmp_path)
    for text, message in texts(files["dataset.json"].decode()):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=f"dataset.json: .*{message}.*convert"):
            load_dataset(folder)
    (folder / "dataset.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="dataset.json: not a description"):
        load_dataset(folder)
    (folder / "dataset.json").write_bytes(files["dataset.json"])
    (folder / "test.beton").unlink()
    with pytest.raises(DataError, match="test.beton: missing"):
        load_dataset(folder)


def test_damaged_jpeg_is_named(restored):
    folder, files = restored
    beton = Beton(files["train.beton"])
    if not beton.samples["image"]["mode"][0]:
        begin = int(beton.table["pointer"][0])
        beton.bytes[begin : begin + 2] = b"no"
        (folder / "train.beton").write_bytes(beton.bytes)
        with pytest.raises(DataError, match="image 0 is no JPEG that can be decoded"):
            BetonReader(folder / "train.beton").image(0)


def test_the_digest_is_that_of_the_file(tmp_path):
    class_folders(tmp_path / "pets")
    dataset = convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    for split, path in (("train", dataset.train_beton), ("test", dataset.test_beton)):
        stated = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert dataset.sha256[split] == stated
