"""Pictures: right size, drawn from the data they are given, readable at the edges, and never half-written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsengine.run import files, plots

RNG = np.random.default_rng(0)


def _pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def _has(pixels: np.ndarray, colour: str) -> bool:
    """Whether a colour, as #RRGGBB, is among the pixels unblended."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((pixels == rgb).all(axis=-1).any())


def _epochs(number: int, *, ema: bool = True) -> list[dict]:
    return [
        {
            "epoch": e,
            "train_loss": 2 / e,
            "train_accuracy": 1 - 0.7 / e,
            "test_loss": 2.2 / e,
            "test_accuracy": 1 - 0.8 / e,
            "test_loss_ema": 2.4 / e if ema else None,
            "test_accuracy_ema": 1 - 0.85 / e if ema else None,
            "learning_rate": 0.1 * (1 - e / number),
        }
        for e in range(1, number + 1)
    ]


def _intervals(number: int, per: int) -> list[dict]:
    times = [(i + 1) / per for i in range(number * per)]
    return [{"epoch": t, "train_loss": 2.5 / t, "train_accuracy": t / number, "learning_rate": 0.1} for t in times]


def test_curves_show_every_line_and_change_with_the_data(tmp_path):
    path = tmp_path / "curves.png"
    plots.curves(_epochs(10), _intervals(10, 4), path, title="ten epochs")
    first = _pixels(path)
    assert first.shape == (1320, 1260, 3)
    assert all(_has(first, colour) for colour in (plots._TRAIN, plots._TEST, plots._EMA, plots._FAINT))
    assert 0.02 < (first != 255).any(axis=-1).mean() < 0.5

    plots.curves(_epochs(10), _intervals(10, 4), path, title="ten epochs")
    assert (_pixels(path) == first).all(), "the same data draw the same picture"
    assert os.listdir(tmp_path) == ["curves.png"]


def test_curves_follow_every_changed_number(tmp_path):
    def draw(**changed):
        records = _epochs(9)
        records[4].update(changed)
        plots.curves(records, [], tmp_path / "curves.png", title="nine epochs")
        return _pixels(tmp_path / "curves.png").astype(int)

    full = draw()
    for field in ("train_loss", "test_loss_ema", "learning_rate"):
        assert (draw(**{field: 0.05}) != full).any(), field
    holed, zeroed = draw(test_accuracy=None), draw(test_accuracy=0.0)
    assert 0 < (holed != full).sum() < (zeroed != full).sum(), "a null is bridged, not drawn as zero"


def test_curves_without_ema_draw_no_ema_line(tmp_path):
    plots.curves(_epochs(10, ema=False), [], tmp_path / "a.png", title="EMA off")
    pixels = _pixels(tmp_path / "a.png")
    assert _has(pixels, plots._TEST)
    assert not _has(pixels, plots._EMA)
    assert not _has(pixels, plots._FAINT), "no intervals"


@pytest.mark.parametrize(
    ("epochs", "intervals"),
    [
        (_epochs(1, ema=False), _intervals(1, 1)),
        ([], _intervals(1, 3)[:2]),  # stopped within the first epoch
        ([{"epoch": 1, "train_loss": None}], []),  # diverged at once
        ([{"epoch": 1, "test_accuracy": float("nan"), "test_loss": float("inf")}], []),
    ],
    ids=["one-epoch", "no-epoch", "nulls", "not-finite"],
)
def test_curves_of_hardly_any_data(tmp_path, epochs, intervals):
    plots.curves(epochs, intervals, tmp_path / "a.png", title="few")
    assert _pixels(tmp_path / "a.png").shape == (1320, 1260, 3)


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plots.curves([], [], tmp_path / "a.png", title="")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, 10, 17, 100, 1000])
def test_confusion_of_any_number_of_classes(tmp_path, size):
    matrix = RNG.integers(0, 3, (size, size)) + 40 * np.eye(size, dtype=np.int64)
    path = tmp_path / "confusion.png"
    plots.confusion(matrix, path, classes=[f"class number {i}" for i in range(size)], title=f"{size} classes")
    height, width, _ = _pixels(path).shape
    assert 1000 <= width <= 1400
    assert 1000 <= height <= 1400


def test_confusion_is_normalised_by_rows(tmp_path):
    matrix = RNG.integers(0, 30, (4, 4))
    names = list("abcd")

    def draw(counts, name):
        plots.confusion(counts, tmp_path / name, classes=names, title="t")
        return _pixels(tmp_path / name)

    first = draw(matrix, "a.png")
    assert (draw(matrix * np.arange(1, 5)[:, None], "b.png") == first).all(), "more images, the same percentages"
    assert (draw(matrix * np.arange(1, 5)[None, :], "c.png") != first).any()
    assert (draw(matrix.T, "d.png") != first).any(), "rows are the true class"


def test_confusion_leaves_zero_cells_blank_and_marks_a_class_without_images(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    words = []
    real = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: words.append((x, y, s)) or real(self, x, y, s, **k))
    matrix = np.array([[9995, 4, 1], [0, 10, 0], [0, 0, 0]])
    plots.confusion(matrix, tmp_path / "a.png", classes=["x", "$y$", "z"], title="t")
    # 0.04 % and 0.01 % are not nothing, so they are not written as 0.0.
    assert words == [(0, 0, "99.9"), (1, 0, "<0.1"), (2, 0, "<0.1"), (1, 1, "100")]
    assert _has(_pixels(tmp_path / "a.png"), "#DDDDDD")


@pytest.mark.parametrize(
    ("matrix", "classes", "match"),
    [
        (np.zeros((2, 3)), ["a", "b"], r"expected \(C, C\)"),
        (np.zeros((0, 0)), [], r"expected \(C, C\)"),
        (np.eye(3), ["a", "b"], "expected 3 names"),
        (-np.eye(2), ["a", "b"], ">= 0"),
        (np.full((2, 2), np.nan), ["a", "b"], "finite"),
    ],
)
def test_confusion_refuses_what_is_no_confusion_matrix(tmp_path, matrix, classes, match):
    with pytest.raises(ValueError, match=match):
        plots.confusion(matrix, tmp_path / "a.png", classes=classes, title="")
    assert os.listdir(tmp_path) == []


def test_image_grid_shows_every_pixel_as_a_crisp_square(tmp_path):
    # 5 x 7: an image that is not square shows an exchange of height and width.
    before, after = RNG.integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    path = tmp_path / "augmented.png"
    plots.image_grid([("original", before), ("augmented", after)], path, titles=["a", "b", "c"], title="t")
    pixels = _pixels(path)
    for image in (*before, *after):
        big = image.repeat(8, axis=0).repeat(8, axis=1)
        found = [
            (y, x)
            for y, x in np.argwhere((pixels == image[0, 0]).all(axis=-1))
            if np.array_equal(pixels[y : y + 40, x : x + 56], big)
        ]
        assert len(found) == 1


def test_image_grid_of_cifar_size_has_docs_width(tmp_path):
    images = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    plots.image_grid(
        [("original", images), ("a rather long label", images)], tmp_path / "a.png", titles=["a"] * 10, title="t"
    )
    height, width, _ = _pixels(tmp_path / "a.png").shape
    assert 1000 <= width <= 1400
    assert height > 2 * 96


def test_image_grid_thins_large_images(tmp_path):
    images = np.zeros((8, 300, 300, 3), dtype=np.uint8)
    plots.image_grid([("", images)], tmp_path / "a.png", titles=["a title much too long for its column"] * 8, title="t")
    assert 1000 <= _pixels(tmp_path / "a.png").shape[1] <= 1400


def test_image_grid_writes_captions_below_their_images(tmp_path):
    images = np.full((2, 32, 32, 3), 255, np.uint8)  # white as the page: what is dark is text
    rows = [("", images), ("", images)]
    plots.image_grid(rows, tmp_path / "plain.png", titles=["a", "b"], title="t")
    captions = [["", ""], ["rotate 9\ncolor -0.5", ""]]
    plots.image_grid(rows, tmp_path / "captions.png", titles=["a", "b"], captions=captions, title="t")
    plain, with_captions = _pixels(tmp_path / "plain.png"), _pixels(tmp_path / "captions.png")
    assert with_captions.shape[0] - plain.shape[0] == 2 * 2 * 14  # two lines under each row
    lower_left = with_captions[with_captions.shape[0] // 2 :, : with_captions.shape[1] // 2]
    lower_right = with_captions[with_captions.shape[0] // 2 :, with_captions.shape[1] // 2 :]
    assert lower_left[..., :3].min() < 128 and lower_right[..., :3].min() > 200


def test_names_are_cut_by_the_width_of_their_letters():
    assert plots._short("a b\n c", 5) == "a b c"
    assert plots._short("abcdefgh", 8) == "abcdefgh" and plots._short("abcdefghi", 8) == "abcdefg…"
    assert plots._short("日本語の", 8) == "日本語の" and plots._short("日本語のと", 8) == "日本語…"


def test_a_failed_write_leaves_the_old_picture_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plots.curves(_epochs(2), [], path, title="old")
    old = path.read_bytes()

    def refuse(*_):
        raise OSError("no rename today")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no rename"):
        plots.curves(_epochs(3), [], path, title="new")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["curves.png"]


def test_no_global_state_is_touched_and_the_import_is_cheap(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rsengine.run import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; matplotlib.rcParams['font.size'] = 31\n"
        # Asking for the backend would choose one, and import pyplot for it.
        "style = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = style()\n"
        "plots.curves([{'epoch': 1, 'train_loss': 1.0}], [], Path(sys.argv[1]), title='$x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert style() == before"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)
    plots.curves([{"epoch": 1, "train_loss": 1.0}], [], tmp_path / "b.png", title="$x")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes(), "a user's own style changes nothing"
