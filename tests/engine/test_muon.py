"""Muon against its definition by singular values, PyTorch's own Newton-Schulz, and the step that uses it."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from rsengine.engine.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised
from tests.engine.test_step import batches, build, small

SHAPES = [(8, 3, 3, 3), (8, 8, 3, 3), (32, 8, 1, 1), (8, 32, 1, 1), (16, 16, 1, 1), (40, 2, 3, 3)]  # tall, wide, square
LR = torch.tensor([0.25])


def weights(seed=0, memory_format=torch.channels_last):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).contiguous(memory_format=memory_format) for s in SHAPES]


def sphere(shape):
    return (2 * shape[1]) ** 0.5


def test_orthogonalisation_is_pytorchs():
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for ours, matrix in zip(orthogonalised(x.bfloat16()), x, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, ITERATIONS, 1e-7)
        assert (ours - theirs).abs().max() < 0.02 and theirs.abs().max() > 0.2


def test_orthogonalisation_keeps_the_singular_vectors_and_levels_the_values():
    x = torch.randn(1, 20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x[0], full_matrices=False)
    assert s.max() / s.min() > 3
    levels = u.T @ orthogonalised(x)[0] @ vh.T
    assert (levels.diagonal() > 0.68).all() and (levels.diagonal() < 1.25).all()
    assert (levels - levels.diagonal().diag()).abs().max() < 1e-10


def test_singular_values_are_levelled_as_far_down_as_the_module_says():
    s = torch.logspace(-4, 0, 400, dtype=torch.float64)
    s = torch.cat([s, (1 - s.square()).clamp(min=0).sqrt()])  # in pairs, so that each matrix below has length 1
    levels = torch.stack([orthogonalised(pair.diag()[None])[0].diagonal()[0] for pair in s.view(2, -1).T])
    high = s[:400] >= 0.018
    assert (levels[high] > 0.68).all() and (levels < 1.21).all()
    assert (levels[~high] < 41 * s[:400][~high]).all() and levels[~high].min() < 0.01


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_are_the_definition(nesterov, memory_format):
    """The same with matrices in the order of the text: out by in*height*width, singular vectors from the SVD."""
    params, buffers = weights(memory_format=memory_format), [torch.zeros(s) for s in SHAPES]
    expected, momenta = [p.clone() for p in params], [torch.zeros(s) for s in SHAPES]
    muon = Muon(params, buffers, 0.9, nesterov, torch.float32)
    for seed in range(1, 4):
        grads = weights(seed)
        muon(grads, LR)
        for i, (p, g, shape) in enumerate(zip(expected, grads, SHAPES, strict=True)):
            momenta[i] = 0.9 * momenta[i] + g
            direction = (g + 0.9 * momenta[i] if nesterov else momenta[i]).reshape(shape[0], -1)
            rows, columns = direction.shape
            wide = direction if rows <= columns else direction.T
            update = orthogonalised(wide[None].double())[0]
            update = update if rows <= columns else update.T
            moved = p - 0.25 * sphere(shape) * (update / update.norm()).reshape(shape)
            expected[i] = (moved * sphere(shape) / moved.norm()).float()
    for ours, theirs, shape in zip(params, expected, SHAPES, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.norm().item() == pytest.approx(sphere(shape), rel=1e-5)
    for ours, theirs in zip(buffers, momenta, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_gradient_and_no_momentum_move_nothing():
    params = [p * sphere(p.shape) / p.norm() for p in weights()]
    before = [p.clone() for p in params]
    Muon(params, [torch.zeros_like(p) for p in params], 0.9)([torch.zeros_like(p) for p in params], LR)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p, old)


def test_initial_weights_lie_near_their_spheres():
    step = build(small(), "optimizer.name=muon")
    for p in step.update.muon.params:
        assert p.norm().item() == pytest.approx(sphere(p.shape), rel=0.2)


def test_the_step_gives_convolutions_to_muon_and_all_else_to_sgd():
    plain, step = build(small()), build(small(), "optimizer.name=muon", "optimizer.muon_learning_rate=0.02")
    for name, p in [*plain.model.named_parameters(), *step.model.named_parameters()]:
        if name.endswith("bn3.weight"):  # zero at first, and then no gradient reaches the branch
            torch.nn.init.ones_(p)
    convolutions = [p.dim() == 4 for p in step.update.params]
    assert len(step.update.muon.params) == sum(convolutions) and 0 < sum(convolutions) < len(step.update.params)
    before, emas = ([t.detach().clone() for t in tensors] for tensors in (step.update.params, step.update.shadow))
    for one in (plain, step):
        one(*next(batches(1)))
    for ours, theirs, old, convolution in zip(
        step.update.params, plain.update.params, before, convolutions, strict=True
    ):
        assert torch.equal(ours, theirs) != convolution
        if convolution:  # a step to the side, and back onto the sphere
            angle = torch.nn.functional.cosine_similarity(ours.detach().flatten(), old.flatten(), dim=0)
            assert float(angle) == pytest.approx(1 - 0.02**2 / 2, abs=1e-4)
    decay = step.update.decay_table[0]
    for ema, p, old in zip(step.update.shadow, step.update.params, emas, strict=True):
        torch.testing.assert_close(ema, decay * old + (1 - decay) * p.detach())


def test_a_step_of_rate_zero_leaves_the_directions():
    step = build(small(), "optimizer.name=muon", "schedule.learning_rate=0")
    before = [p.detach().clone() for p in step.update.muon.params]
    step(*next(batches(1)))
    for p, old in zip(step.update.muon.params, before, strict=True):
        torch.testing.assert_close(p / p.norm(), old / old.norm())


def test_training_goes_on_from_a_saved_state():
    settings = ("optimizer.name=muon",)
    stream = list(batches(6))
    step, other = build(small(), *settings), build(small(seed=1), *settings)
    for images, labels in stream[:3]:
        step(images, labels)
    other.load_state_dict(step.state_dict())
    for images, labels in stream[3:]:
        step(images, labels)
        other(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(step.update.params, other.update.params, strict=True))
