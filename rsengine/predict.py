"""``python -m rsengine.predict RUN IMAGE ...``: classify pictures with the saved weights of a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsengine.data import DataError
from rsengine.data.sources.images import SUFFIXES, decode_rgb, resize_and_crop
from rsengine.data.sources.tree import walk
from rsengine.device import choose_execution
from rsengine.errors import run_command
from rsengine.model.preprocess import Preprocess
from rsengine.output import escaped
from rsengine.run.weights import Weights, finite, load_weights

PIXELS = 256 * 32 * 32  # in a batch, so that memory does not depend on how many pictures there are


@torch.inference_mode()
def predict(weights: Weights, images: np.ndarray) -> Tensor:
    """Class probabilities of images, preprocessed exactly as in training.

    Args:
        images: (N, H, W, 3) uint8 RGB, of the size the network was trained on.

    Returns:
        (N, C) float32 on the CPU, each row summing to 1.

    Raises:
        WeightsError: the weights overflow.
    """
    device = next(weights.model.parameters()).device
    x = Preprocess(weights.mean, weights.std, device)(torch.from_numpy(images).to(device))
    return finite(weights.model(x).float().softmax(dim=1).cpu())


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


def pictures(given: Iterable[Path]) -> Iterator[Path | DataError]:
    """The picture files that ``given`` names: files as they are, and of a folder all pictures below it, by name.

    A folder that cannot be read, or has none, gives its error in place of pictures.
    """
    for path in given:
        if not os.path.isdir(path):
            yield path
            continue
        try:
            files, _ = walk(path)
        except DataError as error:
            yield error
            continue
        inside = [path / name for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES]
        yield from inside or [DataError(f"{path}: holds no pictures ({', '.join(sorted(SUFFIXES))})")]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 when some pictures could not be read, 2 when none could."""
    parser = argparse.ArgumentParser(prog="python -m rsengine.predict", description=__doc__)
    parser.add_argument("run", help="a run folder, or its weights.safetensors")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="picture files, or folders of them")
    parser.add_argument(
        "--top", type=int, default=3, metavar="K", help="classes to print for each picture (default: 3)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return run_command(lambda: _predict(parser.parse_args(argv)))


def _predict(arguments: argparse.Namespace) -> int:
    device = choose_execution(arguments.device, "fp32").device
    weights = load_weights(arguments.run)
    weights.model.to(device, memory_format=torch.channels_last)
    height, width = weights.image_size
    most = max(1, PIXELS // (height * width))
    read, failed = 0, 0
    paths: list[Path] = []
    images: list[np.ndarray] = []
    for path in pictures(arguments.images):
        try:
            if isinstance(path, DataError):
                raise path
            images.append(read_image(path, weights.image_size))
            paths.append(path)
        except DataError as error:
            failed += 1
            print(f"error: {escaped(error)}", file=sys.stderr)
        if len(images) == most:
            _print_classes(weights, paths, images, arguments.top)
            read += len(images)
            paths, images = [], []
    if images:
        _print_classes(weights, paths, images, arguments.top)
        read += len(images)
    return 0 if not failed else 1 if read else DataError.status


def _print_classes(weights: Weights, paths: list[Path], images: list[np.ndarray], top: int) -> None:
    """Print a line for each picture: its path, and the ``top`` likeliest classes with their probabilities."""
    best = predict(weights, np.stack(images)).topk(max(1, min(top, len(weights.classes))))
    for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        scores = ", ".join(f"{escaped(weights.classes[c])} {p:.1%}" for p, c in zip(values, classes, strict=True))
        print(f"{escaped(path)}: {scores}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
