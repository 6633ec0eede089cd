"""The baseline of the speedrun: timm's network in a plain loop."""

import timm
import torch

from bench.baselines import MEAN, STD
from bench.speedrun.timm import BATCH, PEAK_RATE, Pictures, TimmRun, batches, measure


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnetrs50", num_classes=3, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], stem_width=8)


def data(count: int) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    # Not smaller: the library's bfloat16 gradients of strided convolutions of one pixel are rubbish at times.
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Pictures(images, torch.arange(count) % 3)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    pictures = data(2 * BATCH)
    whole = TimmRun(small(), 4, compile=False)
    losses, rates = [], []
    for batch in [batch for epoch in (0, 1) for batch in batches(pictures, epoch, 2)]:
        rates += whole.schedule.get_last_lr()
        losses.append(whole.step(*batch)[0])
    first = TimmRun(small(), 4, compile=False)
    halves = [first.step(*batch)[0] for batch in batches(pictures, 0, 2)]
    first.save(tmp_path / "timm.pt", 1, 2.5)
    second = TimmRun(small(), 4, compile=False)
    assert second.restore(tmp_path / "timm.pt") == (1, 2.5)
    halves += [second.step(*batch)[0] for batch in batches(pictures, 1, 2)]
    assert losses == halves and len(losses) == 4
    assert whole.schedule.get_last_lr() == second.schedule.get_last_lr() and rates[-1] < PEAK_RATE / 1000
    for name, tensor in whole.ema.module.state_dict().items():
        assert torch.equal(tensor, second.ema.module.state_dict()[name]), name
        assert tensor.dtype != torch.float32 or not torch.equal(tensor, small().state_dict()[name]) or "num" in name


def test_an_epoch_shows_each_image_once_and_only_as_many_batches_as_asked():
    pictures = data(3 * BATCH)
    pictures.labels = torch.arange(3 * BATCH)
    labels = [torch.cat([labels for _, labels in batches(pictures, epoch, 3)]) for epoch in (0, 1)]
    assert sorted(labels[0].tolist()) == list(range(3 * BATCH)) and not torch.equal(*labels)
    assert len(list(batches(pictures, 0, 1))) == 1


def test_pixels_are_normalised_in_training_as_in_measuring():
    grey = torch.full((1, 8, 8, 3), 128, dtype=torch.uint8)
    pictures = Pictures(grey, torch.zeros(1, dtype=torch.int64))
    expected = [(128 / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    crops = torch.stack([pictures[0][0] for _ in range(20)])
    # What is not the black border of a shifted crop is the grey, normalised.
    assert torch.allclose(crops.amax((0, 2, 3)), torch.tensor(expected), atol=1e-5)
    assert (crops.amin((0, 2, 3)) < 0).all()


def test_measuring_changes_nothing_and_counts_the_last_small_batch():
    model, images = small().train(), torch.zeros(501, 8, 8, 3, dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.fc.bias[:] = torch.tensor([0.0, 50.0, 0.0])
    before["fc.bias"] = model.fc.bias.detach().clone()
    loss, accuracy = measure(model, images, torch.arange(501) % 3)
    assert accuracy == 167 / 501 and loss > 10
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
