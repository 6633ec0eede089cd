"""The pictures of a run folder: training curves, confusion matrix, grids of images. Other pictures share their style
by :func:`new_figure`, :func:`save_figure` and the colours.

Matplotlib is used through its object interface only, without pyplot: no global figures and no display are needed, and
importing this module does not import matplotlib. Every picture is written to a temporary file and renamed.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsengine.run.files import write_atomically
from rsengine.run.lettering import BASE, DPI, Lettering, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 1260

# Okabe and Ito's palette: told apart with any of the common colour deficiencies, and in print.
GREEN, VERMILION, BLUE, PURPLE = "#009E73", "#D55E00", "#0072B2", "#CC79A7"
INK, GREY = "#222222", "#808080"
_TRAIN, _TEST, _EMA = GREEN, VERMILION, BLUE
_FAINT = "#BCD9CE"  # the train colour, pale

# Everything that a user's matplotlibrc could change for the worse.
_STYLE: dict[str, Any] = {
    "font.family": [BASE],
    "font.size": 10.0,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # a class called "$5" is no formula
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "savefig.dpi": "figure",
}


def curves(
    epochs: Sequence[Mapping[str, Any]], intervals: Sequence[Mapping[str, Any]], path: Path | None, *, title: str
) -> Figure:
    """Draw loss, accuracy and learning rate against epochs: 1260 pixels wide, three panels over one axis.

    Args:
        epochs: the run log's ``epoch`` records, in order; fields may be missing or None and are then not drawn.
        intervals: its ``interval`` records, in order, or nothing. They give a faint train line beneath the epochs'
            and the learning rate's fine steps.
        path: the PNG to write; None writes none.
        title: printed above.

    Raises:
        ValueError: both lists are empty.
    """
    if not epochs and not intervals:
        raise ValueError("curves: expected at least one epoch or interval record, got none")
    letters = Lettering([title])
    with new_figure(WIDTH, 1320, letters.families) as figure:
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1.5]})
        # Fixed margins: every run's picture has its panels in the same place, so two of them can be compared.
        figure.subplots_adjust(left=0.093, right=0.892, top=0.917, bottom=0.055, hspace=0.085)
        last_epoch = max(float(record["epoch"]) for record in (*epochs, *intervals))
        # The dashes lie on top: they leave a line beneath them visible, a full line does not.
        dashes = {"color": _TRAIN, "linewidth": 1.4, "linestyle": "--", "zorder": 2.5}
        for axes, field, scale in ((loss, "loss", 1.0), (accuracy, "accuracy", 100.0)):
            _line(axes, intervals, f"train_{field}", scale, color=_FAINT, linewidth=0.8, label="train, each interval")
            _line(axes, epochs, f"train_{field}", scale, label="train", **dashes)
            _line(axes, epochs, f"test_{field}", scale, color=_TEST, linewidth=1.4, label="test, raw weights")
            _line(axes, epochs, f"test_{field}_ema", scale, color=_EMA, linewidth=2.4, label="test, EMA weights")
        _line(rate, intervals or epochs, "learning_rate", 1.0, color=INK, linewidth=1.5)

        loss.set_ylabel("Loss")
        accuracy.set_ylabel("Accuracy (%)")
        rate.set_ylabel("Learning rate")
        rate.set_xlabel("Epoch")
        low, high = accuracy.get_ylim()
        if high - low < 4.0:  # hundredths of a percentage point are not worth a panel
            high = min((low + high) / 2 + 2.0, 100.5)
            accuracy.set_ylim(high - 4.0, high)
        # Zero at the bottom, with just enough below it for the line's own width.
        rate.set_ylim(-0.03 * rate.get_ylim()[1], rate.get_ylim()[1])
        rate.set_xlim(0.0, last_epoch)
        rate.xaxis.get_major_locator().set_params(integer=True)
        for axes in (loss, accuracy, rate):
            axes.grid(True)
        _annotate_last(accuracy, epochs)

        figure.align_ylabels()
        middle = (0.093 + 0.892) / 2
        heading = _short(letters.drawable(title), 90)
        figure.text(middle, 0.979, heading, fontsize=13, fontweight="bold", ha="center", va="center")
        # One legend for all panels, outside them: inside, some run's curve would sooner or later pass behind it.
        handles = {line.get_label(): line for axes in (loss, accuracy) for line in axes.get_lines()}
        if handles:
            legend = figure.legend(
                handles.values(),
                handles.keys(),
                loc="center",
                bbox_to_anchor=(middle, 0.944),
                ncols=4,
                handlelength=2.4,
                columnspacing=2.2,
            )
            for line in legend.get_lines():
                line.set_linewidth(max(line.get_linewidth(), 1.4))
        if path is not None:
            save_figure(figure, path)
    return figure


def confusion(matrix: np.ndarray, path: Path, *, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix, each row in percent of its true class.

    Colours follow the square root of the percentage, because the errors worth seeing are a few percent. Up to 20
    classes every cell that is not zero carries its number; beyond, only as many class names as can be read are shown.

    Args:
        matrix: (C, C) integers or floats >= 0: images of true class (row) predicted as class (column).
        path: the PNG to write.
        classes: the C class names.
        title: printed above.

    Raises:
        ValueError: the matrix is not square, is empty, has a negative or non-finite entry, or ``classes`` has another
            length.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"matrix: expected (C, C) with C >= 1, got shape {counts.shape}")
    size = len(counts)
    if len(classes) != size:
        raise ValueError(f"classes: expected {size} names for a {size} x {size} matrix, got {len(classes)}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("matrix: expected finite counts >= 0")
    totals = counts.sum(axis=1, keepdims=True)
    # A class without test images has no percentages: NaN, drawn grey, rather than a row of zeros.
    percent = np.divide(100.0 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)

    letters = Lettering([*classes, title])
    names = [_short(letters.drawable(name), 18) for name in classes]
    step = math.ceil(size / 50)
    fontsize = 10 if size <= 14 else 8.5 if size <= 30 else 7
    # A whole number of pixels a class, so that no cell is wider than its neighbour and none is dropped.
    side = size * max(1, round(900 / size)) if size <= 1000 else 1000
    name_px = max(letters.width(name, fontsize) for name in names[::step])
    left, right, top = 74 + name_px, 164, 74
    bottom = 66 + (name_px if size > 20 else 0.72 * name_px + 14)
    page_w, page_h = math.ceil(left + side + right), math.ceil(top + side + bottom)

    with new_figure(page_w, page_h, letters.families) as figure:
        from matplotlib import colormaps
        from matplotlib.colors import PowerNorm

        def box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
            return x / page_w, 1 - (y + height) / page_h, width / page_w, height / page_h

        axes = figure.add_axes(box(round(left), top, side, side))
        colours = colormaps["Blues"].with_extremes(bad="#DDDDDD")
        smooth = "nearest" if size <= 1000 else "antialiased"
        image = axes.imshow(percent, cmap=colours, norm=PowerNorm(0.5, 0.0, 100.0), interpolation=smooth, aspect="auto")
        bar_axes = figure.add_axes(box(round(left) + side + 26, top, 30, side))
        bar = figure.colorbar(image, cax=bar_axes, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
        bar.set_label("% of the true class")
        bar.outline.set_visible(False)

        ticks = np.arange(0, size, step)
        tilt = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if size <= 20 else {"rotation": 90}
        axes.set_xticks(ticks, names[::step], fontsize=fontsize, **tilt)
        axes.set_yticks(ticks, names[::step], fontsize=fontsize)
        axes.spines[:].set_visible(False)
        if size <= 20:
            axes.tick_params(length=0)
            axes.set_xticks(np.arange(1, size) - 0.5, minor=True)
            axes.set_yticks(np.arange(1, size) - 0.5, minor=True)
            axes.grid(True, which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="minor", length=0)
            _number_cells(axes, percent)
        middle = (left + side / 2) / page_w
        figure.text(24 / page_w, 1 - (top + side / 2) / page_h, "True class", rotation=90, ha="center", va="center")
        figure.text(middle, 24 / page_h, "Predicted class", ha="center", va="center")
        bold = {"fontsize": 13, "fontweight": "bold", "ha": "center", "va": "center"}
        figure.text(middle, 1 - 38 / page_h, _short(letters.drawable(title), 80), **bold)
        save_figure(figure, path)


def image_grid(
    rows: Sequence[tuple[str, np.ndarray]],
    path: Path,
    *,
    titles: Sequence[str],
    captions: Sequence[Sequence[str]] = (),
    title: str,
) -> None:
    """Draw rows of images, each with its label on the left, e.g. originals above their augmented versions.

    Every pixel becomes a square of whole screen pixels (images too large for that are thinned by a whole factor), so
    that what a network sees is shown unsmoothed.

    Args:
        rows: (label, images) pairs; images is uint8 (N, H, W, 3), RGB, N and H and W >= 1 and equal in all rows.
        path: the PNG to write, at most about 1400 pixels wide.
        titles: N texts above the columns, e.g. class names.
        captions: N texts a row, of one line or several, below the images, e.g. what was done to each; or nothing.
        title: printed above.
    """
    number, _, width = rows[0][1].shape[:3]
    # The layout is counted in pixels and the images are placed unscaled: axes would resample them.
    edge, gap = 24, 8
    letters = Lettering([title, *titles, *(label for label, _ in rows), *itertools.chain(*captions)])
    labels = ["\n".join(textwrap.wrap(_short(letters.drawable(label), 60), 16)) for label, _ in rows]
    label_px = max(letters.width(label, 10) for label in labels)
    left = edge + (math.ceil(label_px) + 14 if label_px else 0)
    room = (1400 - left - edge - gap * (number - 1)) / number
    grow = min(max(1, int(room // width)), 8)
    thin = max(1, math.ceil(width / max(room, 1)))
    cells = [images[:, ::thin, ::thin].repeat(grow, axis=1).repeat(grow, axis=2) for _, images in rows]
    cell_h, cell_w = cells[0].shape[1:3]
    top = edge + 96
    lines = max((text.count("\n") + 1 for texts in captions for text in texts), default=0)
    pitch = cell_h + gap + 14 * lines
    page_w = max(left + number * (cell_w + gap) - gap + edge, 480)
    page_h = top + len(rows) * pitch - gap + edge

    with new_figure(page_w, page_h, letters.families) as figure:

        def text(x: float, y: float, words: str, **how: Any) -> None:
            figure.text(x / page_w, 1 - y / page_h, words, **how)

        words = _short(letters.drawable(title), 90)
        size = letters.fitting(words, page_w - 2 * edge, largest=13, bold=True)
        text(page_w / 2, edge + 18, words, ha="center", va="center", fontweight="bold", fontsize=size)
        for row, (label, images) in enumerate(zip(labels, cells, strict=True)):
            y = top + row * pitch
            text(left - 14, y + cell_h / 2, label, ha="right", va="center", linespacing=1.25)
            for column, image in enumerate(images):
                x = left + column * (cell_w + gap)
                figure.figimage(image, x, page_h - y - cell_h, origin="upper")
                if captions:
                    below = [_short(letters.drawable(line), 30) for line in captions[row][column].split("\n")]
                    size = min(letters.fitting(line, 0.9 * cell_w, largest=6.5) for line in below)
                    text(x, y + cell_h + 2, "\n".join(below), ha="left", va="top", fontsize=size, linespacing=1.1)
        # One size for all titles, the one at which the longest fits.
        above = [_short(letters.drawable(words), 24) for words in titles]
        size = min(letters.fitting(words, cell_w + gap - 4, largest=10) for words in above)
        for column, words in enumerate(above):
            x = left + column * (cell_w + gap) + cell_w / 2
            text(x, top - 8, words, ha="center", va="bottom", fontsize=size)
        save_figure(figure, path)


@contextmanager
def new_figure(width: int, height: int, families: Sequence[str] = (BASE,)) -> Iterator[Figure]:
    """Open an empty figure of ``width`` x ``height`` pixels, with this module's style for as long as it is drawn on.

    ``families``: names of fonts, see :class:`Lettering`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"font.family": list(families)}):
        # The hundredth of a pixel keeps a product such as 1259.9999 from being cut to 1259.
        figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure


def _line(axes: Axes, records: Sequence[Mapping[str, Any]], field: str, scale: float, **how: Any) -> None:
    """Draw one field over epochs. Records without it are left out, so the line bridges epochs not evaluated."""
    points = [(float(record["epoch"]), scale * record[field]) for record in records if _finite(record.get(field))]
    if not points:
        return
    if len(points) <= 15:
        how = {**how, "marker": "o", "markersize": 2.0 + 1.4 * how["linewidth"]}
    axes.plot(*zip(*points, strict=True), clip_on=False, solid_joinstyle="round", **how)


def _annotate_last(axes: Axes, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Write the last EMA test accuracy (without EMA, the raw one) beside the end of its line."""
    for field, colour in (("test_accuracy_ema", _EMA), ("test_accuracy", _TEST)):
        points = [(float(record["epoch"]), 100.0 * record[field]) for record in epochs if _finite(record.get(field))]
        if points:
            axes.annotate(
                f"{points[-1][1]:.2f} %",
                points[-1],
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
                annotation_clip=False,
            )
            return


def _number_cells(axes: Axes, percent: np.ndarray) -> None:
    size = 10 if len(percent) <= 10 else 9 if len(percent) <= 12 else 7 if len(percent) <= 16 else 6
    for (row, column), value in np.ndenumerate(percent):
        if not value > 0:  # zero, or NaN for a class without images
            continue
        # Rounding makes no cell empty or perfect that is not.
        words = "<0.1" if value < 0.05 else "100" if value == 100 else f"{min(value, 99.9):.1f}"
        colour = "white" if value > 35 else INK
        weight = "bold" if row == column else "normal"
        axes.text(column, row, words, ha="center", va="center", fontsize=size, color=colour, fontweight=weight)


def text_width(words: str, size: float, *, bold: bool = False) -> float:
    """Pixels that the widest line of ``words``, in Latin letters, takes at font size ``size``."""
    return Lettering().width(words, size, bold=bold)


def _short(words: str, length: int) -> str:
    """``words`` in one line of at most ``length`` columns, of which Chinese, Japanese and Korean letters take two."""
    words = plain(words)
    columns = list(itertools.accumulate(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in words))
    if not words or columns[-1] <= length:
        return words
    return words[: sum(column < length for column in columns)].rstrip() + "…"


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the PNG under a temporary name in the same folder and rename it: never a half-written picture."""
    picture = io.BytesIO()
    # No software tag: the same data give the same bytes with the next matplotlib that draws the same.
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
