"""The ops at the real shapes of a ResNet-RS-50 step on 32x32 images, forward and backward, on this machine."""

import pytest
import torch

from rsengine.kernels import label_smoothed_cross_entropy, sgd_ema_step, squeeze_excite_residual
from rsengine.model import resnet_rs

STAGES = [(128, 256, 8), (128, 512, 4), (128, 1024, 2), (128, 2048, 1)]  # batch, channels, pixels a side


@pytest.mark.parametrize(("n", "c", "side"), STAGES)
def test_squeeze_excite_residual(benchmark, n, c, side):
    x, shortcut = (
        torch.randn(n, c, side, side, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    weights = [torch.randn(*shape).mul(0.05).requires_grad_() for shape in [(c // 4, c), (c // 4,), (c, c // 4), (c,)]]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = squeeze_excite_residual(x, *weights, shortcut)
        torch.autograd.grad(y, [x, *weights, shortcut], torch.ones_like(y))

    benchmark.extra_info["floor_bytes"] = 2 * (3 + 4) * x.numel()  # read x, shortcut, write y; backward likewise
    benchmark(run)


@pytest.mark.parametrize("classes", [10, 1000])
def test_label_smoothed_cross_entropy(benchmark, classes):
    logits, target = torch.randn(512, classes, requires_grad=True), torch.randint(0, classes, (512,))

    def run():
        loss, _ = label_smoothed_cross_entropy(logits, target, 0.1)
        torch.autograd.grad(loss, logits)

    benchmark(run)


def test_sgd_ema_step(benchmark):
    params = [p.detach() for p in resnet_rs(50).parameters()]
    grads, momentum, shadow = ([torch.randn_like(p) for p in params] for _ in range(3))
    lr, decay = torch.tensor(0.1), torch.tensor(0.99)
    benchmark.extra_info["floor_bytes"] = 28 * sum(p.numel() for p in params)
    benchmark(sgd_ema_step, params, grads, momentum, shadow, lr, 0.9, 4e-5, decay, True)
