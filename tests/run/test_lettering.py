"""Class names in any script: drawn by a font that has them, numbered where none has, and never a box or a warning."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from rsengine.run import lettering, plots

ROOT = Path(__file__).parents[2]
NAMES = ["猫", "犬 dog", "قطة", "straße", "🐱", "caf\udce9", "a\x01b", "\u3000"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts fonts of a test's own in the place of the machine's."""
    from matplotlib import font_manager

    paths = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_: paths)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])

    def forget():
        for function in (lettering._has, lettering._faces, lettering._installed):
            function.cache_clear()
        font_manager.fontManager._findfont_cached.cache_clear()

    def install(family, characters, *, empty=False):
        forget()
        paths.append(build_font(tmp_path / f"{len(paths)}.ttf", family, characters, empty=empty))

    forget()
    yield install
    forget()


def build_font(path, family, characters, *, empty):
    """A font in which each of ``characters`` is a full square, or nothing."""
    names = [".notdef", *(f"u{ord(c):04X}" for c in characters)]
    pen = TTGlyphPen(None)
    if not empty:
        pen.moveTo((100, 0))
        for point in ((100, 800), (900, 800), (900, 0)):
            pen.lineTo(point)
        pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    font.setupGlyf(dict.fromkeys(names, square))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(path)
    return str(path)


def test_names_that_no_font_has_are_numbered(installed):
    assert lettering.labels(NAMES) == ["#1", "#2", "قطة", "straße", "🐱", "#6", "#7", "#8"]
    assert lettering.Lettering(NAMES).families == ("DejaVu Sans",)
    assert lettering.Lettering().drawable("on 猫\n caf\udce9") == "on \\u732b caf\\udce9"


def test_installed_fonts_are_taken_for_what_the_first_lacks_the_fewest_first(installed):
    installed("One Cat", "猫")
    installed("Serif Both", "猫犬")
    installed("Sans Both", "猫犬")
    installed("Nothing of these", "字")
    assert lettering.labels(NAMES)[:3] == ["猫", "犬 dog", "قطة"]
    assert lettering.Lettering(["猫", "犬"]).families == ("DejaVu Sans", "Sans Both")
    assert lettering.Lettering(["dog"]).families == ("DejaVu Sans",)


@pytest.mark.parametrize(("family", "empty"), [("LastResort", False), (".LastResort", False), ("Adobe Blank 2", False),
                                               ("Images only", True)])  # fmt: skip
def test_fonts_that_draw_no_letters_are_not_taken(installed, family, empty):
    installed(family, "猫犬", empty=empty)
    assert lettering.labels(["猫", "犬"]) == ["#1", "#2"]


def test_a_file_that_is_no_font_is_passed_over(installed, tmp_path):
    installed("Cat", "猫")
    Path(tmp_path / "0.ttf").write_bytes(b"no font")
    assert lettering.labels(["猫"]) == ["#1"]


def draw_all(folder, names):
    images = np.zeros((len(names), 32, 32, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion(np.eye(len(names)), folder / "confusion.png", classes=names, title=" ".join(names))
        plots.image_grid([("猫 row", images)], folder / "grid.png", titles=names, captions=[names], title=names[0])
        plots.curves([{"epoch": 1, "train_loss": 1.0}], [], folder / "curves.png", title=" ".join(names))
    pictures = {}
    for name in ("confusion", "grid", "curves"):
        with Image.open(folder / f"{name}.png") as picture:
            pictures[name] = np.asarray(picture.convert("RGB"))
    return pictures


def test_pictures_of_any_names_are_drawn_without_a_warning(installed, tmp_path):
    before = draw_all(tmp_path, NAMES)
    installed("Both", "猫犬")
    after = draw_all(tmp_path, NAMES)
    assert all(before[name].shape != after[name].shape or (before[name] != after[name]).any() for name in before)


def test_a_character_of_another_font_is_drawn_and_measured_by_it(installed, tmp_path):
    installed("Square", "猫")
    letters = lettering.Lettering(["猫"])
    assert letters.width("猫", 10) == pytest.approx(0.8 * 10 * lettering.DPI / 72, rel=1e-3)
    with plots.new_figure(200, 100, letters.families) as figure:
        figure.text(0.5, 0.5, "猫", fontsize=10)
        plots.save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        dark = np.asarray(picture.convert("L")) < 64
    assert dark.sum() == pytest.approx((0.8 * 10 * lettering.DPI / 72) ** 2, rel=0.15)


def test_one_line_says_which_names_are_numbered(installed):
    said = []
    assert lettering.labels_said(["猫", "dog", "a\nb犬"], said.append) == ["#1", "dog", "#3"]
    (line,) = said
    assert "#1 猫, #3 a\\nb犬" in line and "fonts-noto-cjk" in line
    assert lettering.labels_said(["cat", "dog"], said.append) == ["cat", "dog"] and len(said) == 1


CHAIN = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
from rsengine import evaluate, predict, train
from rsengine.augment import __main__ as augment
from rsengine.data import convert
convert_main = sys.modules["rsengine.data.convert"].main
source, converted, run = sys.argv[1:]
small = ["--set", "train.batch_size=4", "--set", "model.blocks=[1]", "--set", "model.width_multiplier=0.25"]
for main, arguments in [
    (convert_main, [source, "--out", converted]),
    (train.main, ["--data", converted, "--recipe", "digits", "--epochs", "1", "--out", run, *small]),
    (train.main, ["--data", source, "--out", run, "--resume"]),
    (evaluate.main, [run, "--data", source]),
    (predict.main, [run, source]),
    (augment.main, ["--data", source, "--out", "augmented.png", "--images", "2", "--rows", "1"]),
]:
    assert main(arguments) == 0, (main, arguments)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text exist on Linux only")
@pytest.mark.parametrize("settings", [
    pytest.param({}, marks=pytest.mark.thorough),
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, marks=pytest.mark.thorough),
], ids=["as here", "ascii", "LC_ALL=C"])  # fmt: skip
def test_the_whole_way_of_class_folders_with_such_names(tmp_path, settings):
    """From the conversion to predictions: no traceback, no warning, and records in UTF-8 whatever the locale."""
    source = tmp_path / os.fsdecode("図 caf".encode() + b"\xe9")
    for split, count in (("train", 3), ("test", 1)):
        for name in NAMES[:6]:
            (source / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(os.fsencode(source / split / name) + b"/\xe9-%d.png" % i)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    run = tmp_path / os.fsdecode(b"run\xe9")
    command = [sys.executable, "-c", CHAIN, source, "converted-猫", run]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode(errors="replace")[-2000:]
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in report and ("猫" in report or "LC_ALL" in settings)
    assert done.stdout.count(b"/\\udce9-") == 24 and b"made again" not in done.stdout
