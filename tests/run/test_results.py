"""Predictions as files, and what comes out for labelled pictures."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from rsengine.errors import SettingsError
from rsengine.run.mistakes import MOST
from rsengine.run.results import Labelled, best_of, results_file

CLASSES = ("cat", "猫, big", "dog")
ROWS = [("a.png", None, [0.2, 0.5, 0.3]), ("b\n\udcff.png", 2, [0.6, 0.1, 0.3])]


def write(path, rows=ROWS, top=2):
    with results_file(path, CLASSES, top) as row:
        for name, label, shares in rows:
            row(name, label, np.array(shares, np.float32))


def test_a_table(tmp_path):
    write(tmp_path / "deep" / "x.csv")
    with open(tmp_path / "deep" / "x.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "true", "class_1", "probability_1", "class_2", "probability_2"]
    assert rows[0] == ["a.png", "", "猫, big", "0.5", "dog", "0.3"]
    assert rows[1] == ["b\n\\udcff.png", "dog", "cat", "0.6", "dog", "0.3"]


def test_a_list(tmp_path):
    write(tmp_path / "x.json")
    first, second = json.loads((tmp_path / "x.json").read_text())
    best = [{"class": "猫, big", "probability": 0.5}, {"class": "dog", "probability": 0.3}]
    assert first == {"image": "a.png", "true": None, "classes": best}
    assert second["image"] == ROWS[1][0] and second["true"] == "dog"
    write(tmp_path / "none.json", rows=[])
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_an_array(tmp_path):
    write(tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.array([shares for *_, shares in ROWS], np.float32))
    write(tmp_path / "none.npy", rows=[])
    assert np.load(tmp_path / "none.npy").shape == (0, 3)


def test_an_interrupted_one_leaves_the_old_file(tmp_path):
    write(tmp_path / "x.csv")
    before = (tmp_path / "x.csv").read_bytes()
    with pytest.raises(KeyboardInterrupt), results_file(tmp_path / "x.csv", CLASSES, 1) as row:
        row("c.png", None, np.ones(3))
        raise KeyboardInterrupt
    assert (tmp_path / "x.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="--out .*x.txt: expected a name that ends in .csv, .npy, .json"):
        write(tmp_path / "x.txt")


def test_the_best_are_in_order_and_equal_ones_too():
    assert best_of(np.array([0.25, 0.5, 0.25]), 3) == [(1, 0.5), (0, 0.25), (2, 0.25)]


def labelled(*pairs, classes=CLASSES):
    """Of (true, predicted, probability)."""
    found = Labelled(classes)
    for true, predicted, share in pairs:
        probabilities = np.full(len(classes), (1 - share) / (len(classes) - 1))
        probabilities[predicted] = share
        found.add(np.full((8, 8, 3), round(255 * share), np.uint8), true, probabilities)
    return found


def test_accuracy_and_confusion_matrix():
    found = labelled((0, 0, 0.9), (0, 1, 0.8), (1, 1, 0.7), (2, 0, 0.6))
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    first, _, *rows = found.lines()
    assert first == "accuracy 50.00% on 4 labelled images"
    assert [row.split()[-3:] for row in rows] == [["1", "1", "0"], ["0", "1", "0"], ["1", "0", "0"]]


def test_of_many_classes_the_most_frequent_confusions():
    found = labelled((30, 4, 0.9), (30, 4, 0.9), (1, 2, 0.9), (5, 5, 0.9), classes=[f"c{i}" for i in range(40)])
    assert list(found.lines())[1:] == ["  c30 taken for c4: 2", "  c1 taken for c2: 1"]


def test_the_pictures_show_the_most_confident_mistakes(tmp_path, monkeypatch):
    from rsengine.run import plots

    seen, plain = [], plots.image_grid
    monkeypatch.setattr(plots, "image_grid", lambda rows, *a, **k: (seen.append((rows, k)), plain(rows, *a, **k)))
    shares = np.linspace(0.5, 0.99, MOST + 8).tolist()
    found = labelled((0, 0, 0.999), *((0, 1, share) for share in shares))
    assert [path.name for path in found.draw(tmp_path)] == ["confusion.png", "mistakes.png"]
    assert all(Image.open(tmp_path / name).width > 400 for name in ("confusion.png", "mistakes.png"))
    rows, said = seen[0]
    drawn = np.concatenate([images for _, images in rows])[:, 0, 0, 0]
    assert drawn.tolist() == [round(255 * share) for share in sorted(shares, reverse=True)[:MOST]]
    assert said["captions"][0][0].splitlines() == ["猫, big 99%", "true: cat"] or "#2" in said["captions"][0][0]


@pytest.mark.parametrize("mistakes", [0, 1, 7])
def test_few_mistakes_or_none(tmp_path, mistakes):
    found = labelled((0, 0, 0.9), *[(2, 0, 0.8)] * mistakes)
    assert len(found.draw(tmp_path)) == (2 if mistakes else 1)
