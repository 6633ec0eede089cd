"""Parquet files in the layouts of the Hugging Face Hub: columns, names of classes, shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

from rsengine.data import DataError
from tests.data.data_builders import class_folders, parquet, pixels, png, tar
from tests.data.source_builders import assert_split, opened


def table(path: Path, columns: dict[str, list], description: object = None) -> Path:
    """A file with a column of pictures, `img` unless it is given, and these columns; `description` is the Hub's."""
    count = len(next(iter(columns.values())))
    pictures = (
        {} if {"img", "image"} & set(columns) else {"img": [{"bytes": png(x), "path": None} for x in pixels(count, 1)]}
    )
    made = arrow.table(pictures | columns)
    if description is not None:
        text = description if isinstance(description, bytes) else json.dumps(description).encode()
        made = made.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(made, path)
    return path


def named(**columns: list[str]) -> dict:
    features = {column: {"names": names, "_type": "ClassLabel"} for column, names in columns.items()}
    return {"info": {"features": {"img": {"_type": "Image"}} | features}}


@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "coarse_label"])
@pytest.mark.parametrize("image", ["img", "image"])
def test_names_of_columns(tmp_path, image, label):
    for seed, split in enumerate(("train", "test")):
        path = tmp_path / "hub" / f"{split}-00000-of-00001.parquet"
        parquet(path, pixels(4, seed), [0, 1, 1, 0], ["cat", "dog"], img=image, label=label)
    found = opened(tmp_path / "hub", tmp_path)
    assert_split(found.test, pixels(4, 1), [0, 1, 1, 0])
    assert found.classes == ("cat", "dog")


def test_of_several_columns_one_is_chosen(tmp_path):
    """CIFAR-100 of the Hub has both kinds of label, each with its names."""
    columns = {"fine_label": [0, 1, 2, 0, 1, 2], "coarse_label": [0, 0, 1, 0, 0, 1]}
    description = named(fine_label=["ant", "bee", "cat"], coarse_label=["insect", "mammal"])
    source = table(tmp_path / "train.parquet", columns, description)
    with pytest.raises(DataError, match="fine_label and coarse_label; choose one with --label-column"):
        opened(source, tmp_path)
    assert opened(source, tmp_path, label_column="coarse_label").classes == ("insect", "mammal")
    assert opened(source, tmp_path, label_column="fine_label").classes == ("ant", "bee", "cat")
    with pytest.raises(
        DataError, match="no column kind; choose from img, fine_label, coarse_label with --label-column"
    ):
        opened(source, tmp_path, label_column="kind")


def test_any_column_may_be_named(tmp_path):
    source = table(tmp_path / "train.parquet", {"digit": [0, 1, 0, 1]}, named(digit=["zero", "one"]))
    assert opened(source, tmp_path, label_column="digit").classes == ("zero", "one")


@pytest.mark.parametrize("split", ["validation", "valid", "val"])
def test_validation_is_tested_on_where_there_is_no_test(tmp_path, split):
    """Of several shards each."""
    for shard in range(3):
        for seed, name in enumerate(("train", split)):
            path = tmp_path / "hub" / "data" / f"{name}-0000{shard}-of-00003.parquet"
            parquet(path, pixels(2, 10 * seed + shard), [0, 1], ["cat", "dog"], img="image")
    found = opened(tmp_path / "hub", tmp_path)
    assert_split(found.train, np.concatenate([pixels(2, shard) for shard in range(3)]), [0, 1] * 3)
    assert_split(found.test, np.concatenate([pixels(2, 10 + shard) for shard in range(3)]), [0, 1] * 3)
    said: list[str] = []
    parquet(
        tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", pixels(2, 30), [1, 0], ["cat", "dog"], img="image"
    )
    assert_split(opened(tmp_path / "hub", tmp_path, said).test, pixels(2, 30), [1, 0])
    assert "testing on test, ignoring validation" in said[0]


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"info": {}},
        {"info": {"features": {}}},
        {"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}},
    ],
)
def test_a_description_without_names_is_none(tmp_path, description):
    source = table(tmp_path / "train.parquet", {"label": [0, 1, 0, 1]}, description)
    said: list[str] = []
    assert opened(source, tmp_path, said).classes == ("0", "1") and any("numbered 0 … 1" in line for line in said)


DESCRIPTIONS = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a list": [],
    "a number for info": {"info": 3},
    "a list of features": {"info": {"features": [1]}},
    "text for a feature": {"info": {"features": {"label": "cat"}}},
    "text for names": named(label="cat,dog"),
    "a number among names": named(label=["cat", 3]),
    "null among names": named(label=["cat", None]),
    "names by number": named(label={"0": "cat", "1": "dog"}),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_damaged_descriptions_are_refused(tmp_path, case):
    source = table(tmp_path / "train.parquet", {"label": [0, 1, 0, 1]}, DESCRIPTIONS[case])
    with pytest.raises(DataError, match="train.parquet: damaged description of its columns .*; download it again"):
        opened(source, tmp_path)


LABELS = {
    "float": ([0.0, 1.0, 0.0, 1.0], "row 0: label is 0.0, not a whole number"),
    "NaN": ([float("nan")] * 4, "row 0: label is nan, not a whole number"),
    "text": (["cat", "dog", "cat", "dog"], "row 0: label is 'cat', not a whole number"),
    "lists": ([[0], [1], [0], [1]], r"row 0: label is \[0\], not a whole number"),
    "truth": ([True, False, True, False], "row 0: label is True, not a whole number"),
    "beyond the names": ([0, 1, 0, 2], "row 3: label 2 out of range 0 … 1"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes(tmp_path, case):
    labels, words = LABELS[case]
    source = table(tmp_path / "train.parquet", {"label": labels}, named(label=["cat", "dog"]))
    with pytest.raises(DataError, match=words):
        opened(source, tmp_path)


@pytest.mark.parametrize("label", [2**40, 2**62])
def test_an_enormous_label_makes_no_enormous_list_of_names(tmp_path, label):
    source = table(tmp_path / "train.parquet", {"label": [0, 0, 1, 1, label, label]})
    with pytest.raises(DataError, match=f"row 4: label {label} out of range 0 … 5"):
        opened(source, tmp_path)


def test_what_is_set_aside_does_not_depend_on_the_place_of_the_file(tmp_path):
    found = []
    for place in ("here", "there"):
        source = table(tmp_path / place / "train.parquet", {"label": [0, 1] * 20})
        split = opened(source, tmp_path).test
        found.append([split.load(i)[1] for i in range(len(split))])
    assert found[0] == found[1] and len(found[0]) == 4


def test_two_columns_of_pictures(tmp_path):
    both = [{"bytes": png(x), "path": None} for x in pixels(2, 1)]
    with pytest.raises(DataError, match="has the columns img and image; leave one of them out"):
        opened(table(tmp_path / "train.parquet", {"img": both, "image": both, "label": [0, 1]}), tmp_path)


@pytest.mark.parametrize("column", ["img", "label"])
def test_two_columns_of_one_name(tmp_path, column):
    columns = {"img": [{"bytes": png(x), "path": None} for x in pixels(2, 1)], "label": [0, 1]}
    names = [*columns, column]
    made = arrow.Table.from_arrays([arrow.array(columns[name]) for name in names], names=names)
    arrow.parquet.write_table(made, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=f"has two columns {column}; leave one of them out"):
        opened(tmp_path / "train.parquet", tmp_path)


@pytest.mark.parametrize("picture", [{"bytes": None, "path": "a.png"}, {"path": "a.png"}, "a.png", [1, 2]])
def test_pictures_that_are_not_in_the_file(tmp_path, picture):
    source = table(tmp_path / "train.parquet", {"img": [picture] * 2, "label": [0, 1]})
    with pytest.raises(DataError, match="row 0: no image bytes"):
        opened(source, tmp_path)


def test_classes_of_one_name(tmp_path):
    source = table(tmp_path / "train.parquet", {"label": [0, 1, 0, 1]}, named(label=["cat", "cat"]))
    with pytest.raises(DataError, match="two classes have the name cat"):
        opened(source, tmp_path)


def test_a_column_says_the_split_of_each_row(tmp_path):
    splits = ["train", "test", "train", "validation", "test", "train"]
    source = table(tmp_path / "all.parquet", {"label": [0, 1, 1, 0, 0, 1], "split": splits})
    said: list[str] = []
    found = opened(source, tmp_path, said)
    assert_split(found.train, pixels(6, 1)[[0, 2, 5]], [0, 1, 1])
    assert_split(found.test, pixels(6, 1)[[1, 4]], [1, 0])
    assert any("ignoring validation" in line for line in said)
    for splits in (["train", "dev"], ["train", None], [0, 1]):
        with pytest.raises(DataError, match=f"row {int(splits[0] != 0)}: split is .*, none of train, test and"):
            opened(table(tmp_path / "all.parquet", {"label": [0, 1], "split": splits}), tmp_path)
    with pytest.raises(DataError, match="no rows of train, but test"):
        opened(table(tmp_path / "all.parquet", {"label": [0, 1], "split": ["test"] * 2}), tmp_path)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00002"], "train-00001-of-00002.parquet"),
        (["train-00001-of-00003-0123abcd", "train-00000-of-00003-4567cdef"], "train-00002-of-00003.parquet"),
        (["train-00001-of-00001", "test_2_of_2"], "test_1_of_2.parquet"),
        (["train-00000-of-00001", "test-00000-of-99999999999"], "test-00000000001-of-99999999999.parquet"),
        (["data/train-00000-of-00002", "other/train-00001-of-00002"], "data/train-00001-of-00002.parquet"),
    ],
)
def test_a_missing_part_is_named(tmp_path, names, missing):
    for name in names:
        table(tmp_path / "hub" / f"{name}.parquet", {"label": [0, 1]})
    with pytest.raises(DataError, match=f"hub: {missing} is missing"):
        opened(tmp_path / "hub", tmp_path)
    with pytest.raises(DataError, match="is missing"):
        opened(tar(tmp_path / "hub.tar", tmp_path / "hub", mode="w"), tmp_path)


def test_a_part_given_alone(tmp_path):
    source = table(tmp_path / "hub" / "train-00000-of-00002.parquet", {"label": [0, 1]})
    with pytest.raises(DataError, match="parquet: train-00001-of-00002.parquet is missing, by the names"):
        opened(source, tmp_path)
    table(tmp_path / "hub" / "train-00001-of-00002.parquet", {"label": [0, 1]})
    with pytest.raises(DataError, match="is one part of several, such as train-00001-of-00002.parquet; give the fol"):
        opened(source, tmp_path)
    assert len(opened(tmp_path / "hub", tmp_path, test_fraction=0.5).train) == 2


@pytest.mark.parametrize("name", ["train-00000-of-00002.npz", "train-00000-of-00002.tar"])
def test_a_part_of_another_form(tmp_path, name):
    if name.endswith("npz"):
        np.savez(tmp_path / name, images=pixels(4, 1), labels=np.arange(4) % 2)
    else:
        class_folders(tmp_path / "pets")
        tar(tmp_path / name, tmp_path / "pets", mode="w")
    with pytest.raises(DataError, match=f"{name}: {name.replace('00000-of', '00001-of')} is missing"):
        opened(tmp_path / name, tmp_path)
