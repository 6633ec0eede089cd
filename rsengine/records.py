"""The pictures and the report of a run folder, drawn from what a trainer holds and logged."""

from __future__ import annotations

from rsengine import plots, runlog
from rsengine.data import Dataset
from rsengine.report import write_report
from rsengine.showcase import draw_augmented
from rsengine.trainer import Trainer


def write_records(trainer: Trainer) -> None:
    """Write ``curves.png``, ``augmented.png``, ``confusion.png`` and ``report.md`` into the run folder."""
    recipe, dataset, out = trainer.recipe, trainer.dataset, trainer.out
    log = runlog.RunLog(out)
    epochs, intervals = log.records(runlog.EPOCH), log.records(runlog.INTERVAL)
    title = f"{recipe.name} on {dataset.name}"
    plots.curves(epochs, intervals, out / "curves.png", title=title)
    seed = recipe.train.seed
    draw_augmented(dataset, recipe.augment, out / "augmented.png", title=f"{title}: augmentation", seed=seed)
    if not trainer.result and epochs:
        trainer.evaluate()  # this process resumed a run and evaluated nothing itself
    weights = "ema" if "ema" in trainer.result else "raw"
    matrix = trainer.result[weights].confusion if trainer.result else None
    if matrix is not None:
        plots.confusion(matrix, out / "confusion.png", classes=dataset.classes, title=f"{title}, {weights} weights")
    write_report(
        out,
        recipe_toml=recipe.to_toml(),
        title=title,
        dataset_line=_dataset_line(dataset),
        model_lines=[
            f"ResNet-RS, blocks {[len(stage) for stage in trainer.step.model.stages]}: "
            f"{trainer.step.model.summary(dataset.image_size)}"
        ],
        confusion=matrix,
        classes=dataset.classes,
        notes=[
            f"{trainer.execution.reason}; {trainer.execution.threads} threads",
            "The losses of training and test are both with the recipe's label smoothing",
            f"Again: `python -m rsengine.train --recipe recipe.toml --data SOURCE`, with this folder's `recipe.toml` "
            f"and a source whose sha256 is `{dataset.checksum}`",
        ],
        planned_epochs=recipe.train.epochs,
    )


def _dataset_line(dataset: Dataset) -> str:
    height, width = dataset.image_size
    return (
        f"{dataset.name} ({dataset.source}), {dataset.train_count:,} training and {dataset.test_count:,} test images "
        f"of {height}×{width} pixels in {len(dataset.classes)} classes"
    )
