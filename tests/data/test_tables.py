"""Pictures whose classes a table names, and Tiny ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError
from rsengine.data.convert import main
from tests.data.data_builders import class_folders, pixels, png, tar, zipped
from tests.data.source_builders import assert_split, kaggle, opened, samples, tiny_imagenet


def pictures(folder: Path, *names: str) -> np.ndarray:
    """A picture under each of the names."""
    images = pixels(len(names), 7, 8, 8)
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(image))
    return images


def in_any_split(source: object, count: int) -> dict[bytes, str]:
    """Pixels of all images -> their class."""
    found = {}
    for split in (source.train, source.test):
        images, labels = samples(split)
        found |= {image.tobytes(): source.classes[label] for image, label in zip(images, labels, strict=True)}
    assert len(found) == count
    return found


@pytest.mark.parametrize("form", ["folder", "zip", "wrapped"])
def test_kaggle(tmp_path, form):
    content = kaggle(tmp_path / "cifar-10")
    source = {
        "folder": lambda: tmp_path / "cifar-10",
        "zip": lambda: zipped(tmp_path / "cifar-10.zip", tmp_path / "cifar-10"),
        "wrapped": lambda: tar(tmp_path / "cifar-10.tar", tmp_path / "cifar-10", mode="w"),
    }[form]()
    said: list[str] = []
    found = opened(source, tmp_path, said, test_fraction=0.25)
    images, labels = content["train"]
    expected = {image.tobytes(): ("cat", "frog", "ship")[label] for image, label in zip(images, labels, strict=True)}
    assert in_any_split(found, 12) == expected
    assert found.classes == ("cat", "frog", "ship") and len(found.test) == 3
    text = "\n".join(said)
    assert "sampleSubmission.csv: ignored" in text and "leaving out 4 pictures without a label" in text
    assert "12 labels of train" in text and "set aside" in text


def test_conversion_of_kaggle(tmp_path, converted):
    kaggle(tmp_path / "cifar-10")
    dataset, images, _ = converted(tmp_path / "cifar-10")
    assert dataset.class_counts == {"train": (3, 3, 3), "test": (1, 1, 1)} and dataset.image_size == (32, 32)
    first = dataset.checksum
    text = (tmp_path / "cifar-10" / "trainLabels.csv").read_text()
    (tmp_path / "cifar-10" / "trainLabels.csv").write_text(text.replace("1,cat\n2,frog", "1,frog\n2,cat"))
    assert converted(tmp_path / "cifar-10", overwrite=True)[0].checksum != first


TEXTS = {
    "byte order mark": "\ufefffile,label\na.png,x\nb.png,y\nc.png,x\nd.png,y\n",
    "carriage returns": "file,label\r\na.png,x\r\nb.png,y\r\nc.png,x\r\nd.png,y\r\n",
    "semicolons": "Filename;ClassName;Class\na.png;;x\nb.png;;y\nc.png;;x\nd.png;;y\n",
    "tabs": "path\tlabel\na.png\tx\nb.png\ty\nc.png\tx\nd.png\ty\n",
    "quotes": 'label,image\n"x","a.png"\n"y","b.png"\n"x","c.png"\n"y","d.png"\n',
    "no suffix": "id,label\na,x\nb,y\nc,x\nd,y\n",
    "two columns": "id,breed\na,x\nb,y\nc,x\nd,y\n",
    "blank lines and spaces": "id, label\n\na, x\nb, y\n\nc, x\nd, y\n",
    "paths": "file,label\n./images/a.png,x\nimages\\b.png,y\nimages/c.png,x\nimages/d,y\n",
    "names of columns": "photo,kind\na.png,x\nb.png,y\nc.png,x\nd.png,y\n",
    "numbers as labels": "label,width,id\n0,8,a\n1,8,b\n0,8,c\n1,8,d\n",
    "other columns": "width,image_id,label,note\n8,a,x,\n8,b,y,\n8,c,x,\n8,d,y,long\n",
}


@pytest.mark.parametrize("text", TEXTS)
def test_forms_of_a_table(tmp_path, text):
    images = pictures(tmp_path / "pets" / "images", "a.png", "b.png", "c.png", "d.png")
    pictures(tmp_path / "pets" / "test", "0.png", "8.png")  # which these numbers do not mean
    encoding = "utf-16" if text == "tabs" else "utf-8"  # as Excel saves what it calls Unicode text
    (tmp_path / "pets" / "labels.csv").write_text(TEXTS[text], encoding=encoding, newline="")
    found = opened(tmp_path / "pets", tmp_path)
    names = "0101" if text == "numbers as labels" else "xyxy"
    assert in_any_split(found, 4) == {image.tobytes(): names[i] for i, image in enumerate(images)}


def test_a_table_for_each_split(tmp_path):
    """The same names in both folders."""
    for split in ("train", "test"):
        pictures(tmp_path / "pets" / split, "1.png", "2.png")
    (tmp_path / "pets" / "train.csv").write_text("id,label\n1,cat\n2,dog\n")
    (tmp_path / "pets" / "test.csv").write_text("id,label\n2,cat\n1,dog\n")
    found = opened(tmp_path / "pets", tmp_path)
    assert_split(found.train, pixels(2, 7, 8, 8), [0, 1])
    assert_split(found.test, pixels(2, 7, 8, 8)[::-1], [0, 1])


def test_a_table_in_the_folder_of_each_split(tmp_path):
    """As the Hugging Face library reads it."""
    for split in ("train", "valid"):
        pictures(tmp_path / "pets" / split, "1.png", "2.png")
        (tmp_path / "pets" / split / "metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    found = opened(tmp_path / "pets", tmp_path)
    assert (len(found.train), len(found.test)) == (2, 2)


def test_a_table_without_labels_beside_one_with_them_is_ignored(tmp_path):
    """As Kaggle gives the names of the test pictures."""
    for split in ("train", "test"):
        pictures(tmp_path / "pets" / split, *(f"{i}.png" for i in range(4)))
    (tmp_path / "pets" / "train.csv").write_text("id,label\n0,cat\n1,dog\n2,cat\n3,dog\n")
    (tmp_path / "pets" / "test.csv").write_text("id\n0\n1\n")
    said: list[str] = []
    found = opened(tmp_path / "pets", tmp_path, said)
    assert len(found.train) + len(found.test) == 4 and "test.csv: no column called label" in said[0]


def test_pictures_in_several_folders(tmp_path):
    """As HAM10000 has them: these folders are no classes."""
    pictures(tmp_path / "ham", *(f"part_{i % 2}/{i}.jpg" for i in range(8)))
    lines = [f"L{i},{i},{('nv', 'mel')[i // 4]},{i}" for i in range(8)]
    (tmp_path / "ham" / "metadata.csv").write_text("\n".join(["lesion_id,image_id,dx,age", *lines]) + "\n")
    found = opened(tmp_path / "ham", tmp_path, label_column="dx", test_fraction=0.25)
    assert found.classes == ("mel", "nv") and (len(found.train), len(found.test)) == (6, 2)


def test_a_table_that_repeats_the_folders_is_not_needed(tmp_path):
    class_folders(tmp_path / "pets")
    names = sorted(path.relative_to(tmp_path / "pets") for path in (tmp_path / "pets" / "train").rglob("*.png"))
    text = "filepath,label\n" + "".join(f"{name},{name.parent.name}\n" for name in names)
    (tmp_path / "pets" / "train.csv").write_text(text)
    assert opened(tmp_path / "pets", tmp_path).form == "class folders, folder"
    swapped = text.replace("000.png,cat", "000.png,dog")
    (tmp_path / "pets" / "train.csv").write_text(swapped)
    assert opened(tmp_path / "pets", tmp_path).form == "pictures and a table, folder"


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "", "file,label\nelsewhere.png,cat\n", 'note\n"open quote\n', "\xff\xfe\x00"]
)
def test_other_tables_beside_class_folders_do_not_matter(tmp_path, text):
    class_folders(tmp_path / "pets")
    (tmp_path / "pets" / "notes.csv").write_text(text, encoding="latin1")
    assert opened(tmp_path / "pets", tmp_path).form == "class folders, folder"


def test_a_table_of_sizes_beside_class_folders_is_ignored_and_said(tmp_path):
    class_folders(tmp_path / "pets")
    (tmp_path / "pets" / "sizes.csv").write_text("file,width,height\ntrain/cat/000.png,8,8\n")
    said: list[str] = []
    assert opened(tmp_path / "pets", tmp_path, said).form == "class folders, folder"
    assert "ignoring" in said[0] and "sizes.csv: no column called label among file, width, height" in said[0]


BAD = {
    "missing pictures": ("id,label\na,x\nb,y\nq,x\nr,y\n", ["labels.csv: no picture q, r", "remove the lines"]),
    "no label": ("id,label\na,x\nb,\n", ["labels.csv line 3: no label"]),
    "twice": ("id,label\na,x\nb,y\na.png,y\n", ["line 4: a.png is listed twice"]),
    "ambiguous": ("id,label\na,x\nb,y\nboth,y\n", ["line 4: both may be", "both.jpg", "whole path"]),
    "few cells": ("id,label\na,x\nb\n", ["line 3: 1 cell, but 2"]),
    "many cells": ("id,label\na,x\nb,y,z\n", ["line 3: 3 cells, but 2"]),
    "open quote": ('id,label\na,x\nb,"y\nc,x\n', ["labels.csv line", "not a table"]),
    "several columns": ("id,fine_label,coarse_label\na,x,z\nb,y,z\n", ["fine_label, coarse_label", "--label-column"]),
    "one class": ("id,label\na,x\nb,x\n", ["at least two classes"]),
    "class of one image": ("id,label\na,x\nb,x\nc,y\n", ["c.png is the only image of its class"]),
    "no first line": ("a,x\nb,y\nc,x\nd,y\n", ["its first line names no columns", "file,label"]),
    "no column of labels": ("id,size,kind\na,1,x\nb,2,y\n", ["no column called label among id, size, kind", "choose"]),
    "other names": ("file,label\n/data/e.png,x\n/data/f.png,y\n", ["none of its columns names one of the pictures"]),
    "encoding": ("id,label\na,x\nb,caf\u00e9\n", ["not in UTF-8"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path, capsys, case):
    text, words = BAD[case]
    names = ("a.png", "b.png", "c.png", "d.png") + (("both.png", "both.jpg") if case == "ambiguous" else ())
    pictures(tmp_path / "pets" / "images", *names)
    (tmp_path / "pets" / "labels.csv").write_text(text, encoding="latin1" if case == "encoding" else "utf-8")
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words), line


def test_tables_that_do_not_go_together(tmp_path):
    pictures(tmp_path / "pets" / "images", "a.png", "b.png")
    (tmp_path / "pets" / "a.csv").write_text("id,label\na,x\nb,y\n")
    (tmp_path / "pets" / "b.csv").write_text("id,label\na,x\nb,y\n")
    with pytest.raises(DataError, match="b.csv: has labels of train, as a.csv has"):
        opened(tmp_path / "pets", tmp_path)
    (tmp_path / "pets" / "a.csv").unlink()
    (tmp_path / "pets" / "b.csv").rename(tmp_path / "pets" / "test.csv")
    with pytest.raises(DataError, match="no table of train, but test.csv"):
        opened(tmp_path / "pets", tmp_path)
    with pytest.raises(DataError, match="test.csv: a table alone; give the folder"):
        opened(tmp_path / "pets" / "test.csv", tmp_path)
    with pytest.raises(DataError, match="no column kind among id, label; choose one"):
        opened(tmp_path / "pets", tmp_path, label_column="kind")


def test_a_path_out_of_the_folder_is_not_followed(tmp_path):
    pictures(tmp_path, "secret.png")
    pictures(tmp_path / "pets" / "images", "a.png", "b.png")
    (tmp_path / "pets" / "labels.csv").write_text("file,label\na,x\nb,y\n../secret.png,x\n")
    with pytest.raises(DataError, match="no picture ../secret.png"):
        opened(tmp_path / "pets", tmp_path)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_tiny_imagenet(tmp_path, form):
    """The name of two classes is the same word in words.txt, so that they keep their numbers."""
    content = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    source = tmp_path / "tiny-imagenet-200"
    found = opened(zipped(tmp_path / "tiny.zip", source) if form == "zip" else source, tmp_path)
    assert_split(found.train, *content["train"])
    assert_split(found.test, *content["test"])
    assert found.classes == ("n01443537", "European fire salamander", "n02124075")
    (source / "words.txt").unlink()
    assert opened(source, tmp_path).classes == ("n01443537", "n01629819", "n02124075")


def test_conversion_of_tiny_imagenet(tmp_path, converted):
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    dataset, _, labels = converted(tmp_path / "tiny-imagenet-200")
    assert dataset.name == "tiny-imagenet-200" and dataset.image_size == (64, 64)
    assert labels == {"train": [0, 0, 1, 1, 2, 2], "test": [2, 0, 1]}


TINY = {
    "unknown class": ("val_0.png\tn00000001\t0\t0\t1\t1\n", "line 1: train has no class n00000001"),
    "missing picture": ("val_9.png\tn01443537\t0\t0\t1\t1\n", "no picture val_9.png"),
    "no class": ("val_0.png\n", "line 1: no file and class"),
    "empty": ("", "val_annotations.txt: no lines"),
    "twice": ("val_0.png\tn01443537\nval_0.png\tn01443537\n", "line 2: val_0.png is listed twice"),
}


@pytest.mark.parametrize("case", TINY)
def test_bad_lists_of_tiny_imagenet(tmp_path, case):
    text, words = TINY[case]
    tiny_imagenet(tmp_path / "tiny")
    (tmp_path / "tiny" / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / "tiny", tmp_path)


DIVIDED = {
    "split": "file,label,split\na,x,train\nb,y,train\nc,x,test\nd,y,test\n",
    "Usage": "file,label,Usage\na,x,Training\nb,y,Training\nc,x,PublicTest\nd,y,PrivateTest\n",
    "set": "set,file,breed\ntrain,a,x\ntrain,b,y\nval,c,x\nval,d,y\n",
    "partition": "label\tpartition\tfile\nx\ttrain_set\ta\ny\ttrain_set\tb\nx\ttesting\tc\ny\ttesting\td\n",
}


@pytest.mark.parametrize("case", DIVIDED)
def test_a_column_says_the_split_of_each_row(tmp_path, case):
    images = pictures(tmp_path / "pets" / "images", "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "pets" / "labels.csv").write_text(DIVIDED[case])
    found = opened(tmp_path / "pets", tmp_path)
    assert found.classes == ("x", "y")
    assert_split(found.train, images[:2], [0, 1])
    assert_split(found.test, images[2:], [0, 1])


def test_a_table_that_divides_class_folders_is_needed(tmp_path):
    images = pictures(tmp_path / "pets", "x/a.png", "x/b.png", "y/c.png", "y/d.png")
    lines = ["x/a.png,x,train", "x/b.png,x,test", "y/c.png,y,test", "y/d.png,y,train"]
    (tmp_path / "pets" / "labels.csv").write_text("\n".join(["file,label,split", *lines]))
    found = opened(tmp_path / "pets", tmp_path)
    assert_split(found.train, images[[0, 3]], [0, 1])
    assert_split(found.test, images[[1, 2]], [0, 1])
    lines = [line.replace(",x,", ",").replace(",y,", ",") for line in lines]
    (tmp_path / "pets" / "labels.csv").write_text("\n".join(["file,split", *lines]))
    with pytest.raises(DataError, match="its column split says the splits, but none the classes; add a column label"):
        opened(tmp_path / "pets", tmp_path)


def test_a_validation_split_of_a_column_is_passed_over_and_said(tmp_path):
    images = pictures(tmp_path / "pets", *(f"{name}.png" for name in "abcdef"))
    splits = ("train", "train", "val", "val", "test", "test")
    lines = [f"{name},{'xy'[i % 2]},{splits[i]}" for i, name in enumerate("abcdef")]
    (tmp_path / "pets" / "labels.csv").write_text("\n".join(["file,label,subset", *lines]))
    said: list[str] = []
    found = opened(tmp_path / "pets", tmp_path, said)
    assert_split(found.train, images[:2], [0, 1])
    assert_split(found.test, images[4:], [0, 1])
    assert any("ignoring validation" in line for line in said) and not any("without a label" in line for line in said)


def test_the_same_names_in_the_folders_of_a_column(tmp_path):
    for split in ("train", "test"):
        pictures(tmp_path / "pets" / split, "1.png", "2.png")
    (tmp_path / "pets" / "labels.csv").write_text("id,label,split\n1,x,train\n2,y,train\n2,x,test\n1,y,test\n")
    found = opened(tmp_path / "pets", tmp_path)
    assert_split(found.test, pixels(2, 7, 8, 8)[::-1], [0, 1])


def test_a_column_of_classes_may_be_called_set(tmp_path):
    pictures(tmp_path / "pets", "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "pets" / "labels.csv").write_text("file,set\na,x\nb,y\nc,x\nd,y\n")
    assert opened(tmp_path / "pets", tmp_path).classes == ("x", "y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label,split\na,x,train\nb,y,1\n", "line 3: split is '1', none of train, test and validation"),
        ("file,label,split\na,x,train\nb,y,\n", "line 3: split is '', none of train"),
        ("file,label,fold,set\na,x,1,p\nb,y,2,q\n", "line 2: set is 'p', none of .*; correct it, or rename the column"),
        ("file,label,split,set\na,x,train,test\n", "the columns split, set may say the splits"),
        ("file,label,split\na,x,train\na.png,x,test\n", "a.png is in train and in test; remove one line"),
        ("file,label,split\na,x,test\nb,y,test\n", "no table of train"),
    ],
)
def test_columns_of_splits_that_are_refused(tmp_path, text, words):
    pictures(tmp_path / "pets", "a.png", "b.png")
    (tmp_path / "pets" / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / "pets", tmp_path)
