"""Every form of source comes out pixel by pixel, label by label, with the right statistics."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsengine.data import DataError, convert, load_dataset
from rsengine.data.beton.split import Measured, count_shared
from rsengine.data.sources.base import split_by_hash
from rsengine.data.sources.images import decode_rgb, resize_and_crop
from tests.data.data_builders import (
    CLASSES,
    NAMES10,
    NAMES100,
    class_folders,
    jpeg,
    official_binary,
    official_parts,
    official_python,
    parquet,
    pixels,
    png,
    tar,
    zipped,
)

FORMS = [
    ("python folder", 10),
    ("python tar.gz", 10),
    ("binary folder", 10),
    ("binary tar.gz", 10),
    ("python zip", 100),
    ("binary folder", 100),
]


def assert_same(images: list[np.ndarray], labels: list[int], expected: np.ndarray, expected_labels: list[int]) -> None:
    assert labels == expected_labels
    assert len(images) == len(expected)
    for image, wanted in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize(("form", "classes"), FORMS)
def test_official_layouts(tmp_path, converted, form, classes):
    version, _, container = form.partition(" ")
    name = {"python": {10: "cifar-10-batches-py", 100: "cifar-100-python"}}.get(
        version, {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
    )[classes]
    build = official_python if version == "python" else official_binary
    source = build(tmp_path / name, classes)
    if container == "tar.gz":
        source = tar(tmp_path / f"cifar-{classes}-{version}.tar.gz", source)
    elif container == "zip":
        source = zipped(tmp_path / "mine.zip", source)
    dataset, images, labels = converted(source, verify=False)

    parts = official_parts(classes)
    train = [parts[key] for key in parts if not key.startswith("test")]
    expected = np.concatenate([part[0] for part in train])
    assert_same(images["train"], labels["train"], expected, sum((part[1] for part in train), []))
    assert_same(images["test"], labels["test"], *parts["test_batch" if classes == 10 else "test"])
    assert dataset.classes == tuple(NAMES10 if classes == 10 else NAMES100)
    assert dataset.name == f"cifar{classes}"
    assert dataset.image_size == (32, 32)
    assert (dataset.train_count, dataset.test_count) == (len(expected), len(images["test"]))
    np.testing.assert_allclose(dataset.mean, expected.mean(axis=(0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(dataset.std, expected.std(axis=(0, 1, 2)) / 255, rtol=1e-12)
    if source.is_file():
        assert dataset.checksum == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["folder", "tar.gz", "tar", "zip", "bare tar"])
def test_class_folders(tmp_path, converted, form):
    root = tmp_path / "pets"
    content = class_folders(root, size=(8, 11))
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"junk")
    (root / "test" / "dog" / "Thumbs.db").write_bytes(b"junk")
    (root / ".hidden").mkdir()
    (root / "README.md").write_text("about")
    source = root
    if form == "bare tar":  # no folder around train/ and test/; names begin with ./
        source = tar(tmp_path / "pets.tar.bz2", root, inside=".", mode="w:bz2")
    elif form == "zip":
        source = zipped(tmp_path / "pets.zip", root)
    elif form != "folder":
        source = tar(tmp_path / f"pets.{form}", root, mode="w:" + form[4:] if form != "tar" else "w")
    dataset, images, labels = converted(source)
    for split in ("train", "test"):
        assert_same(images[split], labels[split], *content[split])
    assert dataset.classes == CLASSES
    assert dataset.image_size == (8, 11)
    assert dataset.class_counts == {"train": (3, 3, 3), "test": (3, 3, 3)}
    assert dataset.name == "pets"
    assert load_dataset(dataset.folder) == dataset
    if form == "folder":
        files = [f for f in root.rglob("*.png")]
        lines = sorted((f.relative_to(root).as_posix(), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files)
        text = "".join(f"{digest}  {name}\n" for name, digest in lines)
        assert dataset.checksum == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("test", ["val", "valid", "validation"])
def test_other_names_of_the_test_split(tmp_path, converted, test):
    content = class_folders(tmp_path / "pets", ("train", test))
    (tmp_path / "pets" / "test").mkdir()  # unlabelled test pictures, as Kaggle gives them
    (tmp_path / "pets" / "test" / "1.png").write_bytes(png(pixels(1, 0)[0]))
    said: list[str] = []
    _, images, labels = converted(tmp_path / "pets", log=said.append)
    assert_same(images["test"], labels["test"], *content[test])
    assert any("ignoring" in line for line in said)


@pytest.mark.parametrize("splits", [(".",), ("train",)])
def test_without_test_set_a_stratified_part_is_set_aside_and_said(tmp_path, splits):
    class_folders(tmp_path / "pets", splits, each=10)
    said: list[str] = []
    results = [
        convert(tmp_path / "pets", tmp_path / f"out{i}", seed=seed, test_fraction=0.2, log=said.append)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert results[0].class_counts == {"train": (8, 8, 8), "test": (2, 2, 2)}
    assert "set aside" in said[0] and "6 of 30" in said[0]
    same, other = (results[0].test_beton.read_bytes() == results[i].test_beton.read_bytes() for i in (1, 2))
    assert same and not other


@pytest.mark.parametrize("packed", [False, True])
def test_a_validation_set_comes_from_the_training_set_and_takes_the_place_of_the_test_set(tmp_path, converted, packed):
    source = tmp_path / "pets"
    images, labels = class_folders(source, ("train", "test"), each=10)["train"]
    if packed:
        source = tar(tmp_path / "pets.tar.gz", source)
    dataset, found, found_labels = converted(source, validation=0.2)
    assert dataset.name == "pets-validation" and dataset.options["validation"] == 0.2
    assert dataset.class_counts == {"train": (8, 8, 8), "test": (2, 2, 2)}
    mine = [
        (label, image.tobytes())
        for split in ("train", "test")
        for image, label in zip(found[split], found_labels[split], strict=True)
    ]
    assert sorted(mine) == sorted((label, image.tobytes()) for image, label in zip(images, labels, strict=True))
    resized = converted(source, validation=0.2, size=8, overwrite=True)[0]
    assert resized.image_size == (8, 8) and resized.class_counts == dataset.class_counts


def test_split_by_hash_does_not_depend_on_order():
    labels, keys = np.repeat([0, 1], 50), [f"k{i}" for i in range(100)]
    chosen = {keys[i] for i in np.flatnonzero(split_by_hash(labels, keys, 0.1, 3, "x"))}
    order = np.random.default_rng(0).permutation(100)
    again = split_by_hash(labels[order], [keys[i] for i in order], 0.1, 3, "x")
    assert {keys[order[i]] for i in np.flatnonzero(again)} == chosen
    assert len(chosen) == 10


@pytest.mark.parametrize("form", ["folder", "single file", "zip", "fine"])
def test_parquet(tmp_path, converted, form):
    folder = tmp_path / "hub"
    images, labels = pixels(6, 1), [2, 0, 1, 1, 0, 2]
    columns = {"img": "image", "label": "fine_label"} if form == "fine" else {}
    names = ["a", "b", "c"]
    first = parquet(folder / "data" / "train-00000-of-00002.parquet", images[:4], labels[:4], names, **columns)
    said: list[str] = []
    if form == "single file":
        first = parquet(tmp_path / "train.parquet", images, labels, None)
        dataset, found, found_labels = converted(first, log=said.append, test_fraction=0.5)
        assert dataset.classes == ("0", "1", "2")
        assert "numbered" in said[0] and "set aside" in said[1]
        assert sorted(found_labels["train"] + found_labels["test"]) == sorted(labels)
        for image, label in zip(found["train"], found_labels["train"], strict=True):
            assert any(np.array_equal(image, i) and label == n for i, n in zip(images, labels, strict=True))
        return
    parquet(folder / "data" / "train-00001-of-00002.parquet", images[4:], labels[4:], names, **columns)
    test = pixels(3, 2)
    parquet(folder / "data" / "test-00000-of-00001.parquet", test, [0, 1, 2], names, **columns)
    source = zipped(tmp_path / "hub.zip", folder) if form == "zip" else folder
    dataset, found, found_labels = converted(source)
    assert_same(found["train"], found_labels["train"], images, labels)
    assert_same(found["test"], found_labels["test"], test, [0, 1, 2])
    assert dataset.classes == ("a", "b", "c")


def test_digits(converted):
    from sklearn.datasets import load_digits

    dataset, images, labels = converted("digits")
    assert dataset.train_count + dataset.test_count == 1797
    assert 0.19 < dataset.test_count / 1797 < 0.21
    assert dataset.image_size == (32, 32) and dataset.classes == tuple("0123456789")
    # Every picture, shrunk back, is one of the originals, and no original is in both splits.
    original = np.rint(load_digits().images * 255 / 16)
    found = np.stack(images["train"] + images["test"])[..., 0]
    small = found.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(1797, 64)
    originals = original.reshape(1797, 64)
    distance = (originals**2).sum(1)[:, None] - 2 * originals @ small.T  # squared, up to a constant of each column
    nearest = distance.argmin(axis=0)
    assert len(set(nearest.tolist())) > 1780
    right = load_digits().target[nearest] == np.array(labels["train"] + labels["test"])
    assert right.mean() > 0.99


def test_sizes_are_kept_unless_asked_otherwise(tmp_path, converted):
    for split in ("train", "test"):
        for number, (label, shape) in enumerate((("a", (20, 40)), ("a", (64, 16)), ("b", (16, 16)))):
            folder = tmp_path / "mixed" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(png(pixels(1, number, *shape)[0]))
    dataset, images, _ = converted(tmp_path / "mixed")
    assert dataset.image_size is None
    assert [image.shape for image in images["train"]] == [(20, 40, 3), (64, 16, 3), (16, 16, 3)]
    everything = np.concatenate([image.reshape(-1, 3) for image in images["train"]]) / 255
    np.testing.assert_allclose(dataset.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, everything.std(axis=0), rtol=1e-12)

    resized = convert(tmp_path / "mixed", tmp_path / "small", size=16, log=lambda line: None)
    assert resized.image_size == (16, 16)


def test_resize_takes_the_middle_square():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # exactly the middle square
    assert (resize_and_crop(image, 10)[1:-1, 2:-2] == 200).all()  # bicubic overshoots at the edges
    turned = resize_and_crop(image.transpose(1, 0, 2).copy(), 10)
    assert (turned[2:-2] == 200).all() and turned.shape == (10, 10, 3)
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert abs(resize_and_crop(checkers, 8)[2:-2, 2:-2].astype(int) - 127).max() <= 3  # averaged, not picked
    same = pixels(1, 0)[0]
    assert resize_and_crop(same, 32) is same


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_every_kind_of_picture_becomes_rgb():
    grey = pixels(1, 3)[0][..., 0]
    np.testing.assert_array_equal(decode_rgb(encoded(Image.fromarray(grey), "PNG"), "x"), np.stack([grey] * 3, -1))
    colour = pixels(1, 4)[0] // 64 * 64
    palette = Image.fromarray(colour).quantize(256)
    np.testing.assert_array_equal(decode_rgb(encoded(palette, "PNG"), "x"), np.asarray(palette.convert("RGB")))
    alpha = np.dstack([colour, np.full((32, 32), 255, np.uint8)])
    alpha[:16, :, 3] = 0
    over = decode_rgb(encoded(Image.fromarray(alpha), "PNG"), "x")
    assert (over[:16] == 255).all() and (over[16:] == colour[16:]).all()
    wide = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)  # 16-bit grey
    np.testing.assert_array_equal(decode_rgb(encoded(Image.fromarray(wide), "PNG"), "x")[..., 1], wide // 257)
    flat = Image.new("RGB", (16, 16), (250, 60, 20))
    inks = decode_rgb(encoded(flat.convert("CMYK"), "JPEG", quality=95), "x")
    assert abs(inks.astype(int) - [250, 60, 20]).max() < 12
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: display it rotated clockwise by a quarter
    tall = np.zeros((16, 32, 3), np.uint8)
    tall[:, :16] = 255
    turned = decode_rgb(jpeg(tall, exif=exif), "x")
    assert turned.shape == (32, 16, 3) and turned[:12].min() > 240 and turned[-12:].max() < 15


def test_dataset_json_says_everything(tmp_path, converted):
    class_folders(tmp_path / "pets")
    dataset, _, _ = converted(tmp_path / "pets")
    content = json.loads((dataset.folder / "dataset.json").read_text())
    assert content["classes"] == list(CLASSES)
    assert content["counts"] == {"train": 9, "test": 9}
    assert {"python", "numpy", "pillow"} <= set(content["versions"])
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["dataset.json", "test.beton", "train.beton"]


def test_jpg_storage(tmp_path, converted):
    smooth = np.linspace(0, 255, 32).astype(np.uint8)
    for split in ("train", "test"):
        for label, channel in (("a", 0), ("b", 2)):
            image = np.zeros((32, 32, 3), np.uint8)
            image[..., channel] = smooth
            (tmp_path / "g" / split / label).mkdir(parents=True)
            (tmp_path / "g" / split / label / "1.png").write_bytes(png(image))
    dataset, images, _ = converted(tmp_path / "g", image_format="jpg")
    assert dataset.image_format == "jpg"
    assert abs(images["train"][1][..., 2].astype(int) - smooth).mean() < 12
    assert images["train"][1][..., 0].mean() < 12  # red and blue were not swapped


def test_order_in_an_archive_does_not_matter(tmp_path, converted):
    content = class_folders(tmp_path / "pets")
    with tarfile.open(tmp_path / "back.tar", "w") as archive:
        for file in sorted((tmp_path / "pets").rglob("*.png"), reverse=True):
            archive.add(file, str(Path("pets") / file.relative_to(tmp_path / "pets")))
    _, images, labels = converted(tmp_path / "back.tar")
    assert_same(images["train"], labels["train"], *content["train"])


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_hidden_folder_of_pictures_is_left_out_and_said(tmp_path, form):
    root = tmp_path / "pets"
    class_folders(root)
    for name in (".dots.", "eel/.old/more"):
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / "1.png").write_bytes(png(pixels(1, 0, 8, 8)[0]))
    for name in (".git/note.txt", "train/cat/.cache/._1.png", "__MACOSX/.x/1.png"):  # of which nothing need be said
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"junk")
    said: list[str] = []
    source = root if form == "folder" else tar(tmp_path / "pets.tar", root, mode="w")
    assert convert(source, tmp_path / "out", log=said.append).classes == CLASSES
    prefix = "" if form == "folder" else "pets/"
    assert [line for line in said if "hidden" in line] == [
        f"{source}: leaving out {prefix}train/.dots., {prefix}train/eel/.old, hidden by the dot, though pictures lie "
        "there; rename what is a class"
    ]


@pytest.mark.parametrize("form", ["class folders", "Parquet", "arrays", "official", "table"])
def test_a_share_to_test_on_is_refused_where_there_is_a_test_set(tmp_path, form):
    root = tmp_path / "source"
    if form == "class folders":
        class_folders(root)
    elif form == "official":
        official_python(root / "cifar-10-batches-py")
    elif form == "arrays":
        root.mkdir()
        for split in ("train", "test"):
            np.save(root / f"x_{split}.npy", pixels(4, 0))
            np.save(root / f"y_{split}.npy", np.arange(4) % 2)
    else:
        for split in ("train", "test"):
            if form == "Parquet":
                parquet(root / f"{split}.parquet", pixels(4, 0), [0, 1, 0, 1])
            else:
                (root / split).mkdir(parents=True)
                for index, image in enumerate(pixels(4, 0)):
                    (root / split / f"{index}.png").write_bytes(png(image))
                (root / f"{split}.csv").write_text("file,label\n0,a\n1,b\n2,a\n3,b\n")
    options = {"verify": False, "log": lambda line: None}
    with pytest.raises(DataError, match="source: has a test set, .*; leave out --test-fraction, or give --validation"):
        convert(root, tmp_path / "out", test_fraction=0.2, **options)
    said: list[str] = []
    validated = convert(root, tmp_path / "out", validation=0.5, **options | {"log": said.append})
    count = validated.test_count
    assert any(
        f"testing on {count} of {validated.train_count + count} training images" in line
        and "images of the test set are not used" in line
        for line in said
    )


@pytest.mark.parametrize("image_format", ["raw", "jpg"])
@pytest.mark.parametrize("copies", [0, 1, 3])
def test_test_images_that_are_training_images_too_are_counted(tmp_path, copies, image_format):
    """Whatever their files are called and coded as, and whatever their class."""
    root = tmp_path / "pets"
    content = class_folders(root)
    for index in range(copies):
        Image.fromarray(content["train"][0][index]).save(root / "test" / CLASSES[index] / "copy.bmp")
    said: list[str] = []
    convert(root, tmp_path / "out", image_format=image_format, log=said.append)
    lines = [line for line in said if "same pixels" in line]
    words = "1 of 10 test images has" if copies == 1 else "3 of 12 test images have"
    assert lines == (
        [f"pets: {words} the same pixels as a training image, so that the test accuracy may be too high"]
        if copies
        else []
    )


def test_checksums_alone_make_no_image_the_same(tmp_path):
    class_folders(tmp_path / "pets")
    dataset = convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    found = tuple(
        Measured(heights=[8] * count, widths=[8] * count, checksums=[7] * count)
        for count in (dataset.train_count, dataset.test_count)
    )
    assert count_shared(dataset.train_beton, dataset.test_beton, found) == 0
    assert count_shared(dataset.train_beton, dataset.train_beton, (found[0], found[0])) == dataset.train_count


@pytest.mark.parametrize("form", ["class folders", "Parquet"])
def test_the_checksum_of_a_folder_is_what_the_documented_command_prints(tmp_path, form):
    root = tmp_path / "a folder"
    if form == "Parquet":
        parquet(root / "data" / "train.parquet", pixels(4, 0), [0, 1, 0, 1])
        parquet(root / "data" / "test.parquet", pixels(4, 1), [0, 1, 0, 1])
    else:
        class_folders(root)
        (root / "train" / "cat" / "Zoë 1.png").write_bytes(png(pixels(1, 0, 8, 8)[0]))
        (root / "train" / "cat" / ".DS_Store").write_bytes(b"junk")
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("find "))
    printed = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True).stdout
    assert convert(root, tmp_path / "out", log=lambda line: None).checksum == printed.split()[0]


def test_transparent_and_deep_pictures_become_what_the_documentation_says(tmp_path):
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1] = 10, 20, 30, 255
    buffer = io.BytesIO()
    Image.fromarray(clear).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue(), "a").tolist() == [[[255, 255, 255], [10, 20, 30]]]
    deep = np.array([[0, 255, 256, 513, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue(), "a")[0, :, 0].tolist() == [0, 0, 0, 1, 255]
