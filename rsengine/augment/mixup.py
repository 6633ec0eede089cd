"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and cutmix (Yun et al. 2019, arXiv 1905.04899) as tensor programs.

Every draw comes from the device's default generator, in one call of a fixed size and with no rejection, and nothing is
read on the host: a captured step draws anew at each replay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mix:
    """Mixes each image with the one before it in the batch (the first with the last): in a shuffled batch a random one.

    One share and one box serve the whole batch, as in both papers' code. With both kinds on, each batch gets one of
    them, with probability one half.

    Args:
        mixup_alpha, cutmix_alpha: shares are drawn from Beta(alpha, alpha); 0 turns the kind off.

    Raises:
        ValueError: a negative alpha, or both 0.
    """

    def __init__(self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or mixup_alpha == cutmix_alpha == 0:
            raise ValueError(
                f"mixup_alpha, cutmix_alpha: expected numbers >= 0, not both 0; got {mixup_alpha}, {cutmix_alpha}"
            )
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha

    def __call__(self, images: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix a batch of pixels. Normalisation is affine, so mixing before it equals mixing after it.

        Args:
            images: (N, H, W, 3) uint8, or floating point.
            before: the image before each of them, where ``images`` are not the whole batch.

        Returns:
            ``(mixed, share)``: (N, H, W, 3) float32, unrounded; and the () float32 share of each image's own pixels in
            it, which is its own label's share of the target.
        """
        height, width = images.shape[1:3]
        pick, u, v, row, column = torch.rand(5, device=images.device).unbind()
        weights = []  # (H, W): how much of each pixel stays
        if self.mixup_alpha:
            weights.append(symmetric_beta(self.mixup_alpha, u, v).expand(height, width))
        if self.cutmix_alpha:
            weights.append(outside_box(symmetric_beta(self.cutmix_alpha, u, v), row, column, height, width))
        weight = torch.where(pick < 0.5, *weights) if len(weights) == 2 else weights[0]
        # Rolled before they are mixed: uint8 is a quarter of the bytes.
        before = images.roll(1, 0) if before is None else before
        mixed = torch.lerp(before.float(), images.float(), weight[:, :, None])
        return mixed, weight.mean()


def symmetric_beta(alpha: float, u: Tensor, v: Tensor) -> Tensor:
    """Beta(alpha, alpha) from two uniform numbers in [0, 1): shape and dtype of ``u`` and ``v``.

    ``1/2 ± 1/2 / sqrt(1 + 1 / ((u^(-1/alpha) - 1) cos²(2 pi v)))``, the sign that of the cosine; exact for every alpha
    (Devroye 1996, "Random variate generation in one line of code", by Bailey's 1994 polar method for Student's t). The
    usual quotient of gamma variates needs rejection, and is 0 / 0 where a small alpha underflows.
    """
    cosine = torch.cos(2 * math.pi * v)
    odds = torch.expm1(-torch.log(u) / alpha) * cosine.square()  # 0 and infinity give 1/2 and an end
    return (0.5 + 0.5 * torch.copysign(torch.rsqrt(1 + 1 / odds), cosine)).clamp(0, 1)


def outside_box(share: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """1 outside the box that cutmix takes from the other image, 0 inside.

    As in the authors' code, its sides are ``sqrt(1 - share)`` of the image's, in whole pixels, and it is centred on a
    uniformly drawn pixel and clipped at the edges. Half a side is a whole number of pixels too, so a side is even.

    Args:
        share: () the share of the image that would remain without clipping and rounding.
        row, column: () uniform in [0, 1): the centre.

    Returns:
        (H, W) of the dtype of ``share``. Its mean is the share that does stay.
    """
    scale = torch.sqrt(1 - share)

    def inside(size: int, centre: Tensor) -> Tensor:
        half = torch.floor(torch.floor(size * scale) / 2)
        distance = torch.arange(size, device=share.device) - torch.floor(size * centre)
        return (distance >= -half) & (distance < half)

    return (~(inside(height, row)[:, None] & inside(width, column))).to(share.dtype)


def soft_targets(labels: Tensor, others: Tensor, share: Tensor, classes: int) -> Tensor:
    """``share`` on the class in ``labels`` and the rest on the one in ``others``.

    Args:
        labels, others: (N,) int64.
        share: () floating point in [0, 1].

    Returns:
        (N, classes) of the dtype of ``share``; rows sum to 1.
    """
    ids = torch.arange(classes, device=labels.device)  # F.one_hot reads the labels' range on the host
    own, other = ((which[:, None] == ids).to(share.dtype) for which in (labels, others))
    return torch.lerp(other, own, share)
