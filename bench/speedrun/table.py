"""`python -m bench.speedrun.table`: the runs kept in docs/attempts/ and docs/test-set/ as the end of docs/speedrun.md.

A kept run is a folder with what a run wrote: ``metrics.jsonl`` and, where rsengine ran it, ``recipe.toml``. Attempts
are of the validation split; to add one:

    python -m rsengine.train --data validation --recipe … --out attempt && mkdir docs/attempts/NAME
    cp attempt/metrics.jsonl attempt/recipe.toml docs/attempts/NAME && python -m bench.speedrun.table

`python -m bench.speedrun` makes the runs of the test set and adds them.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import write_section
from rsengine.config import Recipe
from rsengine.run.log import EPOCH, METRICS_FILE, RunLog

DOCUMENT = Path(__file__).parents[2] / "docs" / "speedrun.md"
ATTEMPTS, TEST_SET = DOCUMENT.parent / "attempts", DOCUMENT.parent / "test-set"
PICTURES = {ATTEMPTS: DOCUMENT.parent / "speedrun.png", TEST_SET: DOCUMENT.parent / "test-set.png"}
HEADING = "## On the test set"
MINUTES = (5, 10, 20, 40, 60)


@dataclass(frozen=True)
class Attempt:
    """A run: its name, its recipe where rsengine ran it, and the records of its epochs."""

    name: str
    recipe: Recipe | None
    epochs: Sequence[dict]

    @property
    def accuracy(self) -> float:
        """Of the average, at the end."""
        return _accuracy(self.epochs[-1])

    @property
    def training_minutes(self) -> float:
        """Without evaluation."""
        return sum(record["epoch_seconds"] for record in self.epochs) / 60

    def after(self, minutes: float) -> float | None:
        """Accuracy of the average at the last evaluation within ``minutes`` of training and evaluation; the raw
        network's where there is no average. None: the run had ended more than an epoch before, or not begun."""
        seconds = 60 * minutes
        done = [record for record in self.epochs if record["seconds"] <= seconds]
        longest = max(record["epoch_seconds"] + record["eval_seconds"] for record in self.epochs)
        if not done or self.epochs[-1]["seconds"] + longest < seconds:
            return None
        return _accuracy(done[-1])


def read(folder: Path) -> Attempt:
    recipe = folder / "recipe.toml"
    return Attempt(
        folder.name,
        Recipe.from_toml(recipe.read_text(encoding="utf-8"), str(recipe)) if recipe.exists() else None,
        RunLog(folder).records(EPOCH),
    )


def kept(folder: Path) -> list[Attempt]:
    """Those in the repository, by name."""
    return [read(path) for path in sorted(folder.glob("*")) if (path / METRICS_FILE).exists()]


def text(test_set: Sequence[Attempt], attempts: Sequence[Attempt]) -> str:
    """The end of the document: what it says of each kind of run."""
    lines = [
        HEADING,
        "",
        "`python -m bench.speedrun`: all 50,000 images to train on, the 10,000 of the test set to measure, each run "
        "alone on the machine. Minutes are of training and evaluation; the next column is of training alone.",
        "",
        *(_tables(test_set, PICTURES[TEST_SET]) if test_set else ["No run is kept yet."]),
        "",
        *_seeds(test_set),
        "## Attempts",
        "",
        "`python -m bench.speedrun.table`, from the runs in [attempts](attempts): each has its `recipe.toml` and "
        "`metrics.jsonl`. Accuracies are on the validation split.",
        "",
        *_tables(attempts, PICTURES[ATTEMPTS]),
    ]
    return "\n".join(lines) + "\n"


def _tables(attempts: Sequence[Attempt], picture: Path) -> list[str]:
    head = ["run", "network", "optimiser", "batch", "epochs", "minutes", "training", "images/s", "raw", "average"]
    lines = [
        f"![accuracy against minutes]({picture.name})",
        "",
        _row(head),
        "|---|---|---|" + "---:|" * (len(head) - 3),
    ]
    for attempt in attempts:
        last, recipe = attempt.epochs[-1], attempt.recipe
        speed = statistics.median(record["images_per_second"] for record in attempt.epochs)
        lines.append(
            _row(
                [
                    attempt.name,
                    network(recipe) if recipe else "timm's resnetrs50",
                    optimiser(recipe) if recipe else "SGD",
                    str(recipe.train.batch_size) if recipe else "128",
                    f"{last['epoch']}",
                    f"{last['seconds'] / 60:.1f}",
                    f"{attempt.training_minutes:.1f}",
                    f"{speed:.0f}",
                    _percent(last["test_accuracy"]),
                    _percent(last["test_accuracy_ema"]),
                ]
            )
        )
    lines += [
        "",
        "Accuracy (of the average) at the last evaluation within so many minutes:",
        "",
        _row(["run", *(f"{m} min" for m in MINUTES)]),
        "|---|" + "---:|" * len(MINUTES),
    ]
    return lines + [_row([a.name, *(_percent(a.after(m)) for m in MINUTES)]) for a in attempts]


def _seeds(attempts: Sequence[Attempt]) -> list[str]:
    """A sentence on each recipe that ran with several seeds."""
    recipes: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        recipes.setdefault(re.sub(r"-seed\d+$", "", attempt.name), []).append(attempt)
    lines = []
    for name, runs in recipes.items():
        if len(runs) > 1:
            accuracies = [run.accuracy for run in runs]
            minutes = statistics.mean(run.training_minutes for run in runs)
            lines += [
                f"**{name}**, {len(runs)} seeds: mean {statistics.mean(accuracies):.2%}, standard deviation "
                f"{statistics.stdev(accuracies):.2%}, in {minutes:.1f} minutes of training each.",
                "",
            ]
    return lines


def network(recipe: Recipe) -> str:
    model = recipe.model
    body = f"blocks {list(model.blocks)}, width {model.width_multiplier:g}" if model.blocks else f"RS-{model.depth}"
    grown = f", images from {recipe.train.start_scale:g} of their size" if recipe.train.start_scale < 1 else ""
    return f"{body}, stem {model.stem_width}, strides {model.stem_stride} and {model.stem_pool_stride}{grown}"


def optimiser(recipe: Recipe) -> str:
    rate = recipe.schedule.learning_rate
    if recipe.optimizer.name == "sgd":
        return f"SGD {rate:g}"
    return f"Muon {recipe.optimizer.muon_learning_rate:g}, {recipe.optimizer.muon_momentum:g}; SGD {rate:g}"


def draw(attempts: Sequence[Attempt], path: Path) -> None:
    """Accuracy of the average against minutes, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for attempt in attempts:
        minutes = [record["seconds"] / 60 for record in attempt.epochs]
        axes.plot(minutes, [100 * _accuracy(record) for record in attempt.epochs], marker=".", label=attempt.name)
    axes.axhline(91.19, color="grey", linestyle=":")
    axes.set(xlabel="minutes of training and evaluation", ylabel="accuracy of the average, %")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _accuracy(record: dict) -> float:
    average = record["test_accuracy_ema"]
    return record["test_accuracy"] if average is None else average


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    test_set, attempts = kept(TEST_SET), kept(ATTEMPTS)
    write_section(DOCUMENT, HEADING, text(test_set, attempts))
    for runs, folder in ((test_set, TEST_SET), (attempts, ATTEMPTS)):
        if runs:
            draw(runs, PICTURES[folder])
    return 0


if __name__ == "__main__":
    sys.exit(main())
