"""The whole training set on the device, and batches made there: ``train.loader = "resident"``.

    resident = load_resident(dataset, recipe, execution)      # ValueError (one line) where it cannot be
    step = build_step(recipe, 10, dataset.mean, dataset.std, execution, resident.steps_per_epoch, resident=resident)
    step()                                                    # inside: images, labels = resident(self.counter)

``resident(counter)`` is a tensor program with static shapes: the step counter, () int64 on the device, alone decides
the batch, so that a resumed run goes on at the right one and a replayed graph needs nothing from the host. The batches
are, byte for byte, those of :class:`rsengine.input.loader.BetonLoader` with the same recipe and seed: the order comes
from a table made by the same generator, the augmentation from integer arithmetic alone. Neither FFCV nor numba is
imported unless images are stored as JPEG. ``read_images(path)`` gives a whole .beton file, such as the test set, the
same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from rsengine.augment.device import DeviceAugment
from rsengine.config import Recipe
from rsengine.data import Dataset
from rsengine.data.beton.reader import MODE_RAW, BetonReader
from rsengine.device import Execution
from rsengine.errors import SettingsError, smaller_batch
from rsengine.input.choose import choose_loader
from rsengine.input.loader import epoch_order
from rsengine.model.preprocess import Preprocess
from rsengine.output import counted
from rsengine.parallel.ranks import ALONE, Ranks

ORDER_LIMIT = 2**29  # bytes of the table of orders: 2,684 epochs of CIFAR's 50,000 images


class ResidentData:
    """A training set on the device of a run. ``resident(counter)`` gives the batch of a step.

    Batches are normalised, in the precision of ``execution``, if ``recipe.batches_are_normalised``; otherwise they are
    pixels.

    Args:
        images: (M, H, W, 3) uint8.
        labels: (M,) int64.
        mean, std: of the data set, 0 to 1; the mean is also a colour to fill with.
        steps_per_epoch: the counter stays below this times ``train.epochs``.
        ranks: the processes that share the batches, of which each makes its part.

    Attributes:
        orders: (epochs * steps_per_epoch, batch_size / processes) int32, this process's images of every step.

    Raises:
        ValueError: tensors of other shapes or dtypes; too few images; orders above :data:`ORDER_LIMIT`.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        execution: Execution,
        steps_per_epoch: int,
        ranks: Ranks = ALONE,
    ) -> None:
        if images.dim() != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images: expected (M, H, W, 3) uint8; got {tuple(images.shape)} {images.dtype}")
        count, height, width, _ = images.shape
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels: expected ({count},) int64; got {tuple(labels.shape)} {labels.dtype}")
        train, device = recipe.train, execution.device
        self.images, self.labels, self.steps_per_epoch = images.to(device), labels.to(device), steps_per_epoch
        orders = step_orders(train.seed, count, train.batch_size, train.epochs, steps_per_epoch)
        self.orders = torch.from_numpy(np.ascontiguousarray(ranks.part(orders.T).T)).to(device)
        self.augment = DeviceAugment(
            recipe.augment,
            (height, width),
            mean,
            seed=train.seed,
            device=device,
            preprocess=Preprocess(mean, std, device) if recipe.batches_are_normalised else None,
            dtype=execution.autocast_dtype or torch.float32,
        )

    def __call__(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """``counter``: () int64, the steps done. Returns images and (N,) int64 labels, new tensors.

        Images are (N, H, W, 3) uint8, or normalised (N, 3, H, W) in channels_last memory format.

        Nothing here reads a tensor's value on the host, and every index is a tensor on the device.
        """
        chosen = self.orders.index_select(0, counter.view(1)).view(-1).long()
        images = self.augment(self.images, chosen, counter // self.steps_per_epoch)
        return images, self.labels.index_select(0, chosen)


def load_resident(dataset: Dataset, recipe: Recipe, execution: Execution, ranks: Ranks = ALONE) -> ResidentData:
    """Put the training set of ``dataset`` on the device of ``execution``, ready for a run of ``recipe``.

    Raises:
        ValueError: the images differ in size, do not fill a batch, or do not fit, beside the test set, in the free
            memory of the device. All of it is known before a pixel is read.
    """
    train, device = recipe.train, execution.device
    if dataset.image_size is None:
        raise SettingsError(
            f"train.loader: 'resident' needs images of one size, and those of {dataset.name} differ; "
            "convert them again with --size N"
        )
    steps = dataset.train_count // train.batch_size
    if train.limit_train_batches:
        steps = min(steps, train.limit_train_batches)
    height, width = dataset.image_size
    needed = (dataset.train_count + dataset.test_count) * (height * width * 3 + 8)
    needed += order_bytes(dataset.train_count, train.batch_size, train.epochs, steps)
    check_fits(needed, free_memory(device), device)
    images, labels = read_images(dataset.train_beton)
    return ResidentData(recipe, images, labels, dataset.mean, dataset.std, execution, steps, ranks)


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Every sample of a .beton file, in its order: (M, H, W, 3) uint8 and (M,) int64 on the CPU.

    Raises:
        ValueError: the images differ in size.
    """
    reader = BetonReader(path)
    heights, widths = np.unique(reader.heights), np.unique(reader.widths)
    if len(heights) != 1 or len(widths) != 1:
        raise SettingsError(f"{path}: expected images of one size; got several; convert them again with --size N")
    images = np.empty((len(reader), heights[0], widths[0], 3), np.uint8)
    if (reader.modes == MODE_RAW).all():
        for i, image in enumerate(images):
            image[:] = reader.image(i)
    else:  # FFCV and Pillow decode JPEG differently; the images are those that "auto" streams on this machine
        start = 0
        for batch, _ in choose_loader("auto").open(path, min(len(reader), 1000)).epoch():
            images[start : start + len(batch)] = batch.numpy()
            start += len(batch)
    return torch.from_numpy(images), torch.from_numpy(reader.labels)


def step_orders(seed: int, count: int, batch_size: int, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """The images of every step of a run: (epochs * steps_per_epoch, batch_size) int32, places in the data set.

    Each epoch takes the beginning of its permutation, as the loaders do.

    Raises:
        ValueError: see :func:`order_bytes`.
    """
    order_bytes(count, batch_size, epochs, steps_per_epoch)
    used = steps_per_epoch * batch_size
    orders = np.empty((epochs, used), np.int32)
    for epoch in range(epochs):
        orders[epoch] = epoch_order(seed, epoch, count)[:used]
    return orders.reshape(-1, batch_size)


def order_bytes(count: int, batch_size: int, epochs: int, steps_per_epoch: int) -> int:
    """The size of :func:`step_orders`.

    Raises:
        ValueError: ``count`` images do not fill the batches of an epoch, or the table would exceed :data:`ORDER_LIMIT`.
    """
    if not 1 <= steps_per_epoch <= count // batch_size:
        raise SettingsError(
            f"train.batch_size: {counted(count, 'image')} cannot fill "
            f"{counted(max(steps_per_epoch, 1), 'batch', 'batches')} of {batch_size}; "
            f"{smaller_batch(count // max(steps_per_epoch, 1))}"
        )
    size = 4 * epochs * steps_per_epoch * batch_size
    if size > ORDER_LIMIT:
        raise SettingsError(
            f"train.loader: 'resident' keeps the order of every epoch on the device, at most {ORDER_LIMIT:,} bytes; "
            f"{counted(epochs, 'epoch')} of {steps_per_epoch * batch_size:,} images need {size:,}; "
            "use fewer train.epochs or train.loader=auto"
        )
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free on ``device``: of the GPU, or of the machine's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_fits(needed: int, free: int, device: torch.device) -> None:
    """Raises ValueError where ``needed`` bytes are more than the ``free`` ones."""
    if needed > free:
        raise SettingsError(
            f"train.loader: 'resident' needs {needed / 1e9:.2f} GB on {device} for both sets and the orders, "
            f"and {free / 1e9:.2f} GB are free; use train.loader=auto"
        )
