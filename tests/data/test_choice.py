"""Some of the classes, fewer training images, and the order of the classes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert
from rsengine.data.convert import OptionError, main
from rsengine.data.sources.base import Source
from rsengine.data.sources.choice import in_order, with_classes, with_subset
from rsengine.data.sources.images import ArraySplit
from rsengine.data.sources.labels import natural_key
from tests.data.data_builders import class_folders, official_python, parquet, pixels, png


def quiet(line: str) -> None:
    pass


def source(sizes: list[int], classes: tuple[str, ...] = (), sorted_names: bool = False) -> Source:
    """Classes of these sizes in train, in a mixed order, and one image of each in test. Images are their number."""
    classes = classes or tuple(f"c{i}" for i in range(len(sizes)))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 2, 2, 3))
    test = ArraySplit(images[: len(sizes)], np.arange(len(sizes)), "test")
    return Source("some", "made", classes, ArraySplit(images, labels, "train"), test, "0", sorted_names=sorted_names)


def chosen(made: Source) -> set[int]:
    return {int(made.train.load(i)[0][0, 0, 0]) for i in range(len(made.train))}


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.9, 3, 10, 57, 199, 200])
def test_a_subset_has_the_same_share_of_every_class(amount):
    sizes = np.array([100, 60, 40])
    part = with_subset(source(list(sizes)), amount, 0, quiet)
    count = amount if isinstance(amount, int) else round(amount * 200)
    found = np.bincount(part.train.labels, minlength=3)
    assert found.sum() == count == len(part.train) and len(chosen(part)) == count
    assert (np.abs(found - np.maximum(sizes * count / 200, 1)) <= 1).all()
    assert part.test.labels.tolist() == [0, 1, 2] and part.name == f"some-subset-{count}"


def test_every_class_keeps_an_image():
    part = with_subset(source([150, 1, 1, 2]), 4, 0, quiet)
    assert np.bincount(part.train.labels).tolist() == [1, 1, 1, 1]


def test_a_smaller_subset_is_part_of_a_larger_one_and_the_seed_chooses():
    whole, before = source([90, 7, 40]), set()
    for count in range(3, 138, 5):
        now = chosen(with_subset(whole, count, 0, quiet))
        assert before < now
        before = now
    assert chosen(with_subset(whole, 30, 0, quiet)) == chosen(with_subset(whole, 30, 0, quiet))
    assert chosen(with_subset(whole, 30, 0, quiet)) != chosen(with_subset(whole, 30, 1, quiet))


@pytest.mark.parametrize("amount", [2, 138, 10**12, 0.001])
def test_subsets_that_are_too_small_or_too_large(amount):
    with pytest.raises(DataError, match="where there are 137 in 3 classes"):
        with_subset(source([90, 7, 40]), amount, 0, quiet)


def test_classes_keep_their_samples_and_the_order_of_the_source():
    whole = source([5, 6, 7, 8], ("cat", "dog", "eel", "fox"))
    part = with_classes(whole, ["fox", "dog"])
    assert part.classes == ("dog", "fox") and part.name == "some-2-classes"
    assert np.bincount(part.train.labels).tolist() == [6, 8] and part.test.labels.tolist() == [0, 1]
    expected = {i for i, label in enumerate(whole.train.labels) if label in (1, 3)}
    assert chosen(part) == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "dgo"], "no class dgo; did you mean dog?"),
        (["Cat", "dog"], "no class Cat; did you mean cat?"),
        (["cat", "zebra", "yak"], "no class zebra, yak; the classes are cat, dog"),
        (["cat", "cat"], "named twice"),
        (["cat"], "at least two classes are needed, got 1"),
        ([], "at least two classes are needed, got 0"),
        (["cat", ""], "no class"),
    ],
)
def test_classes_that_are_refused(names, words):
    with pytest.raises(DataError, match=words.replace("?", "[?]")):
        with_classes(source([5, 5, 5], ("cat", "dog", "eel")), names)


@pytest.mark.parametrize("classes", [("cat", "cat", "dog"), ("cat", " ", "dog")])
def test_class_names_that_cannot_be_told_apart_are_refused(classes):
    with pytest.raises(DataError, match="some: .* name"):
        source([5, 5, 5], classes)


def test_natural_order_is_that_of_timm(tmp_path):
    from timm.data.readers.class_map import load_class_map  # noqa: F401
    from timm.data.readers.reader_image_folder import find_images_and_targets

    names = ["1", "2", "10", "100", "class10", "Class9", "b", "A", "n01", "n1a", "x2y10", "x2y9", "0", "ß", "x", "٣a"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(pixels(1, 0, 8, 8)[0]))
    theirs = find_images_and_targets(str(tmp_path))[1]
    assert sorted(names, key=natural_key) == sorted(theirs, key=theirs.get)


def test_string_order_is_that_of_image_folder_and_said(tmp_path, converted):
    from torchvision.datasets import ImageFolder

    names = ["0", "1", "2", "10", "11"]
    for split in ("train", "test"):
        for number, name in enumerate(names):
            (tmp_path / "things" / split / name).mkdir(parents=True)
            (tmp_path / "things" / split / name / "1.png").write_bytes(png(pixels(1, number, 8, 8)[0]))
    said: list[str] = []
    dataset, images, labels = converted(tmp_path / "things", log=said.append)
    theirs = ImageFolder(tmp_path / "things" / "train")
    assert list(dataset.classes) == theirs.classes == ["0", "1", "10", "11", "2"]
    assert any("sorted as strings (0, 1, 10, 11, 2)" in line and "--class-order natural" in line for line in said)
    for image, label in zip(images["train"], labels["train"], strict=True):
        number = names.index(dataset.classes[label])
        np.testing.assert_array_equal(image, pixels(1, number, 8, 8)[0])
    natural, images, labels = converted(tmp_path / "things", class_order="natural", overwrite=True, log=said.append)
    assert natural.classes == tuple(names) and natural.identity != dataset.identity
    for image, label in zip(images["test"], labels["test"], strict=True):
        np.testing.assert_array_equal(image, pixels(1, label, 8, 8)[0])


def test_names_without_numbers_need_no_word():
    said: list[str] = []
    in_order(source([2, 2], ("cat", "dog"), sorted_names=True), "string", said.append)
    assert said == []
    with pytest.raises(DataError, match="the source itself numbers the classes; leave out --class-order natural"):
        in_order(source([2, 2]), "natural", said.append)


@pytest.mark.parametrize("packed", [False, True])
def test_all_of_them_together(tmp_path, converted, packed):
    """The validation set is the same whatever the subset, and the checksum of a folder is that of what was read."""
    class_folders(tmp_path / "pets", each=20)
    found = {}
    for subset in (None, 0.5, 10):
        dataset, images, labels = converted(
            tmp_path / "pets", classes=["eel", "cat"], validation=0.1, subset=subset, overwrite=True
        )
        assert dataset.classes == ("cat", "eel") and dataset.class_counts["test"] == (2, 2)
        found[subset] = [image.tobytes() for image in images["test"]], dataset
        assert sorted(set(labels["train"])) == [0, 1]
    assert found[None][0] == found[0.5][0] == found[10][0]
    assert [found[key][1].train_count for key in found] == [36, 18, 10]
    assert len({found[key][1].identity for key in found}) == 3 and len({d.checksum for _, d in found.values()}) == 3
    options = json.loads((found[10][1].folder / "dataset.json").read_text())["options"]
    assert options["subset"] == 10 and options["classes"] == ["eel", "cat"] and options["class_order"] == "string"
    assert found[10][1].name == "pets-2-classes-validation-subset-10"


def test_the_command_takes_them(tmp_path, capsys):
    class_folders(tmp_path / "pets", each=20)
    (tmp_path / "pets" / "train" / "eel").rename(tmp_path / "pets" / "train" / "eel, moray")
    (tmp_path / "pets" / "test" / "eel").rename(tmp_path / "pets" / "test" / "eel, moray")
    command = [str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--subset", "0.5", "--seed", "3"]
    assert main([*command, "--classes", 'cat, "eel, moray"', "--class-order", "natural"]) == 0
    assert "20 of 40 images" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["classes"] == ["cat", "eel, moray"] and content["counts"] == {"train": 20, "test": 40}


@pytest.mark.parametrize("subset", ["0", "-1", "-0.5", "inf", "nan", "1.0", "1.5", "0.0", "1e0", "-inf"])
def test_amounts_out_of_range(tmp_path, capsys, subset):
    class_folders(tmp_path / "pets")
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out"), f"--subset={subset}"]) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith("error: subset: expected a share between 0 and 1 or a whole number") and line.count("\n") == 1
    )
    assert not os.path.exists(tmp_path / "out")


def test_options_of_the_function_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(OptionError, match="class_order: expected string or natural, got other"):
        convert(tmp_path / "nowhere", tmp_path / "out", class_order="other")


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "digits"])
def test_a_column_is_for_tables(tmp_path, name):
    where: str | Path = "digits" if name == "digits" else official_python(tmp_path / name)
    with pytest.raises(DataError, match="no Parquet file and no table with a column kind; leave out --label-column"):
        convert(where, tmp_path / "out", verify=False, label_column="kind", log=quiet)


def test_classes_of_parquet_keep_the_numbers_of_the_source(tmp_path, converted):
    for seed, split in enumerate(("train", "test")):
        parquet(tmp_path / "hub" / f"{split}.parquet", pixels(6, seed), [0, 1, 2, 2, 1, 0], ["zebra", "ant", "fox"])
    dataset, images, labels = converted(tmp_path / "hub", classes=["fox", "zebra"])
    assert dataset.classes == ("zebra", "fox") and labels["train"] == [0, 1, 1, 0]
    np.testing.assert_array_equal(images["train"], pixels(6, 0)[[0, 2, 3, 5]])


@pytest.mark.parametrize("subset", ["6", "6.0", "6e0", "0.6e1"])
def test_a_number_of_images_in_any_form(tmp_path, subset):
    class_folders(tmp_path / "pets")
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--subset", subset, "--quiet"]) == 0
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["counts"]["train"] == 6 and content["options"]["subset"] == 6


@pytest.mark.parametrize("names", ["cat,eel, moray", "eel, moray,cat", "cat,moray"])
def test_quotation_marks_for_a_name_with_a_comma_are_named(tmp_path, capsys, names):
    class_folders(tmp_path / "pets")
    for split in ("train", "test"):
        (tmp_path / "pets" / split / "eel").rename(tmp_path / "pets" / split / "eel, moray")
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--classes", names]) == 2
    line = capsys.readouterr().err
    assert "a name with a comma stands in quotation marks, as in --classes '\"eel, moray\",…'" in line
