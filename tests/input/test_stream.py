"""rsengine's own stream: the batches of FFCV byte for byte, a thread that is bounded and ends, and no FFCV anywhere."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rsengine.augment import SeededOperation
from rsengine.augment.from_recipe import training_augmentations
from rsengine.config import AugmentSection, Recipe
from rsengine.data import convert
from rsengine.data.beton.reader import BetonReader
from rsengine.data.errors import DataError
from rsengine.device import choose_execution
from rsengine.errors import LoaderError, SettingsError
from rsengine.input.batches import open_batches
from rsengine.input.choose import HIDE_FFCV, choose_loader
from rsengine.input.stream import BATCHES_AHEAD, StreamLoader, ahead
from tests.conftest import draw_classes, needs_ffcv

MEAN = (0.5, 0.4, 0.3)
CUTOUT = {"cutout_holes": 3, "cutout_size": 7}
TRAINING = {"shuffle": True, "drop_last": True}

# --- the same as FFCV -------------------------------------------------------------------------------------------------


@needs_ffcv
@pytest.mark.parametrize(
    ("settings", "batch", "options", "seed", "epoch", "start"),
    [
        ({"crop_padding": 0, "flip": False}, 150, {}, 0, 0, 0),  # one batch
        ({"crop_padding": 0, "flip": False}, 7, {"shuffle": True}, 2**31 - 1, 3, 20),  # a last batch of 3
        ({**CUTOUT, "cutout_fill": "mean"}, 16, TRAINING, 5, 0, 0),
        ({"crop_mode": "reflect", "alternating_flip": True}, 16, TRAINING, 5, 1, 4),
        ({"crop_padding": 40, "flip": False}, 16, TRAINING, 1, 2, 0),  # more padding than image
        ({"policy": "autoaugment", **CUTOUT}, 32, TRAINING, 0, 7, 1),
        ({"policy": "autoaugment-imagenet", "policy_interpolation": "bilinear"}, 1, TRAINING, 4, 0, 130),
        ({"policy": "autoaugment-svhn", "policy_fill": "mean"}, 149, {"shuffle": True}, 3, 0, 0),  # a last one of 1
        ({"policy": "randaugment", "randaugment_increasing": True, "randaugment_std": 0.5}, 20, TRAINING, 2, 1, 0),
        ({"policy": "trivialaugment", "crop_mode": "reflect"}, 20, {"drop_last": True}, 2, 1, 0),
        ({"policy": "augmix"}, 50, {"shuffle": True}, 2**20, 11, 2),
    ],
)
def test_its_batches_are_ffcvs_byte_for_byte(toy_dataset, settings, batch, options, seed, epoch, start):
    augmentations = training_augmentations(AugmentSection(**settings), MEAN, seed + 1)  # of another seed than the order
    theirs, ours = (
        list(
            choose_loader(kind)
            .open(toy_dataset.train_beton, batch, augmentations=augmentations, seed=seed, **options)
            .epoch(epoch, start=start)
        )
        for kind in ("ffcv", "stream")
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for tensor, expected in zip(one, other, strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@pytest.fixture(scope="module")
def jpeg_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpeg")
    draw_classes(folder / "source" / "train", 30, seed=0)
    draw_classes(folder / "source" / "test", 3, seed=1)
    return convert(folder / "source", folder / "out", image_format="jpg", progress=False, log=lambda line: None)


def test_jpeg_images_are_pillows(jpeg_dataset):
    reader = BetonReader(jpeg_dataset.train_beton)
    ((images, labels),) = StreamLoader(jpeg_dataset.train_beton, 90).epoch()
    assert (images.numpy() == np.stack([reader.image(i) for i in range(90)])).all()
    assert (labels.numpy() == reader.labels).all()


@needs_ffcv
def test_jpeg_images_are_ffcvs_but_for_some_grey_levels(jpeg_dataset):
    """FFCV decodes with a faster and less exact transform, and repeats colours where Pillow interpolates them."""
    theirs, ours = (
        list(choose_loader(kind).open(jpeg_dataset.train_beton, 20, **TRAINING, seed=1).epoch(1))
        for kind in ("ffcv", "stream")
    )
    for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, expected_labels)
        assert (images.int() - expected.int()).abs().float().mean() < 3 < 30 < images.float().std()


# --- the thread -------------------------------------------------------------------------------------------------------


def test_it_is_a_bounded_number_of_batches_ahead():
    made = []
    batches = ahead(made.append, 20, most=3)
    next(batches)
    for taken in range(1, 20):
        deadline = time.monotonic() + 10
        while len(made) < min(taken + 3, 20) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)  # for a fourth, which must not be made
        assert len(made) == min(taken + 3, 20)
        next(batches)
    assert made == list(range(20)) and next(batches, "the end") == "the end"


@pytest.mark.parametrize("taken", [0, 1, 2, 20])
def test_the_thread_ends_where_the_loop_ends(taken):
    running = threading.active_count()
    batches = ahead(lambda number: number, 20)
    assert [next(batches) for _ in range(taken)] == list(range(taken))
    batches.close()
    assert threading.active_count() == running
    assert BATCHES_AHEAD < 20


class Failing(SeededOperation):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def apply(self, images, indices, epoch=0):
        if 40 in indices:
            raise self.error
        return images


def test_an_error_in_the_thread_is_one_line_at_its_batch(toy_dataset):
    error = RuntimeError("this operation is broken\non purpose")
    batches = StreamLoader(toy_dataset.train_beton, 16, augmentations=[Failing(error)]).epoch()
    assert len(next(batches)[0]) == len(next(batches)[0]) == 16
    with pytest.raises(LoaderError) as raised:
        next(batches)
    assert str(raised.value).endswith("thread ended early: RuntimeError: this operation is broken on purpose")
    assert raised.value.__cause__ is error


def test_an_error_of_the_users_passes_as_it_is(jpeg_dataset, tmp_path):
    reader = BetonReader(jpeg_dataset.train_beton)
    damaged = bytearray(jpeg_dataset.train_beton.read_bytes())
    start = int(reader.pointers[40])
    other = reader.stored(0)[: reader.sizes[40]].copy()
    other[:4] = 0  # no JPEG any more
    damaged[start : start + len(other)] = other.tobytes()
    path = tmp_path / "damaged.beton"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="image 40 is no JPEG that can be decoded .*; convert the data set again"):
        list(StreamLoader(path, 16).epoch())
    error = DataError("a file: is damaged; convert it again")
    with pytest.raises(DataError) as raised:
        list(StreamLoader(jpeg_dataset.train_beton, 16, augmentations=[Failing(error)]).epoch())
    assert raised.value is error


# --- which loader, and why --------------------------------------------------------------------------------------------


def reasons(loader, dataset):
    recipe = Recipe().with_settings([f"train.loader={loader}", "train.batch_size=16"])
    return open_batches(recipe, dataset, choose_execution("cpu")).reason


def test_a_run_says_which_loader_it_has_and_why(toy_dataset, monkeypatch):
    assert reasons("stream", toy_dataset) == "batches from rsengine's own stream (as asked)"
    assert reasons("resident", toy_dataset) == "the whole set on cpu (as asked)"
    monkeypatch.setenv(HIDE_FFCV, "1")
    hidden = "batches from rsengine's own stream (automatic: RSENGINE_NO_FFCV hides FFCV)"
    assert reasons("auto", toy_dataset) == hidden


@needs_ffcv
def test_ffcv_is_taken_where_it_is(toy_dataset, monkeypatch):
    monkeypatch.setenv(HIDE_FFCV, "0")
    assert reasons("auto", toy_dataset) == "batches through FFCV (automatic: FFCV is installed)"
    assert reasons("ffcv", toy_dataset) == "batches through FFCV (as asked)"


def test_ffcv_by_name_is_refused_in_one_line_where_it_is_hidden(toy_dataset, monkeypatch):
    monkeypatch.setenv(HIDE_FFCV, "1")
    with pytest.raises(SettingsError) as raised:
        reasons("ffcv", toy_dataset)
    assert str(raised.value) == (
        "train.loader: 'ffcv' cannot be used: RSENGINE_NO_FFCV hides FFCV; install FFCV or use train.loader=stream"
    )


def test_an_ffcv_that_does_not_import_is_said_and_gone_without(tmp_path, monkeypatch):
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv/__init__.py").write_text("raise OSError('libopencv_core.so:\\ncannot open shared object file')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from rsengine.input.choose import choose_loader; print(choose_loader('auto').reason)"
    )
    monkeypatch.delenv(HIDE_FFCV, raising=False)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, text=True, capture_output=True)
    assert done.stdout.strip() == (
        "batches from rsengine's own stream (automatic: FFCV cannot be imported "
        "(OSError: libopencv_core.so: cannot open shared object file))"
    )


WITHOUT = """
import sys

sys.modules["ffcv"] = None  # import ffcv: ModuleNotFoundError
from rsengine import evaluate, predict, train

data, picture = sys.argv[1:]
options = ["--recipe", "digits", "--epochs", "1", "--limit-train-batches", "2", "--device", "cpu", "--out", "run"]
options += ["--set", "train.batch_size=16", "--set", "augment.policy=autoaugment"]
assert train.main([*options, "--data", data]) == 0
assert evaluate.main(["run", "--data", data, "--device", "cpu"]) == 0
assert predict.main(["run", picture, "--device", "cpu"]) == 0
assert not [name for name, module in sys.modules.items() if name.startswith("ffcv") and module is not None]
"""


def test_training_evaluating_and_predicting_need_no_ffcv(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.delenv(HIDE_FFCV, raising=False)
    picture = next((toy_dataset.folder.parent / "source").rglob("*.png"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(toy_dataset.folder), str(picture)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "32x32; batches from rsengine's own stream (automatic: FFCV is not installed)\n" in done.stdout


def test_images_of_several_sizes_are_refused(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for name, side in (("a", 20), ("b", 24)):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (side, side), (i, 0, 0)).save(tmp_path / f"source/{split}/{name}/{i}.png")
    dataset = convert(tmp_path / "source", tmp_path / "out", progress=False, log=lambda line: None)
    assert dataset.image_size is None
    with pytest.raises(LoaderError, match="expected images of one size; got several; convert them again with --size"):
        StreamLoader(dataset.train_beton, 2)
