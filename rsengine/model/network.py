"""The ResNet-RS family (Bello et al., "Revisiting ResNets", arXiv 2103.07579).

Bottleneck ResNets with the ResNet-D stem and shortcut, a strided 3x3 convolution in place of the max-pool, and
squeeze-and-excite after the last batch norm of each residual branch. They have the parameters of the authors' networks
(and of timm's ``resnetrs*``, whose weights load through :func:`rsengine.model.from_timm`), and options for CIFAR-sized
images.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rsengine.errors import SettingsError
from rsengine.kernels import (
    batch_norm_squeeze_excite_residual,
    bottleneck,
    conv_batch_norm_relu,
    squeeze_excite_residual,
)
from rsengine.model.layers import BatchNorm, Conv3x3, PointwiseConv, count_batch, draw_keeps, dropout, joined
from rsengine.parallel.ranks import ALONE, Ranks

# Blocks in each of the four stages. 26 is this project's small one; the others are the paper's.
DEPTHS: dict[int, tuple[int, int, int, int]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    270: (4, 29, 53, 4),
    350: (4, 36, 72, 4),
    420: (4, 44, 87, 4),
}
DROP_PATH_RULES = ("tf", "timm")
ZERO_INITS = {"last": "bn3", "middle": "bn2", "none": ""}  # the batch norm of a block whose weight begins at zero
EXPANSION = 4
HEAD = "fc"  # the classifier; everything else is the body


def divisible(value: float, divisor: int = 8) -> int:
    """``value`` rounded to the nearest multiple of ``divisor``, at least one of them."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


def body_parts(stages: int) -> tuple[str, ...]:
    """The names of the parts below the classifier of a network of so many stages: ``stem``, ``stage1``, …"""
    return ("stem", *(f"stage{i + 1}" for i in range(stages)))


class Stem(nn.Module):
    """ResNet-D stem: three 3x3 convolutions of widths w, w, 2w, then a 3x3 convolution in place of the max-pool."""

    def __init__(self, width: int, stride: int, pool_stride: int) -> None:
        super().__init__()
        self.out_channels = 2 * width
        self.conv1, self.bn1 = Conv3x3(3, width, stride), BatchNorm(width)
        self.conv2, self.bn2 = Conv3x3(width, width), BatchNorm(width)
        self.conv3, self.bn3 = Conv3x3(width, 2 * width), BatchNorm(2 * width)
        self.pool_conv, self.pool_bn = Conv3x3(2 * width, 2 * width, pool_stride), BatchNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3), (self.pool_conv, self.pool_bn)]
        if layers := joined(x, pairs):
            return conv_batch_norm_relu(x, layers, self.bn1.momentum, self.bn1.eps)
        for conv, bn in pairs:
            x = bn(conv(x), relu=True)
        return x


class PlainStem(nn.Module):
    """The stem of ResNet (He et al., 2015): a 7x7 convolution of width 2w, then a 3x3 max-pool."""

    def __init__(self, width: int, stride: int, pool_stride: int) -> None:
        super().__init__()
        self.out_channels, self.pool_stride = 2 * width, pool_stride
        self.conv1 = nn.Conv2d(3, 2 * width, kernel_size=7, stride=stride, padding=3, bias=False)
        self.bn1 = BatchNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.bn1(self.conv1(x), relu=True), 3, self.pool_stride, padding=1)


class Shortcut(nn.Module):
    """The projection of a shortcut: 1x1 convolution and batch norm. Where the block strides, ``pools`` takes the mean
    of the pixels (ResNet-D); without it every other pixel is taken (ResNet)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, pools: bool) -> None:
        super().__init__()
        self.stride, self.pools = stride, pools
        self.conv, self.bn = PointwiseConv(in_channels, out_channels), BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pools:
            x = x[:, :, :: self.stride, :: self.stride]
        elif self.stride != 1:
            # ceil_mode keeps a 1-pixel map alive and count_include_pad=False keeps its mean right.
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """The parameters of squeeze-and-excite; the arithmetic is :mod:`rsengine.kernels`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def weights(self) -> tuple[Tensor, ...]:
        """The weights in the order in which the operations take them."""
        return self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions with batch norm; squeeze-and-excite; stochastic depth; sum."""

    ranks: Ranks = ALONE

    def __init__(
        self, in_channels: int, width: int, stride: int, se_ratio: float, drop_path: float, resnet_d: bool
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.drop_path = drop_path
        self.conv1, self.bn1 = PointwiseConv(in_channels, width), BatchNorm(width)
        self.conv2, self.bn2 = Conv3x3(width, width, stride), BatchNorm(width)
        self.conv3, self.bn3 = PointwiseConv(width, out_channels), BatchNorm(out_channels)
        self.se = SqueezeExcite(out_channels, divisible(out_channels * se_ratio)) if se_ratio else None
        needs_projection = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Identity()
        if needs_projection:
            self.shortcut = Shortcut(in_channels, out_channels, stride, pools=resnet_d)

    def forward(self, x: Tensor) -> Tensor:
        keep_scale = None
        if self.training and self.drop_path > 0:
            keep_scale = draw_keeps(x.shape[0], self.drop_path, self.ranks, x.device)
        if layers := joined(x, self._pairs()):
            weights = self.se.weights() if self.se is not None else None
            shortcut, pool = None, 1
            if len(layers) == 4:
                shortcut, pool = layers[3], self.shortcut.stride
                if not self.shortcut.pools:
                    shortcut, pool = shortcut._replace(stride=pool), 1
            return bottleneck(x, layers[:3], weights, shortcut, pool, keep_scale, self.bn1.momentum, self.bn1.eps)
        branch = self.bn1(self.conv1(x), relu=True)
        branch = self.bn2(self.conv2(branch), relu=True)
        branch, shortcut, bn = self.conv3(branch), self.shortcut(x), self.bn3
        if self.se is None:
            branch = bn(branch)
            if keep_scale is not None:
                branch = branch * keep_scale.to(branch.dtype)[:, None, None, None]
            return F.relu(branch + shortcut)
        if not self.training or bn.momentum is None or bn.is_synchronised:
            return squeeze_excite_residual(bn(branch), *self.se.weights(), shortcut, keep_scale)
        return batch_norm_squeeze_excite_residual(
            branch, *bn.tensors(), *self.se.weights(), shortcut, keep_scale, bn.momentum, bn.eps
        )

    def _pairs(self) -> list[tuple[nn.Conv2d, BatchNorm]]:
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return pairs + ([(self.shortcut.conv, self.shortcut.bn)] if isinstance(self.shortcut, Shortcut) else [])


class ResNetRS(nn.Module):
    """A ResNet-RS. Build one with :func:`resnet_rs`."""

    ranks: Ranks = ALONE
    _frozen: Sequence[nn.Module] = ()

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        *,
        stem_width: int,
        stem_stride: int,
        stem_pool_stride: int,
        width_multiplier: float,
        se_ratio: float,
        drop_path: Sequence[float],
        dropout: float,
        zero_init: str,
        resnet_d: bool,
    ) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        before = torch.get_rng_state()
        self.dropout = dropout
        self.stem = (Stem if resnet_d else PlainStem)(stem_width, stem_stride, stem_pool_stride)
        channels, rates, stages = self.stem.out_channels, iter(drop_path), []
        for stage, count in enumerate(blocks):
            width = divisible(64 * 2**stage * width_multiplier)
            layers = []
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(Bottleneck(channels, width, stride, se_ratio, next(rates), resnet_d))
                channels = width * EXPANSION
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        self._batch_norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        for bn in self._batch_norms:
            bn.counts = False
        self._initialise(seed, ZERO_INITS[zero_init])
        torch.set_rng_state(before)  # PyTorch's layers have drawn weights that are replaced above

    def _initialise(self, seed: int, zeroed: str) -> None:
        """Draw the weights of each layer from a generator of its own, which ``seed`` and the layer's name decide.

        So two networks from one seed begin with the same weights wherever their layers have the same names and shapes,
        and whatever is drawn afterwards is the same for both: what they differ in is what is compared.
        """
        for name, module in self.named_modules():
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.Linear):  # as nn.Linear does
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, Bottleneck) and zeroed:
                nn.init.zeros_(module.get_submodule(zeroed).weight)
        nn.init.normal_(self.fc.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.fc.bias)

    def freeze(self, parts: Sequence[str]) -> None:
        """Keep parts of the body, named as in :func:`body_parts`, as they are.

        Their parameters take no gradients, and they stay in evaluation mode: batch norm uses its running averages and
        leaves them alone, and no block is dropped.

        Raises:
            ValueError: an unknown part.
        """
        known = dict(zip(body_parts(len(self.stages)), (self.stem, *self.stages), strict=True))
        unknown = [part for part in parts if part not in known]
        _require(not unknown, "parts", f"some of {', '.join(known)}", ", ".join(unknown))
        self._frozen = [known[part] for part in parts]
        for part in self._frozen:
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNetRS:
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (N, 3, H, W), normalised. Returns logits (N, num_classes)."""
        features = self.stages(self.stem(x)).mean(dim=(2, 3))
        count_batch(self._batch_norms)
        return self.fc(dropout(features, self.dropout, self.training, self.ranks))

    def summary(self, image_size: tuple[int, int] = (32, 32)) -> Summary:
        """Count the model at an input size, (height, width) in pixels. Runs on the meta device: no arithmetic."""
        twin = copy.deepcopy(self).to("meta").train()
        own = {p.untyped_storage()._cdata for p in [*twin.parameters(), *twin.buffers()]}
        # By storage, its bytes; the tensor is held so that its address is not reused.
        kept: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        batch = 2  # batch norm refuses a single value a channel, which one image gives where its map is one pixel
        images = torch.empty(batch, 3, *image_size, device="meta").to(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            twin(images)
        parameters = list(self.parameters())
        return Summary(
            parameters=sum(p.numel() for p in parameters),
            parameter_tensors=len(parameters),
            multiply_adds=counter.get_total_flops() // 2 // batch,
            activation_bytes=sum(nbytes for nbytes, _ in kept.values()) // batch,
            image_size=image_size,
        )


@dataclass(frozen=True)
class Summary:
    """The size and cost of a model. ``str()`` describes them in one paragraph."""

    parameters: int
    parameter_tensors: int
    multiply_adds: int  # of convolutions and matrix products, a forward pass of one image
    activation_bytes: int  # float32 tensors that one image keeps for the backward pass
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        return (
            f"{self.parameters:,} parameters in {self.parameter_tensors} tensors; at {height}x{width} pixels "
            f"{self.multiply_adds / 1e6:,.1f} M multiply-adds an image forward, "
            f"{self.activation_bytes / 2**20:,.1f} MiB of float32 activations an image kept for the backward pass"
        )


def resnet_rs(
    depth: int = 50,
    num_classes: int = 10,
    *,
    blocks: Sequence[int] | None = None,
    stem_width: int = 32,
    stem_stride: int = 2,
    stem_pool_stride: int = 2,
    width_multiplier: float = 1.0,
    se_ratio: float = 0.25,
    drop_path: float = 0.0,
    drop_path_rule: str = "tf",
    dropout: float = 0.25,
    zero_init: str = "last",
    resnet_d: bool = True,
) -> ResNetRS:
    """Build a ResNet-RS.

    Args:
        depth: one of :data:`DEPTHS`; ignored where ``blocks`` is given.
        num_classes: outputs of the classifier.
        blocks: blocks in each stage; the first stage keeps the resolution, each later one halves it.
        stem_width: channels of the first two stem convolutions; the third and the strided one have twice as many.
        stem_stride, stem_pool_stride: 1 or 2. At 32x32 pixels, 2 and 2 leave maps of 8, 4, 2 and 1 pixels a side.
        width_multiplier: scales the widths of the stages, rounded to multiples of 8 (not the stem's).
        se_ratio: hidden channels of squeeze-and-excite over a block's output channels, rounded to multiples of 8;
            0 for blocks without it.
        drop_path: rate of stochastic depth. ``drop_path_rule`` spreads it: ``"tf"`` as the authors' code does, constant
            in a stage, ``drop_path * (i / 5)`` for i = 2 ... 5; ``"timm"``, growing linearly over the blocks from 0.
        dropout: rate before the classifier.
        zero_init: the batch norm of each block whose weight begins at zero. ``"last"``: the third, after which nothing
            but the sum follows, so that a block begins as its shortcut and learns from the second step on.
            ``"middle"``: the second, as the report's code had it. It feeds a ReLU, whose output and gradient are then
            zero, so no weight of the branch ever changes. ``"none"``: all begin at one.
        resnet_d: the stem and the shortcuts of ResNet-D. Without it they are ResNet's: a 7x7 convolution of
            ``2 * stem_width`` channels and stride ``stem_stride``, a max-pool of stride ``stem_pool_stride``, and
            shortcuts that stride in their 1x1 convolution.


    Raises:
        ValueError: an argument is out of its range; the message names it and the range.
    """
    if blocks is None:
        if depth not in DEPTHS:
            raise SettingsError(f"depth: expected one of {', '.join(map(str, DEPTHS))}, or blocks=...; got {depth}")
        blocks = DEPTHS[depth]
    blocks = tuple(blocks)
    _require(
        len(blocks) >= 1 and all(int(b) == b and b >= 1 for b in blocks), "blocks", "one or more counts >= 1", blocks
    )
    _require(num_classes >= 1, "num_classes", "at least 1", num_classes)
    _require(stem_width >= 1, "stem_width", "at least 1", stem_width)
    _require(stem_stride in (1, 2), "stem_stride", "1 or 2", stem_stride)
    _require(stem_pool_stride in (1, 2), "stem_pool_stride", "1 or 2", stem_pool_stride)
    _require(width_multiplier > 0, "width_multiplier", "a positive number", width_multiplier)
    _require(se_ratio >= 0, "se_ratio", "a number >= 0", se_ratio)
    _require(0 <= drop_path < 1, "drop_path", "a number in [0, 1)", drop_path)
    _require(
        drop_path_rule in DROP_PATH_RULES, "drop_path_rule", f"one of {', '.join(DROP_PATH_RULES)}", drop_path_rule
    )
    _require(0 <= dropout < 1, "dropout", "a number in [0, 1)", dropout)
    _require(zero_init in ZERO_INITS, "zero_init", f"one of {', '.join(ZERO_INITS)}", zero_init)
    return ResNetRS(
        blocks,
        num_classes,
        stem_width=stem_width,
        stem_stride=stem_stride,
        stem_pool_stride=stem_pool_stride,
        width_multiplier=width_multiplier,
        se_ratio=se_ratio,
        drop_path=drop_path_rates(blocks, drop_path, drop_path_rule),
        dropout=dropout,
        zero_init=zero_init,
        resnet_d=resnet_d,
    )


def drop_path_rates(blocks: Sequence[int], rate: float, rule: str) -> list[float]:
    """The stochastic-depth rate of every block, in order. See :func:`resnet_rs` for the rules."""
    if rule == "tf":
        return [rate * (stage + 2) / (len(blocks) + 1) for stage, count in enumerate(blocks) for _ in range(count)]
    total = sum(blocks)
    return [rate * i / max(total - 1, 1) for i in range(total)]


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise SettingsError(f"{name}: expected {expected}; got {got!r}")
