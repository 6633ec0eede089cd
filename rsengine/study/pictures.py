"""The pictures of a study: test accuracy along training, and results with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsengine.run.log import accuracy
from rsengine.run.page import shortened
from rsengine.run.plots import BLUE, GREEN, GREY, INK, PURPLE, VERMILION, WIDTH, new_figure, save_figure, text_width
from rsengine.study.results import VariantResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE, INTERVALS_FILE = "curves.png", "intervals.png"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#56B4E9")  # those of Okabe and Ito, as in rsengine.run.plots
DASHES = ("-", "--", ":", "-.")
_LONGEST = 36  # characters of a name


def curve(result: VariantResult, value: Any = accuracy) -> list[tuple[int, list[float]]]:
    """(epoch, values of the trials that are done) for each epoch that all of them evaluated."""
    trials = [{record["epoch"]: value(record) for record in each.epochs} for each in result.trials if each.is_done]
    epochs = sorted(set.intersection(*(set(trial) for trial in trials))) if trials else []
    points = [(epoch, [trial[epoch] for trial in trials]) for epoch in epochs]
    return [(epoch, values) for epoch, values in points if None not in values]


def draw_curves(results: Sequence[VariantResult], path: Path) -> None:
    """Draw the mean test accuracy of each variant along training, in a band from the lowest to the highest seed.

    Args:
        results: some of which have trials that are done.
    """
    with new_figure(WIDTH, 760) as figure:
        axes = figure.add_axes((0.085, 0.09, 0.645, 0.85))
        for i, result in enumerate(results):
            points = curve(result)
            if not points:
                continue
            epochs = [epoch for epoch, _ in points]
            scaled = [[100 * value for value in values] for _, values in points]
            colour = COLOURS[i % len(COLOURS)]
            lows, highs = ([choose(values) for values in scaled] for choose in (min, max))
            axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15, linewidth=0)
            how = {"color": colour, "linestyle": DASHES[i // len(COLOURS) % len(DASHES)], "linewidth": 1.8}
            marker = {"marker": "o", "markersize": 3} if len(points) <= 15 else {}
            axes.plot(
                epochs,
                list(map(statistics.fmean, scaled)),
                label=shortened(result.variant.name, _LONGEST),
                **how,
                **marker,
            )
        axes.set_xlabel("Epoch")
        axes.set_ylabel("Test accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
        axes.set_title("Mean over the seeds, and the range of the seeds", loc="left", fontsize=10)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        save_figure(figure, path)


def draw_intervals(results: Sequence[VariantResult], path: Path) -> None:
    """Draw each variant's accuracy, and its difference to the variant it is compared with: a dot a seed, the mean, the
    95 % interval, and what was reported.

    Args:
        results: some of which have trials that are done.
    """
    height = 170 + 46 * len(results)
    with new_figure(WIDTH, height) as figure:
        bottom, top = 70 / height, 1 - 50 / height
        labels = [shortened(result.variant.name, _LONGEST) for result in results]
        edge = (max(text_width(label, 10) for label in labels) + 40) / WIDTH
        width = (1 - edge - 0.06) / 2
        left = figure.add_axes((edge, bottom, width, top - bottom))
        right = figure.add_axes((edge + width + 0.04, bottom, width, top - bottom), sharey=left)
        names = {result.variant.name: result for result in results}
        for row, result in enumerate(results):
            dots = [100 * result.accuracy[seed] for seed in sorted(result.accuracy)]
            interval = result.summary.interval if result.summary else None
            _row(left, row, dots, interval, BLUE, result.variant.accuracy)
            reference = names.get(result.variant.reference or "")
            if reference is None:
                continue
            seeds = sorted(result.accuracy.keys() & reference.accuracy.keys())
            dots = [100 * (result.accuracy[seed] - reference.accuracy[seed]) for seed in seeds]
            interval = result.difference.interval if result.difference else None
            _row(right, row, dots, interval, VERMILION, result.variant.difference)
        right.axvline(0.0, color=GREY, linewidth=1)
        left.set_yticks(range(len(results)), labels)
        left.set_ylim(len(results) - 0.5, -0.5)
        right.tick_params(labelleft=False)
        for axes, words in ((left, "Test accuracy (%)"), (right, "Paired difference (percentage points)")):
            axes.set_xlabel(words)
            axes.grid(True, axis="x")
        words = "Small dots: seeds; large dot: mean; bar: 95 % interval of the mean"
        if any(value is not None for each in results for value in (each.variant.accuracy, each.variant.difference)):
            words += "; diamond: reported"
        left.set_title(words, loc="left", fontsize=10)
        save_figure(figure, path)


def _row(
    axes: Axes,
    row: int,
    dots: Sequence[float],
    interval: tuple[float, float] | None,
    colour: str,
    reported: float | None,
) -> None:
    if interval:
        axes.plot([100 * value for value in interval], [row, row], color=colour, linewidth=3, alpha=0.35)
    if dots:
        axes.plot(dots, [row + 0.22] * len(dots), "o", color=GREY, markersize=3)
        axes.plot([statistics.fmean(dots)], [row], "o", color=colour, markersize=7)
    if reported is not None:
        axes.plot([reported], [row], "D", markerfacecolor="none", markeredgecolor=INK, markersize=6)
