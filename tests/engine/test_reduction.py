"""The gradients of several processes in one buffer."""

import pytest
import torch

from rsengine.engine.reduction import ALIGNMENT, GradientReduction
from tests.parallel.processes import processes


@pytest.fixture(scope="module")
def pair():
    with processes(2) as run:
        yield run


SHAPES = [(5, 3, 3, 3), (7,), (300, 2), ()]


def reduced(ranks, wire):
    """Gradients of some leaves, and an average, before and after they are reduced; with the facts of the buffer."""
    generator = torch.Generator().manual_seed(ranks.rank)
    leaves = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    leaves[0] = torch.zeros(SHAPES[0]).contiguous(memory_format=torch.channels_last).requires_grad_()
    average = torch.randn(4, generator=generator)
    reduction = GradientReduction(leaves, [average], ranks, wire)
    results = []
    for _ in range(2):
        given = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for leaf, grad in zip(leaves, given, strict=True):
            leaf.grad = grad.clone()
        before = average.clone()
        reduction.reduce()
        results.append((given, before, [leaf.grad.clone() for leaf in leaves], average.clone()))
    (flat,) = reduction.flat
    begin = flat.data_ptr()
    places = [(leaf.grad.data_ptr() - begin, leaf.grad.stride() == leaf.stride()) for leaf in leaves]
    outside = flat.count_nonzero() - sum(leaf.grad.count_nonzero() for leaf in leaves)
    return results, places, int(outside), reduction.nbytes, flat.numel(), reduction.is_shared


@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16])
def test_gradients_become_slices_of_their_sum(pair, wire):
    found = pair(reduced, wire)
    for (given, before, grads, average), (other, before_other, grads_other, average_other) in zip(
        found[0][0], found[1][0], strict=True
    ):
        for g, h, mine, theirs in zip(given, other, grads, grads_other, strict=True):
            assert torch.equal(mine, theirs)
            if wire == torch.bfloat16:
                torch.testing.assert_close(mine, g + h, rtol=2**-7, atol=2**-7 * float((g.abs() + h.abs()).max()))
            else:
                assert torch.equal(mine, g + h)
        assert torch.equal(average, average_other)
        torch.testing.assert_close(average, (before + before_other) / 2)
    for _, places, outside, nbytes, length, is_shared in found:
        assert [place % ALIGNMENT for place, _ in places] == [0] * len(SHAPES) and all(same for _, same in places)
        assert outside == 0 and nbytes == length * (2 if wire == torch.bfloat16 else 4)
        assert is_shared == (wire != torch.bfloat16)
