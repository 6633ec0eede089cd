"""A trained network from a file of any format, and how to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsengine.device import Execution, choose_execution
from rsengine.model.preprocess import Preprocess
from rsengine.output import counted, escaped
from rsengine.run.weights import Description, Weights, finite


@dataclass(frozen=True)
class Classifier:
    """A trained network. :func:`rsengine.export.load_classifier` reads one.

    Attributes:
        path: the file or folder that it was read from.
        kind: what that is, in words.
        description: recipe, classes, image size and normalisation.
        run: the network: (N, H, W, 3) uint8 to logits (N, C).
        any_size: whether it takes images of other sizes than it learned from.
    """

    path: Path
    kind: str
    description: Description
    run: Callable[[Tensor], Tensor]
    any_size: bool = False

    @classmethod
    def of_weights(
        cls, weights: Weights, execution: Execution | None = None, path: Path = Path(), kind: str = ""
    ) -> Classifier:
        """The network of ``weights``, moved to the device of ``execution``; by default on the CPU in float32."""
        execution = execution or choose_execution("cpu", "fp32")
        model = weights.model.to(execution.device, memory_format=torch.channels_last)
        preprocess = Preprocess(weights.mean, weights.std, execution.device)

        def run(images: Tensor) -> Tensor:
            x = preprocess(images.to(execution.device))
            with execution.autocast():
                return model(x)

        return cls(path, kind, weights.description, run, any_size=True)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it learned from."""
        return self.description.image_size

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """``images``: (N, H, W, 3) uint8 RGB. Returns (N, C) float32 on the CPU.

        Raises:
            WeightsError: the weights overflow.
        """
        return finite(self.run(images).float().cpu())

    def probabilities(self, images: np.ndarray) -> Tensor:
        """``images``: (N, H, W, 3) uint8 RGB. Returns (N, C) float32 on the CPU, each row summing to 1."""
        return self.logits(torch.from_numpy(images)).softmax(dim=1)

    def __str__(self) -> str:
        height, width = self.image_size
        classes = counted(len(self.classes), "class", "classes")
        return f"{escaped(self.path)}, {self.kind}: {classes}, images of {height}x{width}"
