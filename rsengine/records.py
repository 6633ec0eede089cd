"""The pictures and the report of a run folder, drawn from what a trainer holds and logged."""

from __future__ import annotations

import numpy as np

from rsengine import plots, runlog
from rsengine.data import Dataset
from rsengine.data.reader import BetonReader
from rsengine.report import write_report
from rsengine.trainer import Trainer

_IMAGES = 10
_DRAWS = 3


def write_records(trainer: Trainer) -> None:
    """Write ``curves.png``, ``augmented.png``, ``confusion.png`` and ``report.md`` into the run folder."""
    recipe, dataset, out = trainer.recipe, trainer.dataset, trainer.out
    log = runlog.RunLog(out)
    epochs, intervals = log.records(runlog.EPOCH), log.records(runlog.INTERVAL)
    title = f"{recipe.name} on {dataset.name}"
    plots.curves(epochs, intervals, out / "curves.png", title=title)
    _draw_augmented(trainer, title)
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


def _draw_augmented(trainer: Trainer, title: str) -> None:
    """Originals above what the training pipeline makes of them in the first epochs."""
    from rsengine.loader import training_augmentations  # imports FFCV, which a resident run starts without

    reader = BetonReader(trainer.dataset.train_beton)
    indices = np.linspace(0, len(reader) - 1, min(_IMAGES, len(reader)), dtype=np.int64)
    originals = np.stack([reader.image(int(i)) for i in indices])
    rows = [("original", originals)]
    operations = training_augmentations(trainer.recipe.augment, trainer.dataset.mean, trainer.recipe.train.seed)
    for epoch in range(_DRAWS):
        images = originals.copy()
        for operation in operations:
            operation.epoch = epoch
            images = operation.apply(images, None, indices)
        rows.append((f"epoch {epoch + 1}", images))
    names = [trainer.dataset.classes[label] for label in reader.labels[indices]]
    plots.image_grid(rows, trainer.out / "augmented.png", titles=names, title=f"{title}: augmentation")
