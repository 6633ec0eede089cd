"""Converts uint8 pixels to the model's input, in training, evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Preprocess:
    """``(pixels / 255 - mean) / std`` per channel.

    Args:
        mean, std: three numbers each, in units of 0 to 1. A std of 0, that of a channel without spread in weights
            saved by an older version, counts as 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        deviation = torch.tensor([value or 1.0 for value in std], dtype=torch.float64)
        self.scale = (1 / (255 * deviation)).float().to(device)
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """``images``: (N, H, W, 3) uint8, or floats from 0 to 255 where images were mixed.

        Returns (N, 3, H, W) float32 in channels_last memory format.
        """
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
