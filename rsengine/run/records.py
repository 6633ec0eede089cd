"""The pictures, the report and the page of a run folder, made from what its run logged and found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsengine.config import Recipe
from rsengine.data import Dataset
from rsengine.device import Execution
from rsengine.engine.evaluation import Evaluation
from rsengine.model import ResNetRS
from rsengine.output import counted
from rsengine.run import plots
from rsengine.run.augmented import draw_augmented
from rsengine.run.files import AUGMENTED_FILE, CONFUSION_FILE, CURVES_FILE, PAGE_FILE
from rsengine.run.lettering import labels_said
from rsengine.run.log import EPOCH, INTERVAL, RunLog
from rsengine.run.mistakes import mistakes_of
from rsengine.run.page_run import write_page
from rsengine.run.report import write_report


def write_records(
    out: Path,
    *,
    recipe: Recipe,
    dataset: Dataset,
    execution: Execution,
    model: ResNetRS,
    result: Mapping[str, Evaluation],
    say: Callable[[str], None] = print,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write ``curves.png``, ``augmented.png``, ``confusion.png``, ``report.md`` and ``report.html`` into ``out``.

    All of the run is saved by then. So whatever keeps the page from being written costs the page alone, and one line.

    Args:
        result: of the last evaluation, by weights (``raw``, ``ema``); empty before the first.
        say: called with a line on class names that no picture can show, or on a page that cannot be written.
        origin: of the weights that the run began with, as :meth:`rsengine.run.initial.Initial.origin` gives it.
    """
    log = RunLog(out)
    title = f"{recipe.name} on {dataset.name}"
    epochs, intervals = log.records(EPOCH), log.records(INTERVAL)
    if epochs or intervals:
        plots.curves(epochs, intervals, out / CURVES_FILE, title=title)
    else:  # all of them were lost
        (out / CURVES_FILE).unlink(missing_ok=True)
    labels = labels_said(dataset.classes, say)
    examples = draw_augmented(
        dataset,
        recipe.augment,
        out / AUGMENTED_FILE,
        title=f"{title}: augmentation",
        seed=recipe.train.seed,
        labels=labels,
    )
    weights = "ema" if "ema" in result else "raw"
    matrix = result[weights].confusion if result else None
    if matrix is not None:
        plots.confusion(matrix, out / CONFUSION_FILE, classes=labels, title=f"{title}, {weights} weights")
    given = " --init WEIGHTS" * (origin is not None)
    train = f"python -m rsengine.train --recipe recipe.toml{given} --data SOURCE"
    notes = [
        f"{execution.reason}; {counted(execution.threads, 'thread')}",
        "The losses of training and test are both with the recipe's label smoothing",
        *([] if origin is None else [f"Began with the weights in `{origin['path']}`, sha256 `{origin['sha256']}`"]),
    ]
    about: dict[str, Any] = {
        "recipe_toml": recipe.to_toml(),
        "title": title,
        "dataset_line": _dataset_line(dataset),
        "model_lines": [
            f"ResNet-RS, blocks {[len(stage) for stage in model.stages]}: {model.summary(dataset.image_size)}"
        ],
        "classes": dataset.classes,
        "planned_epochs": recipe.train.epochs,
    }
    write_report(
        out,
        confusion=matrix,
        labels=labels,
        notes=[
            *notes,
            f"Again: `{train}`, with this folder's `recipe.toml` and a source whose sha256 is `{dataset.checksum}`",
        ],
        **about,
    )
    again = [
        f"# in this folder, with a source whose sha256 is {dataset.checksum}",
        train,
        "# the saved weights: on a test set, on pictures",
        "python -m rsengine.evaluate . --data SOURCE",
        "python -m rsengine.predict . PICTURE",
        "# beside other runs",
        "python -m rsengine.compare . OTHER_RUN",
    ]
    try:
        worst = mistakes_of(dataset, result[weights]) if result else []
        write_page(out, notes=notes, again=again, result=result, worst=worst, examples=examples, **about)
    except Exception as error:  # whatever it is: hours of training are not to end in it
        say(f"{out / PAGE_FILE}: not written ({type(error).__name__}: {error}); all else is saved")


def _dataset_line(dataset: Dataset) -> str:
    height, width = dataset.image_size
    return (
        f"{dataset.name} ({dataset.source}), {dataset.train_count:,} training and "
        f"{counted(dataset.test_count, 'test image')} "
        f"of {height}×{width} pixels in {len(dataset.classes)} classes"
    )
