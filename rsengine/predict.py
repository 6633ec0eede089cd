"""``python -m rsengine.predict RUN IMAGE ...``: classify pictures with the saved weights of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsengine.data import DataError
from rsengine.data.sources.images import decode_rgb, resize_and_crop
from rsengine.device import choose_execution
from rsengine.errors import run_command
from rsengine.model.preprocess import Preprocess
from rsengine.run.weights import Weights, load_weights


@torch.inference_mode()
def predict(weights: Weights, images: np.ndarray) -> Tensor:
    """Class probabilities of images, preprocessed exactly as in training.

    Args:
        images: (N, H, W, 3) uint8 RGB, of the size the network was trained on.

    Returns:
        (N, C) float32 on the CPU, each row summing to 1.
    """
    device = next(weights.model.parameters()).device
    x = Preprocess(weights.mean, weights.std, device)(torch.from_numpy(images).to(device))
    return weights.model(x).float().softmax(dim=1).cpu()


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture file as (height, width, 3) uint8 RGB of ``size``: the shorter side scaled to fit, then centre-cropped.

    Raises:
        DataError: not a readable picture, or a network for images that are not square and a picture of another size.
    """
    try:
        pixels = decode_rgb(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a picture") from error
    if pixels.shape[:2] == size:
        return pixels
    if size[0] != size[1]:
        raise DataError(f"{path}: {pixels.shape[0]}x{pixels.shape[1]} pixels; this network takes {size[0]}x{size[1]}")
    return resize_and_crop(pixels, size[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rsengine.predict", description=__doc__)
    parser.add_argument("run", help="a run folder, or its weights.safetensors")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="picture files")
    parser.add_argument(
        "--top", type=int, default=3, metavar="K", help="classes to print for each picture (default: 3)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    device = choose_execution(arguments.device, "fp32").device
    weights = load_weights(arguments.run)
    weights.model.to(device, memory_format=torch.channels_last)
    images = np.stack([read_image(path, weights.image_size) for path in arguments.images])
    top = max(1, min(arguments.top, len(weights.classes)))
    for path, row in zip(arguments.images, predict(weights, images), strict=True):
        best = row.topk(top)
        scores = ", ".join(f"{weights.classes[c]} {p:.1%}" for p, c in zip(best.values, best.indices, strict=True))
        print(f"{path}: {scores}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
