"""What an operator is said to launch and to move, against the launchers themselves and against counts by hand."""

import pytest
import torch
from torch import Tensor

from rsengine.checks.costs import H100_BYTES, LAUNCH_SECONDS, kernels_of, predict
from rsengine.checks.trace import Operand, Operation, cost_of
from rsengine.kernels.jit import batch_norm, block_epilogue, squeeze_excite
from rsengine.kernels.proof.offline import compiling_for

# ResNet-RS-50 at stem stride 2 and batch 128, its first stage at stem stride 1, and maps of every form.
STAGES = [(128, 256, 8), (128, 512, 4), (128, 1024, 2), (128, 2048, 1), (16, 256, 16), (3, 64, 56)]


def maps(n, channels, side, count=1):
    made = [torch.zeros(n, channels, side, side, dtype=torch.bfloat16) for _ in range(count)]
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def vectors(channels, count):
    return [torch.ones(channels) for _ in range(count)]


def operation(name, *arguments, nbytes=0):
    operands = [
        Operand(tuple(t.shape), t.stride(), 0, t.dtype, "cuda", ()) if isinstance(t, Tensor) else repr(t)
        for t in arguments
    ]
    return Operation(name, tuple(operands), None, None, (), True, nbytes)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_batch_norm_launches_what_is_said(stage):
    x, dy = maps(*stage, 2)
    w, b, mean, var = vectors(stage[1], 4)
    with compiling_for("sm_90") as launches:
        saved = batch_norm.forward(x, w, b, mean, var, 0.1, 1e-5, True)[1:]
        forward = len(launches)
        batch_norm.backward(dy, x, w, b, *saved, True)
    assert kernels_of(operation("rsengine.batch_norm", x, w, b, mean, var, 0.1, 1e-5, True)) == forward
    assert kernels_of(operation("rsengine.batch_norm_backward", dy, x, w, b, *saved, True)) == len(launches) - forward


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_the_block_epilogue_launches_what_is_said(stage):
    n, channels, side = stage
    x, shortcut, dy = maps(*stage, 3)
    hidden = channels // 4
    w1, b1, w2, b2 = (
        torch.zeros(s, dtype=torch.bfloat16) for s in ((hidden, channels), hidden, (channels, hidden), channels)
    )
    batch_norms = vectors(channels, 4)
    fused = block_epilogue.plan(n, side * side, channels, hidden, x.dtype, w1.dtype).is_fused
    with compiling_for("sm_90") as launches:
        y, *saved = block_epilogue.forward(x, shortcut, *batch_norms, w1, b1, w2, b2, None, 0.1, 1e-5)
        forward = len(launches) + (0 if fused else 2)  # two products of the library
        done = len(launches)
        given = dy, x, y, *batch_norms[:2], w1, w2, None, *saved
        block_epilogue.backward(*given, b1.dtype, b2.dtype)
        backward = len(launches) - done + (0 if fused else 3)  # two, and the gradient of a ReLU
    name = "rsengine.batch_norm_squeeze_excite_residual"
    assert kernels_of(operation(name, x, shortcut, *batch_norms, w1, b1, w2, b2)) == forward
    assert kernels_of(operation(f"{name}_backward", *given)) == backward


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_squeeze_excite_launches_what_is_said(stage):
    x, shortcut, dy = maps(*stage, 3)
    channels, hidden = stage[1], stage[1] // 4
    w1, b1, w2, b2 = (torch.zeros(s) for s in ((hidden, channels), hidden, (channels, hidden), channels))
    with compiling_for("sm_90") as launches:
        y, *saved = squeeze_excite.forward(x, w1, b1, w2, b2, shortcut, None)
        forward = len(launches)
        squeeze_excite.backward(dy, x, y, w1, w2, None, *saved, x.dtype)
    assert kernels_of(operation("rsengine.squeeze_excite", x, w1, b1, w2, b2, shortcut)) == forward
    given = operation("rsengine.squeeze_excite_backward", dy, x, y, w1, w2, *saved)
    assert kernels_of(given) == len(launches) - forward


def test_bytes_are_counted_once_and_twice_where_a_tensor_is_changed():
    a, b = torch.zeros(10), torch.zeros(10)
    add, add_, copy_ = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.copy_.default
    assert cost_of(add, (a, b), {}, torch.zeros(10)) == (120, 0)
    assert cost_of(add, (a, a), {}, torch.zeros(10)) == (80, 0)
    assert cost_of(add_, (a, b), {}, a) == (120, 0)
    assert cost_of(copy_, (a, b), {}, a) == (80, 0)
    x, w = torch.zeros(4, 5), torch.zeros(5, 6)
    assert cost_of(torch.ops.aten.mm.default, (x, w), {}, torch.zeros(4, 6)) == (296, 2 * 4 * 5 * 6)


def test_foreach_operators_launch_a_kernel_for_so_many_tensors():
    scalars = [torch.zeros(()) for _ in range(111)]
    assert kernels_of(operation("aten._foreach_add_.Scalar", *scalars[:110], 1)) == 1
    assert kernels_of(operation("aten._foreach_add_.Scalar", *scalars, 1)) == 2
    assert kernels_of(operation("aten._foreach_copy_", *scalars[:64], *scalars[:64])) == 1
    assert kernels_of(operation("aten._foreach_sub_.List", *scalars[:65], *scalars[:65])) == 2


def test_a_step_takes_the_largest_of_its_times_operator_by_operator():
    small = operation("aten.add.Tensor", torch.zeros(1), nbytes=12)
    large = operation("aten.add.Tensor", torch.zeros(1), nbytes=int(H100_BYTES))
    view = Operation("aten.view", (), None, None, (), False)
    found = predict([small, view, large])
    assert (found.operators, found.kernels, found.bytes) == (2, 2, 12 + int(H100_BYTES))
    assert found.seconds == pytest.approx(LAUNCH_SECONDS + 1)


def test_of_resident_data_only_a_batch_is_read():
    images, indices = torch.zeros(1000, 4, 4, 3, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    moved = images.nbytes + indices.nbytes + 960
    assert predict([operation("rsengine.augment_batch", images, indices, nbytes=moved)]).bytes == 480 + 80 + 960
