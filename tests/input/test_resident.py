"""Resident data: the batches of the loaders, byte for byte, from the step counter alone."""

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rsengine import train as train_module
from rsengine.augment.from_recipe import training_augmentations
from rsengine.config import AugmentSection, Recipe
from rsengine.data import convert
from rsengine.data.beton.reader import BetonReader
from rsengine.device import Execution
from rsengine.input import resident as module
from rsengine.input.choose import choose_loader
from rsengine.input.resident import ResidentData, load_resident, read_images, step_orders
from rsengine.kernels import PolicyTables
from rsengine.kernels.dispatch import assume_triton
from rsengine.run.checkpoint import load_checkpoint
from tests.conftest import draw_classes

CPU = Execution(torch.device("cpu"), None, 1, "test")
AUGMENT = AugmentSection(crop_padding=4, flip=True, cutout_holes=2, cutout_size=7)


def recipe(seed=3, epochs=2, batch_size=16, limit=0, augment=AUGMENT):
    train = replace(Recipe().train, seed=seed, epochs=epochs, batch_size=batch_size, limit_train_batches=limit)
    return Recipe(augment=augment, train=train)


def streamed(dataset, recipe, epoch, start=0):
    train = recipe.train
    loader = choose_loader("auto").open(
        dataset.train_beton,
        train.batch_size,
        augmentations=training_augmentations(recipe.augment, dataset.mean, train.seed),
        shuffle=True,
        drop_last=True,
        seed=train.seed,
    )
    return list(loader.epoch(epoch, start=start))


def batch(resident, step):
    return resident(torch.tensor(step))


def small(augment=AUGMENT):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8))
    wanted = recipe(seed=1, epochs=3, batch_size=8, augment=augment)
    return ResidentData(wanted, images, torch.arange(40), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), CPU, 5)


# --- the same as the stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [AUGMENT, AugmentSection(crop_padding=0, flip=False)], ids=["augmented", "plain"])
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_two_epochs_equal_the_stream_byte_for_byte(toy_dataset, augment, seed):
    wanted = recipe(seed=seed, augment=augment)
    resident = load_resident(toy_dataset, wanted, CPU)
    assert resident.steps_per_epoch == 9
    step = 0
    for epoch in range(2):
        for images, labels in streamed(toy_dataset, wanted, epoch):
            ours, our_labels = batch(resident, step)
            assert torch.equal(ours, images) and torch.equal(our_labels, labels)
            assert ours.dtype == torch.uint8 and our_labels.dtype == torch.int64
            step += 1
    assert step == 18


def test_the_counter_decides_so_a_run_goes_on_in_the_middle_of_an_epoch(toy_dataset):
    rest = streamed(toy_dataset, recipe(), epoch=1, start=5)
    resumed = load_resident(toy_dataset, recipe(), CPU)  # of a new process: no step was taken with it
    for step, (images, labels) in enumerate(rest, start=9 + 5):
        ours, our_labels = batch(resumed, step)
        assert torch.equal(ours, images) and torch.equal(our_labels, labels)


def test_with_a_limit_on_the_batches_an_epoch_is_the_beginning_of_its_order(toy_dataset):
    resident = load_resident(toy_dataset, recipe(limit=4), CPU)
    assert resident.steps_per_epoch == 4
    images, labels = streamed(toy_dataset, recipe(), epoch=1)[0]
    ours, our_labels = batch(resident, 4)
    assert torch.equal(ours, images) and torch.equal(our_labels, labels)


def test_jpeg_images_are_those_of_the_loader(tmp_path):
    draw_classes(tmp_path / "source" / "train", 10, seed=0)
    draw_classes(tmp_path / "source" / "test", 3, seed=1)
    dataset = convert(tmp_path / "source", tmp_path / "out", image_format="jpg", progress=False, log=lambda line: None)
    wanted = recipe(batch_size=7)
    resident = load_resident(dataset, wanted, CPU)
    for step, (images, labels) in enumerate(streamed(dataset, wanted, 0)):
        ours, our_labels = batch(resident, step)
        assert torch.equal(ours, images) and torch.equal(our_labels, labels)


def test_read_images_gives_the_file(toy_dataset):
    images, labels = read_images(toy_dataset.test_beton)
    reader = BetonReader(toy_dataset.test_beton)
    assert images.shape == (21, 32, 32, 3) and (labels.numpy() == reader.labels).all()
    assert all((images[i].numpy() == reader.image(i)).all() for i in range(21))


# --- the step's rules -----------------------------------------------------------------------------------------------


def test_each_epoch_has_every_image_once_in_its_own_order():
    orders = step_orders(seed=1, count=40, batch_size=8, epochs=3, steps_per_epoch=5).reshape(3, 40)
    assert (np.sort(orders) == np.arange(40)).all()
    assert len({tuple(order) for order in orders}) == 3


def test_a_batch_owns_its_memory_and_the_data_set_stays_as_it_is():
    for augment in (AUGMENT, AugmentSection(crop_padding=0, flip=False)):
        resident = small(augment=augment)
        before = resident.images.clone(), resident.labels.clone(), resident.orders.clone()
        images, labels = batch(resident, 2)
        images.zero_(), labels.zero_()
        after = resident.images, resident.labels, resident.orders
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Operations(TorchDispatchMode):
    """Names the operations, and the shapes of what they give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.seen.append((str(function), tuple(result.shape) if isinstance(result, torch.Tensor) else None))
        return result


def test_every_step_is_the_same_operations_on_the_same_shapes():
    resident, counter, sequences = small(), torch.tensor(0), []
    for _ in range(15):
        with Operations() as operations:
            resident(counter)
        counter.add_(1)
        sequences.append(operations.seen)
    assert all(sequence == sequences[0] for sequence in sequences)
    names = {name.split(".")[1] for name, _ in sequences[0]}
    # Reading a value, or making a tensor on the host: a graph could not hold either.
    assert not names & {"_local_scalar_dense", "item", "nonzero", "lift_fresh", "scalar_tensor", "is_nonzero"}, names


@pytest.mark.parametrize("policy", ["none", "autoaugment", "augmix"])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "triton"])
def test_it_runs_on_a_device_that_has_no_values_and_stays_on_it(policy, fused):
    """Fake tensors of a CUDA device raise for a value that is asked for and for operands on two devices."""
    wanted = small(augment=replace(AUGMENT, policy=policy, policy_interpolation="bilinear"))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        device = torch.device("cuda")

        def move(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        wanted.images, wanted.labels, wanted.orders = (move(t) for t in (wanted.images, wanted.labels, wanted.orders))
        if policy != "none":
            wanted.augment.policy = PolicyTables(*map(move, wanted.augment.policy))
        with assume_triton() if fused else contextlib.nullcontext():
            images, labels = wanted(torch.zeros((), dtype=torch.int64, device=device))
        assert images.shape == (8, 9, 7, 3) and labels.shape == (8,)
        assert images.device.type == labels.device.type == "cuda" and mode is not None


# --- whole runs -----------------------------------------------------------------------------------------------------


RUN = """
name = "toy"
[model]
blocks = [1]
width_multiplier = 0.25
stem_width = 8
[schedule]
learning_rate = 0.2
[augment]
cutout_holes = 1
[train]
epochs = 2
batch_size = 16
eval_batch_size = 10
"""


@pytest.fixture
def command(tmp_path, toy_dataset, monkeypatch):
    """Trains by the command; gives the exit status and the state of the last checkpoint's step."""
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(RUN)

    def run(out, *arguments):
        options = ["--recipe", "toy.toml", "--device", "cpu", "--out", out, "--data", str(toy_dataset.folder)]
        status = train_module.main([*options, *arguments])
        return status, load_checkpoint(Path(out) / "checkpoint.pt")["step"]

    return run


def assert_same_weights(one, other):
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    assert torch.equal(one["counter"], other["counter"])


def test_a_run_equals_a_streamed_one_and_can_stop_in_the_middle_of_an_epoch(command, monkeypatch):
    status, streamed = command("streamed")
    assert status == 0
    resident = ["--set", "train.loader=resident"]
    status, whole = command("whole", *resident)
    assert status == 0 and int(whole["counter"]) == 18
    assert_same_weights(streamed, whole)

    make = ResidentData.__call__

    def stopping(self, counter):
        if int(counter) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, counter)

    with monkeypatch.context() as patch:
        patch.setattr(ResidentData, "__call__", stopping)
        status, stopped = command("parts", *resident)
    assert status == 128 + signal.SIGINT and int(stopped["counter"]) == 13  # the second epoch's fifth step
    status, resumed = command("parts", *resident, "--resume")
    assert status == 0
    assert_same_weights(whole, resumed)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_set_that_does_not_fit_is_refused_before_it_is_read(toy_dataset, monkeypatch):
    def unread(path):
        raise AssertionError("the pixels were read")

    monkeypatch.setattr(module, "read_images", unread)
    needed = (150 + 21) * (32 * 32 * 3 + 8) + 4 * 2 * 144  # both sets, and the orders of the epochs
    monkeypatch.setattr(module, "free_memory", lambda device: needed - 1)
    with pytest.raises(
        ValueError, match=r"train\.loader: 'resident' needs .* on cpu .* are free; use train\.loader=auto"
    ):
        load_resident(toy_dataset, recipe(), CPU)
    monkeypatch.setattr(module, "free_memory", lambda device: needed)
    with pytest.raises(AssertionError, match="were read"):
        load_resident(toy_dataset, recipe(), CPU)


def test_orders_above_the_limit_are_refused(toy_dataset, monkeypatch):
    monkeypatch.setattr(module, "ORDER_LIMIT", 4 * 144 * 2)
    load_resident(toy_dataset, recipe(epochs=2), CPU)
    with pytest.raises(ValueError, match=r"3 epochs of 144 images need 1,728; use fewer train\.epochs"):
        load_resident(toy_dataset, recipe(epochs=3), CPU)


def test_images_of_several_sizes_are_refused(toy_dataset):
    with pytest.raises(ValueError, match="images of one size.*convert them again with --size"):
        load_resident(replace(toy_dataset, image_size=None), recipe(), CPU)


def test_fewer_images_than_a_batch_are_refused(toy_dataset):
    with pytest.raises(ValueError, match=r"train\.batch_size: 150 images cannot fill 1 batch of 200"):
        load_resident(toy_dataset, recipe(batch_size=200), CPU)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(8, 3, 9, 7, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), "images: expected"),
        (torch.zeros(8, 9, 7, 3), torch.zeros(8, dtype=torch.int64), "images: expected"),
        (torch.zeros(8, 9, 7, 3, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64), "labels: expected"),
        (torch.zeros(8, 9, 7, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int32), "labels: expected"),
    ],
)
def test_tensors_of_another_kind_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ResidentData(recipe(batch_size=4), images, labels, (0, 0, 0), (1, 1, 1), CPU, 2)
