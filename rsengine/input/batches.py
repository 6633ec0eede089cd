"""The batches of a run, from the loader that ``train.loader`` names, on the device and ready for the step.

Both kinds yield the inputs of the step: two tensors for a streamed batch, none for a resident one, because the step
makes its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rsengine.augment.policies import check_crop
from rsengine.config import Recipe
from rsengine.data import Dataset
from rsengine.device import Execution
from rsengine.engine.graph import static_batch
from rsengine.errors import SettingsError
from rsengine.input.choose import choose_loader
from rsengine.input.resident import load_resident, read_images
from rsengine.input.transfer import Batch, feeder_for
from rsengine.parallel.ranks import ALONE, Ranks


class StreamedBatches:
    """Batches from a loader, of which each of the processes ``ranks`` gets its part. On a GPU they pass through pinned
    memory and a copy stream.

    Attributes:
        reason: which loader, and why.

    Raises:
        LoaderError: the images do not fill a batch.
        SettingsError: the processes cannot divide the batch, the crop pads by more than the images allow, or FFCV is
            asked for and cannot be used.
    """

    resident = None  # the argument of TrainStep

    def __init__(self, recipe: Recipe, dataset: Dataset, execution: Execution, ranks: Ranks = ALONE) -> None:
        train = recipe.train
        part_size = _part_size(recipe, ranks)
        loader = choose_loader(train.loader)
        # Imported here, because numba takes longer to import than a resident run takes to begin.
        from rsengine.augment.from_recipe import training_augmentations

        self.reason = loader.reason
        check_crop(recipe.augment, dataset.image_size)
        self._train = loader.open(
            dataset.train_beton,
            train.batch_size,
            augmentations=training_augmentations(recipe.augment, dataset.mean, train.seed),
            shuffle=True,
            drop_last=True,
            seed=train.seed,
            ranks=ranks,
        )
        self._test = loader.open(dataset.test_beton, train.eval_batch_size * ranks.size, ranks=ranks)
        self.steps_per_epoch = len(self._train)
        if train.limit_train_batches:
            self.steps_per_epoch = min(self.steps_per_epoch, train.limit_train_batches)
        self._train_feeder = feeder_for(execution.device, part_size, dataset.image_size)
        self._test_feeder = feeder_for(execution.device, train.eval_batch_size, dataset.image_size)
        self._shape = part_size, dataset.image_size

    def static_inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """The inputs that a step is captured with."""
        return static_batch(*self._shape, device)

    def train_epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """The inputs of each step of an epoch, from step ``start`` of it on. Close it when leaving early."""
        with contextlib.closing(self._train.epoch(epoch, start=start)) as batches:
            yield from self._train_feeder.feed(batches) if self._train_feeder else batches

    def test_epoch(self) -> Iterator[Batch]:
        """This process's part of the test set, in its order; the last batch may be smaller. Close it when leaving
        early."""
        with contextlib.closing(self._test.epoch()) as batches:
            yield from self._test_feeder.feed(batches) if self._test_feeder else batches


class ResidentBatches:
    """Batches from both sets held on the device. The attributes are those of :class:`StreamedBatches`.

    Raises:
        ValueError: the sets do not fit there, or do not fill a batch; see :func:`load_resident`.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, execution: Execution, ranks: Ranks = ALONE) -> None:
        _part_size(recipe, ranks)
        self.resident = load_resident(dataset, recipe, execution, ranks)
        self.reason = f"the whole set on {execution.device.type} (as asked)"
        self.steps_per_epoch = self.resident.steps_per_epoch
        self._test = [ranks.part(tensor).to(execution.device) for tensor in read_images(dataset.test_beton)]
        self._eval_batch_size = recipe.train.eval_batch_size

    def static_inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def train_epoch(self, epoch: int, start: int) -> Iterator[tuple[()]]:
        yield from [()] * (self.steps_per_epoch - start)

    def test_epoch(self) -> Iterable[Batch]:
        parts = zip(*(tensor.split(self._eval_batch_size) for tensor in self._test), strict=True)
        return (part for part in parts if len(part[0]))  # of several processes, one may have no image


def open_batches(
    recipe: Recipe, dataset: Dataset, execution: Execution, ranks: Ranks = ALONE
) -> StreamedBatches | ResidentBatches:
    """The batches of a run of ``recipe``, of which each of the processes ``ranks`` gets its part.

    Raises what the class that it chooses raises.
    """
    kind = ResidentBatches if recipe.train.loader == "resident" else StreamedBatches
    return kind(recipe, dataset, execution, ranks)


def _part_size(recipe: Recipe, ranks: Ranks) -> int:
    """Images of a batch in each process. Raises :class:`SettingsError` where they cannot be divided."""
    train = recipe.train
    size = ranks.share_of(train.batch_size, "train.batch_size")
    if size % train.micro_batches or size < 2 * train.micro_batches:
        raise SettingsError(
            f"train.micro_batches: expected a divisor of the {size} images that each of {ranks.size} processes has of "
            f"a batch, which leaves at least 2 to each, as batch norm needs; got {train.micro_batches}"
        )
    return size
