"""`python -m bench.attempts`: the runs kept in docs/attempts/ as the tables and the picture of docs/speedrun.md.

An attempt is a folder with what a run wrote: ``metrics.jsonl`` and, where rsengine ran it, ``recipe.toml``. To add one:

    python -m rsengine.train --recipe … --out attempt && mkdir docs/attempts/NAME
    cp attempt/metrics.jsonl attempt/recipe.toml docs/attempts/NAME && python -m bench.attempts
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.document import write_section
from rsengine.config import Recipe
from rsengine.runlog import EPOCH, METRICS_FILE, RunLog

DOCUMENT = Path(__file__).parent.parent / "docs" / "speedrun.md"
FOLDER, PICTURE = DOCUMENT.parent / "attempts", DOCUMENT.parent / "speedrun.png"
HEADING = "## Attempts"
MINUTES = (5, 10, 20, 40, 60)


@dataclass(frozen=True)
class Attempt:
    """A run: its name, its recipe where rsengine ran it, and the records of its epochs."""

    name: str
    recipe: Recipe | None
    epochs: Sequence[dict]

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


def kept() -> list[Attempt]:
    """Those in the repository, by name."""
    return [read(folder) for folder in sorted(FOLDER.iterdir()) if (folder / METRICS_FILE).exists()]


def text(attempts: Sequence[Attempt]) -> str:
    """The section of the document."""
    head = ["run", "network", "optimiser", "batch", "epochs", "minutes", "images/s", "raw", "average"]
    lines = [
        HEADING,
        "",
        "`python -m bench.attempts`, from the runs in [attempts](attempts): each has its `recipe.toml` and "
        "`metrics.jsonl`. Minutes are of training and evaluation.",
        "",
        "![accuracy against minutes](speedrun.png)",
        "",
        _row(head),
        "|---|---|---|" + "---:|" * (len(head) - 3),
    ]
    for attempt in attempts:
        last, recipe = attempt.epochs[-1], attempt.recipe
        speed = sorted(record["images_per_second"] for record in attempt.epochs)[len(attempt.epochs) // 2]
        lines.append(
            _row(
                [
                    attempt.name,
                    network(recipe) if recipe else "timm's resnetrs50",
                    optimiser(recipe) if recipe else "SGD",
                    str(recipe.train.batch_size) if recipe else "128",
                    f"{last['epoch']}",
                    f"{last['seconds'] / 60:.1f}",
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
    lines += [_row([a.name, *(_percent(a.after(m)) for m in MINUTES)]) for a in attempts]
    return "\n".join(lines) + "\n"


def network(recipe: Recipe) -> str:
    model = recipe.model
    body = f"blocks {list(model.blocks)}, width {model.width_multiplier:g}" if model.blocks else f"RS-{model.depth}"
    return f"{body}, stem {model.stem_width}, strides {model.stem_stride} and {model.stem_pool_stride}"


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
    attempts = kept()
    write_section(DOCUMENT, HEADING, text(attempts))
    draw(attempts, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
