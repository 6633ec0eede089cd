"""Draws what a recipe's augmentation does to images: originals above augmented ones, and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsengine.augment.policies import policy_of
from rsengine.config import AugmentSection
from rsengine.data import Dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.run import plots


def draw_augmented(
    dataset: Dataset,
    augment: AugmentSection,
    path: Path,
    *,
    title: str,
    seed: int = 0,
    images: int = 10,
    epochs: int = 3,
    labels: Sequence[str] = (),
) -> None:
    """Draw ``images`` training images, spread over the set, above what the pipeline makes of them in its first epochs.

    The policy's operations are written below each image; crop, flip and Cutout can be seen. ``labels``: what to call
    the classes, if not by their names.

    Raises:
        ValueError: the images of the data set differ in size.
    """
    from rsengine.augment.describe import describe  # numba, which a resident run starts without
    from rsengine.augment.from_recipe import training_augmentations
    from rsengine.augment.program import compile_policy

    reader = BetonReader(dataset.train_beton)
    if dataset.image_size is None:
        raise ValueError(f"{dataset.folder}: its images differ in size; convert them again with --size N")
    indices = np.linspace(0, len(reader) - 1, min(images, len(reader)), dtype=np.int64)
    originals = np.stack([reader.image(int(i)) for i in indices])
    rows, captions = [("original", originals)], [[""] * len(indices)]
    operations = training_augmentations(augment, dataset.mean, seed)
    policy = policy_of(augment, dataset.image_size)
    program = compile_policy(policy, dataset.image_size) if policy is not None else None
    for epoch in range(epochs):
        batch = originals.copy()
        for operation in operations:
            batch = operation.apply(batch, indices, epoch)
        rows.append((f"epoch {epoch + 1}", batch))
        if program is not None:
            captions.append(["\n".join(describe(program, seed, epoch, int(i))) for i in indices])
    names = [(labels or dataset.classes)[label] for label in reader.labels[indices]]
    plots.image_grid(rows, path, titles=names, captions=captions if program is not None else (), title=title)
