"""Draws what a recipe's augmentation does to images: originals above augmented ones, and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsengine.augment.policies import policy_of
from rsengine.config import AugmentSection
from rsengine.data import Dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.run import plots


@dataclass(frozen=True)
class Examples:
    """N training images before and after augmentation.

    Attributes:
        labels: (N,) int64, their classes.
        rows: (name, images, captions): what happened, the images as (N, H, W, 3) uint8, and N texts of what was done
            to each, or none.
    """

    labels: np.ndarray
    rows: Sequence[tuple[str, np.ndarray, Sequence[str]]]


def augmented_examples(
    dataset: Dataset, augment: AugmentSection, *, seed: int = 0, images: int = 10, epochs: int = 3
) -> Examples:
    """``images`` training images, spread over the set, and what the pipeline makes of them in its first epochs.

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
    rows: list[tuple[str, np.ndarray, Sequence[str]]] = [("original", originals, [])]
    operations = training_augmentations(augment, dataset.mean, seed)
    policy = policy_of(augment, dataset.image_size)
    program = compile_policy(policy, dataset.image_size) if policy is not None else None
    for epoch in range(epochs):
        batch = originals.copy()
        for operation in operations:
            batch = operation.apply(batch, indices, epoch)
        done = ["\n".join(describe(program, seed, epoch, int(i))) for i in indices] if program is not None else []
        rows.append((f"epoch {epoch + 1}", batch, done))
    return Examples(reader.labels[indices], rows)


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
) -> Examples:
    """Draw what :func:`augmented_examples` gives, originals above augmented images, and return it.

    The policy's operations are written below each image; crop, flip and Cutout can be seen. ``labels``: what to call
    the classes, if not by their names.

    Raises:
        ValueError: the images of the data set differ in size.
    """
    examples = augmented_examples(dataset, augment, seed=seed, images=images, epochs=epochs)
    written = any(done for _, _, done in examples.rows)
    plots.image_grid(
        [(name, pixels) for name, pixels, _ in examples.rows],
        path,
        titles=[(labels or dataset.classes)[label] for label in examples.labels],
        captions=[done or [""] * len(examples.labels) for _, _, done in examples.rows] if written else (),
        title=title,
    )
    return examples
