"""Pixels to inputs."""

import torch

from rsengine.model.preprocess import Preprocess


def test_a_channel_without_spread_counts_as_one():
    images = torch.full((1, 2, 2, 3), 51, dtype=torch.uint8)
    x = Preprocess((0.2, 0.1, 0.0), (0.0, 0.5, 0.0))(images)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0.0, 0.2, 0.2]))
