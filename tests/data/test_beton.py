"""Writing under supervision, checking what was written, and reading it back with numpy and with FFCV."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert, load_dataset
from rsengine.data.beton import scan as scan_module
from rsengine.data.beton.reader import BetonReader
from rsengine.data.beton.scan import scan
from rsengine.data.beton.writer import Job, verify_beton, write_betons
from rsengine.data.sources.images import ArraySplit
from tests.data.data_builders import abandoned_shared_memory, class_folders, pixels

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, eq=False)
class Misbehaving(ArraySplit):
    """A split that goes wrong at sample 150, in the writer's own processes."""

    action: str = ""
    note: str = ""

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        if index == 150 and self.action:
            Path(self.note).write_text(str(os.getpid()))
            if self.action == "raise":
                raise RuntimeError("sample 150 is no good")
            if self.action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return super().load(index)


def split_of(count: int = 300) -> ArraySplit:
    return ArraySplit(pixels(count, 0, 8, 8), np.arange(count) % 10, "made up")


def job_of(folder: Path, split: ArraySplit) -> Job:
    return Job(folder / "a.beton", split, scan(split, workers=1, progress=False, description=""))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("action", "message"),
    [("raise", "sample 150 is no good"), ("die", "process of the writer died"), ("hang", "no progress for 1 s")],
)
def test_a_writer_in_trouble_is_ended(tmp_path, action, message):
    good = split_of()
    split = Misbehaving(good.images, good.labels, "made up", action=action, note=str(tmp_path / "pid"))
    job = Job(tmp_path / "a.beton", split, job_of(tmp_path, good).scan)
    abandoned = abandoned_shared_memory()
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        write_betons([job], tmp_path, workers=2, stall_seconds=1.0 if action == "hang" else 60.0)
    assert time.monotonic() - start < 15
    for _ in range(100):  # killed, but init may take a moment to bury it
        if not is_running(int((tmp_path / "pid").read_text())):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker is still running")
    assert abandoned_shared_memory() <= abandoned


def test_writer_that_cannot_start(tmp_path):
    job = job_of(tmp_path, split_of())
    with pytest.raises(DataError, match="the writer failed.*(No such file|NotFound)"):
        write_betons([replace(job, path=tmp_path / "missing" / "a.beton")], tmp_path)


def test_reader_and_verification_find_every_damage(tmp_path):
    job = job_of(tmp_path, split_of())
    write_betons([job], tmp_path)
    reader = BetonReader(job.path)
    assert reader.labels.tolist() == job.split.labels.tolist()
    for index in range(len(reader)):
        np.testing.assert_array_equal(reader.image(index), job.split.images[index])
    whole = job.path.read_bytes()
    position = int(reader.pointers[42]) + 17
    table = reader.header.table

    def damaged(content: bytes) -> None:
        job.path.write_bytes(content)
        verify_beton(job, "raw")

    damaged(whole)  # passes
    with pytest.raises(DataError, match="image 42: .* differs from the source"):
        damaged(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(DataError, match="incomplete"):
        damaged(whole[:table])  # what FFCV's own error handling leaves behind: an empty allocation table
    with pytest.raises(DataError, match="allocation table"):
        damaged(whole[:table] + whole[table + 24 : table + 48] + whole[table + 24 :])
    label = 24 + 2 * 1041 + 16
    with pytest.raises(DataError, match="labels"):
        damaged(whole[:label] + b"\x09" + whole[label + 1 :])
    with pytest.raises(DataError, match="samples"):
        job.path.write_bytes(whole)
        verify_beton(job_of(tmp_path, split_of(301)), "raw")
    with pytest.raises(DataError, match="not stored as jpg"):
        verify_beton(job, "jpg")
    for cut in (0, 10, 100, 3000):
        with pytest.raises(DataError, match="a.beton"):
            damaged(whole[:cut])


def test_many_images_from_several_processes(tmp_path, monkeypatch):
    """More than one chunk and more than one worker, decoded lazily: order, pixels and statistics stay right."""
    monkeypatch.setattr(scan_module, "FEW", 10)
    monkeypatch.setattr(scan_module, "CHUNK", 50)
    monkeypatch.setattr(scan_module, "KEEP", 100_000)  # fewer than all: the writer has to decode again
    content = class_folders(tmp_path / "pets", each=70, size=(16, 16))
    dataset = convert(tmp_path / "pets", tmp_path / "out", workers=2, log=lambda line: None)
    for split, path in (("train", dataset.train_beton), ("test", dataset.test_beton)):
        reader = BetonReader(path)
        assert reader.labels.tolist() == content[split][1]
        for index in range(len(reader)):
            np.testing.assert_array_equal(reader.image(index), content[split][0][index])
    np.testing.assert_allclose(dataset.mean, content["train"][0].mean(axis=(0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(dataset.std, content["train"][0].std(axis=(0, 1, 2)) / 255, rtol=1e-12)


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 28])
def test_kept_images_are_all_or_none(monkeypatch, limit):
    monkeypatch.setattr(scan_module, "CHUNK", 7)
    monkeypatch.setattr(scan_module, "KEEP", limit)
    split = split_of(100).resized(12)
    found = scan(split, workers=1, progress=False, description="")
    if limit < 100 * 12 * 12 * 3:
        assert found.images is None
    else:
        assert found.images is not None and found.images.shape == (100, 12, 12, 3)
        np.testing.assert_array_equal(found.images[93], split.load(93)[0])


def test_statistics_are_exact_for_hard_cases():
    """All pixels equal: the deviation must be exactly zero, which E[x²] - E[x]² in floating point does not give."""
    images = np.full((10, 33, 35, 3), (255, 201, 7), np.uint8)
    split = ArraySplit(images, np.zeros(10, np.int64), "x")
    mean, std = scan(split, workers=1, progress=False, description="").mean_and_std()
    assert mean == (1.0, 201 / 255, 7 / 255)
    assert std == (0.0, 0.0, 0.0)


def test_large_image_gets_a_page_that_holds_it(tmp_path):
    images = np.zeros((2, 1000, 3000, 3), np.uint8)
    images[1, -1, -1] = 77
    job = job_of(tmp_path, ArraySplit(images, np.array([0, 1]), "x"))
    write_betons([job], tmp_path)
    assert BetonReader(job.path).header.page_size == 1 << 24


FFCV_READ_BACK = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from rsengine.data.beton.reader import BetonReader
path, expected = sys.argv[1], BetonReader(sys.argv[1])
loader = Loader(path, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
images, labels = [], []
iterator = iter(loader)
for image, label in iterator:
    images.append(np.array(image)); labels.append(np.array(label).ravel())
images, labels = np.concatenate(images), np.concatenate(labels)
assert images.dtype == np.uint8 and images.shape == (9, 8, 8, 3), images.shape
assert labels.tolist() == expected.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
assert all((images[i] == expected.image(i)).all() for i in range(9))
print("equal")
"""


def test_ffcv_reads_the_same(tmp_path):
    class_folders(tmp_path / "pets")
    dataset = convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    result = subprocess.run(
        [sys.executable, "-c", FFCV_READ_BACK, str(dataset.train_beton)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.stdout.strip() == "equal", result.stderr


IMPORTS = """
import sys
import rsengine.data
heavy = {"ffcv", "torch", "torchvision", "pyarrow", "sklearn", "numba", "cv2"} & set(sys.modules)
assert not heavy, heavy
"""
COMMAND_LINE = """
import runpy, sys, torch
torch.set_num_threads(2)
sys.argv = ["data/convert.py", "digits", "--out", sys.argv[1]]
try:
    runpy.run_path("data/convert.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert torch.get_num_threads() == 2 and "ffcv" not in sys.modules
"""


def in_new_process(code: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_importing_costs_nothing():
    in_new_process(IMPORTS)


def test_command_line_leaves_torch_alone_and_says_what_it_made(tmp_path):
    said = in_new_process(COMMAND_LINE, tmp_path / "digits").splitlines()
    assert "1438 training and 359 test images, 10 classes, 32×32" in said[-2]
    assert said[-1] == f"Train on it with: python -m rsengine.train --data {tmp_path / 'digits'}"


def test_load_dataset_refuses_what_is_not_whole(tmp_path):
    class_folders(tmp_path / "pets")
    out = tmp_path / "out"
    convert(tmp_path / "pets", out, log=lambda line: None)
    description = (out / "dataset.json").read_text()
    beton = (out / "test.beton").read_bytes()
    with pytest.raises(DataError, match="no dataset.json"):
        load_dataset(tmp_path)
    for old, new, message in [
        ('"format_version": 1', '"format_version": 99', "version 99"),
        ('"rsengine dataset"', '"something else"', "not a description"),
        ('"train": 9', '"train": 8', "damaged"),
        ("{", "", "not a description"),
        ('"mean"', '"meen"', "damaged"),
        (description, "[]", "not a description"),
    ]:
        (out / "dataset.json").write_text(description.replace(old, new, 1))
        with pytest.raises(DataError, match=f"dataset.json: .*{message}.*convert"):
            load_dataset(out)
    (out / "dataset.json").write_text(description)
    (out / "test.beton").write_bytes(beton[:-1])
    with pytest.raises(DataError, match="test.beton: incomplete"):
        load_dataset(out)
    (out / "test.beton").write_bytes(b"x" * len(beton))
    with pytest.raises(DataError, match="test.beton: not a .beton"):
        load_dataset(out)
    (out / "test.beton").unlink()
    with pytest.raises(DataError, match="test.beton: missing"):
        load_dataset(out)


def test_scanning_in_processes_reports_the_first_bad_image_and_a_dead_worker(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(scan_module, "FEW", 10)
    class_folders(tmp_path / "pets", each=100)
    for name in ("cat/050.png", "dog/150.png"):
        (tmp_path / "pets" / "train" / name).write_bytes(b"junk")
    with pytest.raises(DataError, match="cat/050.png: not an image"):
        convert(tmp_path / "pets", tmp_path / "out", workers=2)
    good = split_of()
    split = Misbehaving(good.images, good.labels, "made up", size=8, action="die", note=str(tmp_path / "pid"))
    monkeypatch.setattr(scan_module, "CHUNK", 300)  # so that part() keeps the number of the sample
    with pytest.raises(DataError, match="decoding process died.*--workers 1"):
        scan(split, workers=2, progress=False, description="")
    assert capfd.readouterr() == ("", "")
