"""Which files and folders are for training and which for testing: recognised, or refused, never mixed in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert
from rsengine.data.sources.splits import indistinct, placed
from tests.data.data_builders import parquet, pixels, png, tar

PAIRS = [
    ("train", "test"),
    ("cifar10_train", "cifar10_test"),
    ("cifar10-train", "cifar10-test"),
    ("cifar10train", "cifar10test"),
    ("CifarTrain", "CifarTest"),
    ("TRAIN_SET", "TEST_SET"),
    ("trainset", "testset"),
    ("training.images", "testing.images"),
    ("train", "validation"),
    ("my_train", "my_val"),
    ("train-00000-of-00001-a09b74b3ef9c3b56", "test-00000-of-00001-b7c3e1f2a4d59608"),
]
UNKNOWN_PAIRS = [("mytrain", "mytest"), ("trainx", "evalx"), ("atrain1", "atest2"), ("pretrained", "pretested")]


def fill(root: Path, *folders: str, each: int = 3) -> Path:
    """Pictures in each of the folders."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for index, image in enumerate(pixels(each, number + 1, 8, 8)):
            (root / folder / f"{index}.png").write_bytes(png(image))
    return root


def classes_in(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_the_word_may_stand_anywhere_in_a_parquet_name(tmp_path, converted, pair):
    for seed, name in enumerate(pair):
        parquet(tmp_path / "hub" / f"{name}.parquet", pixels(4, seed), [0, 1, 0, 1], ["a", "b"])
    _, images, labels = converted(tmp_path / "hub")
    np.testing.assert_array_equal(images["train"], pixels(4, 0))
    np.testing.assert_array_equal(images["test"], pixels(4, 1))
    assert labels["test"] == [0, 1, 0, 1]


@pytest.mark.parametrize("pair", PAIRS[:-1], ids="+".join)
@pytest.mark.parametrize("packed", [False, True])
def test_the_word_may_stand_anywhere_in_a_folder_name(tmp_path, converted, pair, packed):
    source = fill(tmp_path / "pets", *classes_in(*pair))
    if packed:
        source = tar(tmp_path / "pets.tar.gz", source)
    dataset, images, _ = converted(source)
    assert dataset.classes == ("cat", "dog") and (dataset.train_count, dataset.test_count) == (6, 6)
    np.testing.assert_array_equal(images["train"], np.concatenate([pixels(3, 1, 8, 8), pixels(3, 2, 8, 8)]))


def test_the_folder_of_a_parquet_file_may_say_the_split(tmp_path, converted):
    for seed, split in enumerate(("train", "test")):
        parquet(tmp_path / "crash-test" / "plain" / split / "0000.parquet", pixels(4, seed), [0, 1, 0, 1], ["a", "b"])
    for source in (tmp_path / "crash-test", tar(tmp_path / "hub.tar", tmp_path / "crash-test", mode="w")):
        dataset, images, _ = converted(source, overwrite=True)
        np.testing.assert_array_equal(images["train"], pixels(4, 0))
        assert (dataset.train_count, dataset.test_count) == (4, 4)


@pytest.mark.parametrize("pair", UNKNOWN_PAIRS, ids="+".join)
@pytest.mark.parametrize("form", ["parquet", "folders", "folders in a class", "one flat"])
def test_sources_that_differ_by_such_a_word_and_cannot_be_placed_are_refused(tmp_path, pair, form):
    source = tmp_path / "source"
    if form == "parquet":
        for seed, name in enumerate(pair):
            parquet(source / f"{name}.parquet", pixels(4, seed), [0, 1, 0, 1], ["a", "b"])
    elif form == "folders":
        fill(source, *classes_in(*pair))
    elif form == "one flat":
        fill(source, *pair, "apple")
    else:
        fill(source, *(f"{name}/{each}" for name in ("cat", "dog") for each in pair))
    with pytest.raises(DataError) as caught:
        convert(source, tmp_path / "out", log=lambda line: None)
    assert all(name in str(caught.value) for name in pair)
    assert "train" in str(caught.value).rpartition(";")[2]  # the remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["train", "test", "validation", "bullet train", "Train"])
@pytest.mark.parametrize("inside", [[""], ["/a", "/b"]], ids=["flat", "with folders inside"])
def test_a_class_may_be_called_like_a_split(tmp_path, word, inside):
    source = fill(tmp_path / "things", "apple", "bus", "tractor", *(word + each for each in inside), each=4)
    said: list[str] = []
    dataset = convert(source, tmp_path / "out", log=said.append)
    assert sorted(dataset.classes) == sorted(("apple", "bus", "tractor", word))
    assert dataset.train_count + dataset.test_count == 12 + 4 * len(inside)
    assert any(word in line and "taken for a class" in line for line in said)


UNCLEAR = {
    "split and class of one name": ["apple", "bus", "train", "test"],
    "test beside its classes": ["cat", "dog", "test/cat", "test/dog"],
    "one other folder": ["train/cat", "train/dog", "unlabelled"],
    "another word for test": ["train/cat", "train/dog", "query/cat", "query/dog"],
    "splits inside classes": ["cat/train", "cat/test", "dog/train", "dog/test"],
    "splits deep inside classes": ["cat/a/train", "cat/a/test", "dog/a"],
    "two data sets": ["cifar/train", "cifar/test", "mnist/train", "mnist/test"],
    "two of one split": ["train/cat", "train/dog", "training/cat", "training/dog", "test/cat", "test/dog"],
    "no classes inside": ["train", "test"],
}


@pytest.mark.parametrize("folders", UNCLEAR.values(), ids=UNCLEAR)
def test_what_may_be_split_or_class_is_refused(tmp_path, folders):
    with pytest.raises(DataError, match="train"):
        convert(fill(tmp_path / "things", *folders), tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_further_folders_beside_splits_with_the_same_classes_are_ignored_and_said(tmp_path):
    source = fill(tmp_path / "stl", *classes_in("train", "test"), "unlabelled")
    said: list[str] = []
    dataset = convert(source, tmp_path / "out", log=said.append)
    assert (dataset.train_count, dataset.test_count) == (6, 6)
    assert any("ignoring unlabelled" in line for line in said)


def test_annotations_beside_a_split_are_no_sibling(tmp_path):
    source = fill(tmp_path / "pets", *classes_in("train"))
    (source / "annotations").mkdir()
    (source / "annotations" / "1.xml").write_text("<a/>")
    dataset = convert(source, tmp_path / "out", log=lambda line: None)
    assert dataset.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cifar10_train", "more"], "more.parquet: name says neither train nor test"),
        (["cifar10_test"], "no train"),
        (["cifar_train", "mnist_test"], "named after different data sets"),
        (["train", "eval"], "eval.parquet: name says neither"),
    ],
)
def test_parquet_files_that_do_not_go_together_are_refused(tmp_path, names, words):
    for seed, name in enumerate(names):
        parquet(tmp_path / "hub" / f"{name}.parquet", pixels(4, seed), [0, 1, 0, 1], ["a", "b"])
    with pytest.raises(DataError, match=words):
        convert(tmp_path / "hub", tmp_path / "out", log=lambda line: None)


def test_pictures_called_train_and_test_are_not_mixed_in_silence(tmp_path):
    source = fill(tmp_path / "pets", "cat", "dog")
    (source / "cat" / "0.png").rename(source / "cat" / "train_0.png")
    (source / "cat" / "1.png").rename(source / "cat" / "test_1.png")
    said: list[str] = []
    convert(source, tmp_path / "out", log=said.append)
    assert "train_0.png" in said[0] and "test_1.png" in said[0] and "mixed" in said[0]


def test_the_archive_of_one_split_is_not_recommended_alone(tmp_path):
    (tmp_path / "downloads").mkdir()
    for split in ("test", "train"):
        tar(tmp_path / "downloads" / f"{split}.tar", fill(tmp_path / split, "cat", "dog"), mode="w")
    with pytest.raises(DataError, match="archives test.tar, train.tar; unpack them into one folder"):
        convert(tmp_path / "downloads", tmp_path / "out")


def test_words():
    assert placed("train-00000-of-00002") == ("train", "") and placed("cifar10_Test") == ("test", "cifar10")
    for name in ("contest", "trains", "valley", "trainer", "train_test_split", "apple"):
        assert placed(name).split == ""
    assert indistinct(["a1", "contest", "train", "apple", "train2"]) is None
    assert indistinct(["x/mytrain", "y/mytest", "x/mytest"]) == ("x/mytrain", "x/mytest")
