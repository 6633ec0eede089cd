"""The pictures of docs/speedrun.md: EMA accuracy against minutes, with every line labelled at its end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.speedrun.runs import Run, by_recipe
from rsengine.run import plots
from rsengine.run.log import accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AIM = 0.9119  # the report's accuracy, which the search wants to reach
TICKS = (30, 40, 50, 60, 70, 80, 85, 90, 92)
HEIGHT = 900
PALE = "#CFCFCF"


@dataclass(frozen=True)
class Label:
    """Words for the point (x, y) of the axes."""

    x: float
    y: float
    words: str
    colour: str


def frontier(runs: Sequence[Run]) -> list[Run]:
    """The runs that ended better than all that had ended before them, in the order of their minutes."""
    ordered = sorted(runs, key=lambda run: (run.minutes, -run.accuracy))
    best = [0.0, *accumulate((run.accuracy for run in ordered), max)]
    return [run for run, before in zip(ordered, best, strict=False) if run.accuracy > before]


def draw_attempts(runs: Sequence[Run], path: Path) -> None:
    """Draw every run in grey, and those of the :func:`frontier` in colour and with their names."""
    best = frontier(runs)
    with plots.new_figure(plots.WIDTH, HEIGHT) as figure:
        axes = _axes(figure, "EMA accuracy on the validation split (%)", runs)
        for run in runs:
            if run not in best:
                axes.plot(*_points(run), color=PALE, linewidth=1.0, marker="o", markersize=2.5)
        for run in best:
            axes.plot(*_points(run), color=plots.BLUE, linewidth=1.4, marker="o", markersize=3.5, zorder=3)
        ends = [Label(run.minutes, 100 * (1 - run.accuracy), run.name, plots.BLUE) for run in best]
        _label(axes, ends)
        axes.plot([end.x for end in ends], [end.y for end in ends], "o", color=plots.BLUE, markersize=6, zorder=4)
        plots.save_figure(figure, path)


def draw_test_set(runs: Sequence[Run], path: Path) -> None:
    """Draw each recipe as a line; one with several seeds as their mean in the band from the worst to the best."""
    with plots.new_figure(plots.WIDTH, HEIGHT) as figure:
        axes = _axes(figure, "EMA accuracy on the test set (%)", runs)
        colours = (plots.GREY, plots.GREEN, plots.VERMILION, plots.BLUE, plots.PURPLE, plots.INK)
        labels = []
        for number, (name, seeds) in enumerate(by_recipe(runs).items()):
            colour = colours[number % len(colours)]
            # Seeds have their evaluations after the same epochs; a run that was broken off has fewer.
            shared = min(len(run.epochs) for run in seeds)
            minutes, errors = np.array([[part[:shared] for part in _points(run)] for run in seeds]).transpose(1, 0, 2)
            middle, mean = minutes.mean(0), errors.mean(0)
            axes.plot(middle, mean, color=colour, linewidth=2.0, marker="o", markersize=4, zorder=3)
            if len(seeds) > 1:
                axes.fill_between(middle, errors.min(0), errors.max(0), color=colour, alpha=0.3, linewidth=0, zorder=2)
                name += f", {len(seeds)} seeds"
            ended = statistics.mean(run.accuracy for run in seeds)
            labels.append(Label(middle[-1], mean[-1], f"{name}: {ended:.2%}", colour))
        _label(axes, labels)
        plots.save_figure(figure, path)


def _axes(figure: Figure, label: str, runs: Sequence[Run]) -> Axes:
    """Axes for minutes and errors. Errors lie on a logarithmic axis: near the aim a tenth of a point counts."""
    axes = figure.add_axes((0.07, 0.09, 0.91, 0.89))
    axes.set_yscale("log")
    errors = [error for run in runs for error in _points(run)[1]]
    axes.set_ylim(1.1 * max(errors), 0.75 * min(errors))
    shown = [tick for tick in TICKS if 1.1 * max(errors) > 100 - tick > 0.75 * min(errors)]
    axes.set_yticks([100 - tick for tick in shown], [str(tick) for tick in shown])
    axes.minorticks_off()
    longest = max(run.minutes for run in runs)
    axes.set_xlim(0, 1.12 * longest)
    axes.set(xlabel="Minutes of training and evaluation", ylabel=label)
    axes.grid(True)
    axes.axhline(100 * (1 - AIM), color=plots.INK, linewidth=1.0, linestyle=":")
    axes.annotate(
        f"the aim: {AIM:.2%}", (0, 100 * (1 - AIM)), xytext=(6, 4), textcoords="offset points", va="bottom", fontsize=9
    )
    return axes


def _points(run: Run) -> tuple[list[float], list[float]]:
    """The minutes and the errors in percent at the run's evaluations."""
    epochs = run.epochs
    return [record["seconds"] / 60 for record in epochs], [100 * (1 - accuracy(record)) for record in epochs]


def _label(axes: Axes, labels: Sequence[Label], size: float = 9.0) -> None:
    """Write each label near its point, where it hides as little as possible of lines and nothing of other labels."""
    figure = axes.figure
    figure.draw_without_rendering()  # fixes where things lie
    drawn = np.concatenate([_dense(line.get_transform().transform(line.get_xydata())) for line in axes.get_lines()])
    frame = axes.get_window_extent()
    height = 1.5 * size * figure.dpi / 72
    taken = [text.get_window_extent().extents for text in axes.texts]
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    # Every other label may as well cover some lines as one of these points.
    drawn = np.concatenate([drawn, *[points] * 50])
    for label, (x, y) in zip(labels, points, strict=True):
        width = plots.text_width(label.words, size, bold=True) + 8
        choices = []
        for up in range(-6, 7):
            for left in (x + 10, x - width / 2, x - width - 10):
                left = min(max(left, frame.x0 + 4), frame.x1 - width)
                box = np.array([left, y + (up - 0.5) * height, left + width, y + (up + 0.5) * height])
                hidden = int(_inside(drawn, box).sum())
                forbidden = box[1] < frame.y0 or box[3] > frame.y1 or any(_overlap(box, other) for other in taken)
                distance = abs(up) * height + max(box[0] - x, x - box[2], 0)
                choices.append((1e6 * forbidden + hidden + 0.5 * distance, *box))
        box = np.array(min(choices)[1:])
        taken.append(box)
        middle = (box[:2] + box[2:]) / 2
        near = np.clip((x, y), box[:2], box[2:])
        if np.hypot(*(near - (x, y))) > height / 2:
            axes.plot(
                *axes.transData.inverted().transform([(x, y), near]).T, color=label.colour, linewidth=0.8, zorder=2
            )
        axes.annotate(
            label.words,
            axes.transData.inverted().transform(middle),
            ha="center",
            va="center",
            fontsize=size,
            fontweight="bold",
            color=label.colour,
            zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _dense(line: np.ndarray) -> np.ndarray:
    """Points two pixels apart along a line given by its corners."""
    parts = [line[-1:]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        steps = max(int(np.hypot(*(end - start)) / 2), 1)
        parts.append(start + (end - start) * np.linspace(0, 1, steps, endpoint=False)[:, None])
    return np.concatenate(parts)


def _inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    return ((points >= box[:2]) & (points <= box[2:])).all(1)


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:2] < other[2:]).all() and (other[:2] < one[2:]).all())
