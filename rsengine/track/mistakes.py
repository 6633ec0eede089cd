"""The mistakes on the test set that the network is surest of, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsengine.run import plots
from rsengine.run.lettering import labels_said

COLUMNS, MOST = 5, 25


@torch.inference_mode()
def draw_mistakes(trainer: Any, path: Path) -> None:
    """Draw up to 25 misclassified test images, the surest first, into the PNG ``path``; none where there are none.

    Args:
        trainer: a :class:`rsengine.trainer.Trainer`; the network is that of its result.
    """
    evaluation, classes = trainer.evaluation, labels_said(trainer.dataset.classes, lambda _line: None)
    model = evaluation.models.get("ema") or evaluation.models["raw"]
    found: list[tuple[float, np.ndarray, int, int]] = []
    with evaluation.evaluation_mode():
        for images, labels in trainer.batches.test_epoch():
            with trainer.execution.autocast():
                logits = model.forward(evaluation.preprocess(images.to(trainer.execution.device)))
            probability, predicted = (each.cpu() for each in logits.float().softmax(dim=1).max(dim=1))
            for i in torch.nonzero(predicted != labels.cpu()).flatten().tolist():
                image = images[i].cpu().numpy().copy()  # a loader uses its memory again
                found.append((float(probability[i]), image, int(labels[i]), int(predicted[i])))
            found = sorted(found, key=lambda mistake: -mistake[0])[:MOST]
    if not found:
        return
    columns = min(COLUMNS, len(found))
    rows = [found[first : first + columns] for first in range(0, len(found), columns)]
    blank = (0.0, np.full_like(found[0][1], 255), -1, -1)
    rows[-1] += [blank] * (columns - len(rows[-1]))  # the rows of a grid are equally long
    plots.image_grid(
        [("", np.stack([image for _, image, _, _ in row])) for row in rows],
        path,
        titles=[""] * columns,
        captions=[
            [f"{classes[predicted]} {p:.0%}\nis {classes[true]}" if true >= 0 else "" for p, _, true, predicted in row]
            for row in rows
        ],
        title=f"{trainer.recipe.name} on {trainer.dataset.name}: the surest mistakes",
    )
