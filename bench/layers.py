"""`python -m bench.layers`: the 3x3 convolutions of the family in bfloat16 at batch 128, part by part.

Milliseconds and GFLOP/s (padding counted as work) of PyTorch's forward pass, input gradient and weight gradient; and
the weight gradient as a product over patches, with the copy of the patches. The first table of docs/performance.md.
"""

import statistics

import torch
import torch.nn.functional as F

from bench.measure import seconds
from rsengine.model.layers import _patches

BATCH = 128
SHAPES = [  # pixels a side, channels in, channels out, stride
    (32, 32, 32, 1),
    (16, 64, 64, 1),
    (16, 128, 128, 2),
    (8, 128, 128, 1),
    (8, 256, 256, 2),
    (4, 256, 256, 1),
    (2, 512, 512, 1),
    (1, 512, 512, 1),
]


def milliseconds(run):
    run(), run()
    return 1e3 * statistics.median(seconds(run) for _ in range(7))


def main():
    print("map, in, out, stride | forward | input gradient | weight gradient | patches: copy + product")
    for side, channels, out, stride in SHAPES:
        x = torch.randn(BATCH, channels, side, side).bfloat16().to(memory_format=torch.channels_last)
        weight = torch.randn(out, channels, 3, 3).bfloat16().to(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, stride=stride, padding=1)
        dy, patches = torch.randn_like(y), _patches(x, stride)
        rows = dy.permute(0, 2, 3, 1).reshape(-1, out)

        def backward(*mask, dy=dy, x=x, weight=weight, stride=stride):
            geometry = (None, [stride] * 2, [1] * 2, [1] * 2, False, [0, 0], 1, [*mask, False])
            return torch.ops.aten.convolution_backward(dy, x, weight, *geometry)

        times = [
            milliseconds(lambda x=x, weight=weight, stride=stride: F.conv2d(x, weight, stride=stride, padding=1)),
            milliseconds(lambda backward=backward: backward(True, False)),
            milliseconds(lambda backward=backward: backward(False, True)),
        ]
        operations = 2 * y.numel() * channels * 9 / 1e6
        parts = " | ".join(f"{t:.2f} ms, {operations / t:.0f}" for t in times)
        copy = milliseconds(lambda x=x, stride=stride: _patches(x, stride))
        product = milliseconds(lambda rows=rows, patches=patches: rows.T @ patches)
        print(f"{side}x{side}, {channels}, {out}, {stride} | {parts} | {copy:.2f} + {product:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
