"""`python -m bench.speedrun.table`: write the finished runs (:mod:`bench.speedrun.runs`) into docs/speedrun.md.

Attempts are measured on the validation split. To add one, under the name of its folder:

    python -m rsengine.train --data validation --recipe … --out NAME && python -m bench.speedrun.table --add NAME

`python -m bench.speedrun` makes and adds the runs on the test set. `--recipe NAME` prints the whole recipe of a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.markdown import write_section
from bench.speedrun.pictures import draw_attempts, draw_test_set
from bench.speedrun.runs import ATTEMPTS, TEST_SET, Run, add, by_recipe, load, read
from rsengine.config import Recipe
from rsengine.run.log import accuracy

DOCUMENT = Path(__file__).parents[2] / "docs" / "speedrun.md"
ATTEMPTS_PICTURE, TEST_SET_PICTURE = (DOCUMENT.parent / name for name in ("speedrun.png", "test-set.png"))
# The sections that are written here, each with the next one, which is not.
TEST_SET_SECTION = "## On the test set", "## What was learnt"
ATTEMPTS_SECTION = "## Attempts", "## Log of the attempts"
MINUTES = (5, 10, 20, 40, 60)


def test_set_section(runs: Sequence[Run]) -> str:
    """The section on the runs of the test set."""
    lines = [
        TEST_SET_SECTION[0],
        "",
        "`python -m bench.speedrun`: all 50,000 images to train on, the 10,000 of the test set to measure, each run "
        "alone on the machine. Minutes include evaluation; the column after them is training alone. The data are in "
        "[test_set.jsonl](../bench/speedrun/test_set.jsonl).",
        "",
        *_table(runs, TEST_SET_PICTURE),
        "",
        "EMA accuracy at the last evaluation within so many minutes:",
        "",
        _row(["run", *(f"{m} min" for m in MINUTES)]),
        "|---|" + "---:|" * len(MINUTES),
        *(_row([run.name, *(_percent(run.after(m)) for m in MINUTES)]) for run in runs),
        "",
        *_seeds(runs),
    ]
    return "\n".join(lines)


def attempts_section(runs: Sequence[Run]) -> str:
    """The section on the runs of the validation split."""
    lines = [
        ATTEMPTS_SECTION[0],
        "",
        "`python -m bench.speedrun.table`, from [attempts.jsonl](../bench/speedrun/attempts.jsonl), which has the "
        "recipe and every record of each run; `--recipe NAME` prints a recipe. Accuracies are on the validation split. "
        "The picture names the attempts that ended better than all that took less time.",
        "",
        *_table(runs, ATTEMPTS_PICTURE),
        "",
        "The best EMA accuracy at an evaluation within so many minutes:",
        "",
        _row(["within", "attempt", "EMA"]),
        "|---:|---|---:|",
        *(_row([f"{m} min", name, _percent(best)]) for m in MINUTES for name, best in _best(runs, m)),
        "",
    ]
    return "\n".join(lines)


def _table(runs: Sequence[Run], picture: Path) -> list[str]:
    head = ["run", "network", "optimiser", "batch", "epochs", "minutes", "training", "images/s", "raw", "EMA"]
    lines = [
        f"![EMA accuracy against minutes]({picture.name})",
        "",
        _row(head),
        "|---|---|---|" + "---:|" * (len(head) - 3),
    ]
    for run in runs:
        last, recipe = run.epochs[-1], run.recipe
        speed = statistics.median(record["images_per_second"] for record in run.epochs)
        lines.append(
            _row(
                [
                    run.name,
                    network(recipe) if recipe else "timm's resnetrs50",
                    optimiser(recipe) if recipe else "SGD",
                    str(recipe.train.batch_size) if recipe else "128",
                    f"{last['epoch']}",
                    f"{run.minutes:.1f}",
                    f"{run.training_minutes:.1f}",
                    f"{speed:.0f}",
                    _percent(last["test_accuracy"]),
                    _percent(last["test_accuracy_ema"]),
                ]
            )
        )
    return lines


def _best(runs: Sequence[Run], minutes: float) -> list[tuple[str, float]]:
    """The attempt with the best evaluation within ``minutes``, and its accuracy; nothing where there is none yet."""
    found = [(accuracy(r), run.name) for run in runs for r in run.epochs if r["seconds"] <= 60 * minutes]
    return [(name, best) for best, name in [max(found)]] if found else []


def _seeds(attempts: Sequence[Run]) -> list[str]:
    """A sentence on each recipe that ran with several seeds."""
    lines = []
    for name, seeds in by_recipe(attempts).items():
        if len(seeds) > 1:
            accuracies = [run.accuracy for run in seeds]
            minutes = statistics.mean(run.training_minutes for run in seeds)
            lines += [
                f"**{name}**, {len(seeds)} seeds: mean {statistics.mean(accuracies):.2%}, standard deviation "
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


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun.table", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--add", type=Path, metavar="FOLDER", help="add the run in this folder to the attempts first")
    what.add_argument("--recipe", metavar="NAME", help="print the whole recipe of a run, and write nothing")
    options = parser.parse_args(arguments)
    if options.recipe:
        recipes = {run.name: run.recipe for path in (ATTEMPTS, TEST_SET) for run in load(path) if run.recipe}
        if options.recipe not in recipes:
            parser.error(f"--recipe: expected one of {', '.join(recipes)}; got {options.recipe}")
        print(recipes[options.recipe].to_toml(), end="")
        return 0
    if options.add:
        added = read(options.add)
        if not added.epochs:
            parser.error(f"--add {options.add}: expected the folder of a run with at least one epoch; found none")
        add(added, ATTEMPTS)
    write()
    return 0


def write() -> None:
    """Write the two sections and their pictures."""
    for path, (heading, until), section, draw, picture in (
        (TEST_SET, TEST_SET_SECTION, test_set_section, draw_test_set, TEST_SET_PICTURE),
        (ATTEMPTS, ATTEMPTS_SECTION, attempts_section, draw_attempts, ATTEMPTS_PICTURE),
    ):
        found = load(path)
        write_section(DOCUMENT, heading, section(found), until)
        if found:
            draw(found, picture)


if __name__ == "__main__":
    sys.exit(main())
