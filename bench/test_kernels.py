"""Each op at the real shapes of a step: reference, eager, torch.compile and Triton, forward and forward + backward."""

import pytest
import torch

from bench.measure import DEVICE, IMPLEMENTATIONS, implementation, measure, rotation
from rsengine.kernels import (
    batch_norm,
    batch_norm_squeeze_excite_residual,
    ema_update,
    label_smoothed_cross_entropy,
    reference,
    sgd_ema_step,
    squeeze_excite_residual,
)
from rsengine.model import resnet_rs

STAGES = [(128, 256, 8), (128, 512, 4), (128, 1024, 2), (128, 2048, 1)]  # ResNet-RS-50 at 32x32: batch, channels, side
LOGITS = [(512, 10), (512, 100), (512, 1000), (128, 50_257)]

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
both_passes = pytest.mark.parametrize("with_backward", [False, True], ids=["forward", "forward+backward"])


def maps(shape):
    """x, shortcut and dy of a stage."""
    n, c, side = shape
    made = (torch.randn(n, c, side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def on_maps(function, next_maps, leaves, with_backward):
    """A run of ``function``, and of its backward pass, on ``leaves(x, shortcut)`` of the next maps."""

    def run():
        x, shortcut, dy = next_maps()
        with torch.autocast(DEVICE.type, torch.bfloat16), torch.set_grad_enabled(with_backward):
            tensors = [t.requires_grad_(with_backward) for t in leaves(x, shortcut)]
            y = function(*tensors)
        if with_backward:
            torch.autograd.grad(y, tensors, dy)

    return run


def squeeze_excite_weights(c, dtype=torch.float32):
    return [torch.randn(*s, device=DEVICE).mul_(0.05).to(dtype) for s in [(c // 4, c), (c // 4,), (c, c // 4), (c,)]]


@every_implementation
@both_passes
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_squeeze_excite_residual(benchmark, shape, with_backward, impl):
    n, c, side = shape
    weights, next_maps = squeeze_excite_weights(c), rotation(lambda: maps(shape))

    def runner(function):
        return on_maps(function, next_maps, lambda x, shortcut: [x, *weights, shortcut], with_backward)

    run = runner(implementation(impl, squeeze_excite_residual, reference.squeeze_excite_residual))
    eager = runner(implementation("eager", squeeze_excite_residual, reference.squeeze_excite_residual))
    # Read x and shortcut, write y; backward: read x, y and dy, write the gradients of x and shortcut. 2 bytes each.
    measure(benchmark, run, 2 * (3 + 5 * with_backward) * n * c * side * side, eager=eager)


@pytest.mark.parametrize("impl", ["reference", "eager", "native", "triton"])
@both_passes
@pytest.mark.parametrize("shape", STAGES, ids=str)
@pytest.mark.parametrize("op", [batch_norm, batch_norm_squeeze_excite_residual], ids=lambda op: op.__name__)
def test_batch_norm(benchmark, op, shape, with_backward, impl):
    n, c, side = shape
    epilogue = op is batch_norm_squeeze_excite_residual
    scale = [torch.randn(c, device=DEVICE) for _ in range(2)]
    buffers = torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE)
    # On a GPU a step has copies of the weights in bfloat16.
    weights = squeeze_excite_weights(c, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    next_maps = rotation(lambda: maps(shape))

    def leaves(x, shortcut):
        return [x, *scale, *((*weights, shortcut) if epilogue else ())]

    def runner(function):
        def call(x, weight, bias, *rest):
            return function(x, weight, bias, *buffers, *(rest or (0.1, 1e-5, True)))

        return on_maps(call, next_maps, leaves, with_backward)

    run = runner(implementation(impl, op, getattr(reference, op.__name__)))
    eager = runner(implementation("eager", op, getattr(reference, op.__name__)))
    # The passes counted in kernels/batch_normalization.py and block_epilogue.py, of 2 bytes each; of small maps Triton
    # needs fewer, so that its rate can pass a copy's.
    passes = 4 + 8 * with_backward if epilogue else 3 + 5 * with_backward
    measure(benchmark, run, 2 * passes * n * c * side * side, eager=eager)


@every_implementation
@both_passes
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_label_smoothed_cross_entropy(benchmark, shape, with_backward, impl):
    n, classes = shape
    target = torch.randint(0, classes, (n,), device=DEVICE)
    next_inputs = rotation(lambda: [torch.randn(n, classes, device=DEVICE)])

    def runner(function):
        def run():
            (logits,) = next_inputs()
            with torch.set_grad_enabled(with_backward):
                loss, correct = function(logits.requires_grad_(with_backward), target, 0.1)
            if with_backward:
                torch.autograd.grad(loss, logits)
            return correct

        return run

    run = runner(implementation(impl, label_smoothed_cross_entropy, reference.label_smoothed_cross_entropy))
    eager = runner(implementation("eager", label_smoothed_cross_entropy, reference.label_smoothed_cross_entropy))
    measure(benchmark, run, 4 * (1 + with_backward) * n * classes, eager=eager)


@pytest.fixture(scope="module")
def model_tensors():
    """(params, grads, momentum buffers, shadow) of ResNet-RS-50: 234 tensors, 33.7 million parameters."""
    params = [p.detach().to(DEVICE) for p in resnet_rs(50).parameters()]
    return params, *([torch.randn_like(p) for p in params] for _ in range(3))


@every_implementation
def test_sgd_ema_step(benchmark, model_tensors, impl):
    params, grads, momentum, shadow = model_tensors
    lr, decay = torch.tensor(1e-3, device=DEVICE), torch.tensor(0.99, device=DEVICE)

    def runner(function):
        return lambda: function(params, grads, momentum, shadow, lr, 0.9, 4e-5, decay, True)

    weights = [torch.nn.Parameter(p) for p in params]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimiser = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, weight_decay=4e-5, nesterov=True, foreach=True)

    def foreach():
        """What people use: PyTorch's foreach SGD, then a foreach EMA."""
        optimiser.step()
        torch._foreach_lerp_(shadow, params, 0.01)

    # Ours is one opaque operation to the compiler; what a user would compile is the formula, tensor by tensor.
    run = runner(implementation(impl, sgd_ema_step, reference.sgd_ema_step, compiled=reference.sgd_ema_step))
    eager = runner(implementation("eager", sgd_ema_step, reference.sgd_ema_step))
    measure(benchmark, run, 28 * sum(p.numel() for p in params), eager=eager, foreach_sgd_and_ema=foreach)


@every_implementation
def test_ema_update(benchmark, model_tensors, impl):
    params, _, _, shadow = model_tensors
    decay = torch.tensor(0.99, device=DEVICE)

    def runner(function):
        return lambda: function(shadow, params, decay)

    run = runner(implementation(impl, ema_update, reference.ema_update, compiled=reference.ema_update))
    eager = runner(implementation("eager", ema_update, reference.ema_update))
    measure(benchmark, run, 12 * sum(p.numel() for p in params), eager=eager)
