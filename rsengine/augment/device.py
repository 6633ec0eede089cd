"""A recipe's augmentations of a whole batch as one operator of :mod:`rsengine.kernels`, for any device.

The same bytes as the operations of :mod:`rsengine.augment.operations` for the same (seed, epoch, index). Nothing here
imports numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsengine.augment.fills import fill_colour
from rsengine.augment.policies import check_crop, policy_of
from rsengine.augment.program import compile_policy
from rsengine.kernels import PolicyTables, augment_batch
from rsengine.model.preprocess import Preprocess

if TYPE_CHECKING:
    from rsengine.config import AugmentSection


class DeviceAugment:
    """Gathers images from a data set on the device and augments them as a recipe says, in its order.

    Args:
        augment: the recipe's section; mixup and cutmix are left to the training step.
        size: (height, width) of the images.
        mean: of the data set, 0 to 1; one of the fill colours.
        preprocess: normalise in the same pass; ``None`` returns pixels.
        dtype: of normalised images.

    Raises:
        SettingsError: the crop pads by more than the images allow; reflection needs less than each side.
    """

    def __init__(
        self,
        augment: AugmentSection,
        size: tuple[int, int],
        mean: Sequence[float],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        preprocess: Preprocess | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed, self.policy, chains = seed, None, 0
        policy = policy_of(augment, size)
        if policy is not None:
            program = compile_policy(policy, size)
            self.policy = PolicyTables(
                *(torch.from_numpy(getattr(program, name)).to(device) for name in PolicyTables._fields)
            )
            chains = program.chains
        check_crop(augment, size)
        self.options = {
            "crop_padding": augment.crop_padding,
            "crop_reflect": augment.crop_mode == "reflect",
            "flip": ("alternating" if augment.alternating_flip else "random") if augment.flip else "none",
            "chains": chains,
            "bilinear": augment.policy_interpolation == "bilinear",
            "policy_fill": fill_colour(augment.policy_fill, mean),
            "cutout_holes": augment.cutout_holes,
            "cutout_size": augment.cutout_size,
            "cutout_fill": fill_colour(augment.cutout_fill, mean),
        }
        self.normalise = {} if preprocess is None else {"scale": preprocess.scale, "shift": preprocess.shift}
        self.normalise |= {} if preprocess is None else {"dtype": dtype}

    def __call__(self, images: Tensor, indices: Tensor, epoch: Tensor) -> Tensor:
        """``images``: (M, H, W, 3) uint8, the whole set; ``indices``: (N,) int64, places in it; ``epoch``: () int64.

        Returns (N, H, W, 3) uint8, or normalised (N, 3, H, W) in channels_last memory format.
        """
        return augment_batch(images, indices, epoch, self.seed, policy=self.policy, **self.options, **self.normalise)
