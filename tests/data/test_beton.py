"""The .beton format against FFCV's own writer and loader, and conversion in one pass."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsengine.data import DataError, convert, load_dataset
from rsengine.data.beton import split as split_module
from rsengine.data.beton import writer as writer_module
from rsengine.data.beton.reader import METADATA, SAMPLE, BetonReader, read_header
from rsengine.data.beton.split import Measured, refuse_bad, verify_beton, write_split
from rsengine.data.sources import images as images_module
from rsengine.data.sources.images import ArraySplit, EncodedSplit
from rsengine.device import preserved_threads
from tests.data.data_builders import class_folders, pixels

REPOSITORY = Path(__file__).resolve().parents[2]


class Mixed(ArraySplit):
    """Images of several sizes, given as a list."""

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        return self.images[index], b""


def made(count: int, *size: int) -> ArraySplit:
    return ArraySplit(pixels(count, 0, *size), np.arange(count) % 10, "made up")


def mixed(*sizes: tuple[int, int]) -> Mixed:
    return Mixed([pixels(1, i, *size)[0] for i, size in enumerate(sizes)], np.arange(len(sizes)) % 3, "mixed")


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


SPLITS = {
    "one image of one pixel": lambda: made(1, 1, 1),
    "several hundred": lambda: made(300, 8, 8),
    "odd sides": lambda: made(37, 7, 5),
    "a page with two bytes left": lambda: made(111, 155, 41),
    "two images a page": lambda: made(7, 512, 512),
    "mixed sizes": lambda: mixed((3, 4), (1, 1), (700, 900), (2, 700), (800, 800), (5, 5), (600, 500)),
}


# --- FFCV -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def write_with_ffcv() -> Callable[[Path, ArraySplit, str, int, int], None]:
    """write(path, split, image_format, page_size, workers) with FFCV's DatasetWriter."""
    with preserved_threads():
        import ffcv.writer
        from ffcv.fields import IntField, RGBImageField

    class Samples:
        def __init__(self, split: ArraySplit) -> None:
            self.split = split

        def __len__(self) -> int:
            return len(self.split)

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return self.split.load(index)[0], int(self.split.labels[index])

    def write(path: Path, split: ArraySplit, image_format: str, page_size: int, workers: int) -> None:
        fields = {"image": RGBImageField(write_mode=image_format, jpeg_quality=95), "label": IntField()}
        writer = ffcv.writer.DatasetWriter(str(path), fields, page_size=page_size, num_workers=workers)
        writer.from_indexed_dataset(Samples(split), chunksize=10)

    return write


CASES = [(name, image_format) for name in SPLITS for image_format in ("raw", "jpg")]


@pytest.mark.parametrize(("split", "image_format"), [*CASES, ("more than a page of metadata", "raw")])
def test_files_are_those_of_ffcv_byte_for_byte(tmp_path, monkeypatch, write_with_ffcv, split, image_format):
    """Pillow and OpenCV contain the same encoder of JPEG, so the files are equal there too."""
    monkeypatch.setattr(writer_module, "USUAL_PAGE", writer_module.SMALLEST_PAGE)  # several pages in a small file
    split = SPLITS[split]() if split in SPLITS else made(90_000, 1, 1)
    write_split(tmp_path / "ours", split, image_format=image_format, workers=2)
    page = read_header(tmp_path / "ours").page_size
    write_with_ffcv(tmp_path / "ffcv", split, image_format, page, 1)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "ffcv").read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "jpg"])
def test_what_several_workers_of_ffcv_write_is_read(tmp_path, write_with_ffcv, image_format):
    """They fill pages in turn, so images lie in any order."""
    split = made(333, 31, 17)
    write_with_ffcv(tmp_path / "ffcv", split, image_format, 1 << 21, 3)
    found = write_split(tmp_path / "ours", split, image_format=image_format)
    verify_beton(tmp_path / "ffcv", split.labels, found, image_format)


FFCV_LOAD = """
import sys
import numpy as np
import ffcv
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
sys.unraisablehook = lambda error: None  # numba's finalizers fail where one loader follows another
for name in ("raw", "jpg"):
    for os_cache in (True, False):
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        loader = Loader(f"{sys.argv[1]}/{name}.beton", batch_size=64, num_workers=1, os_cache=os_cache,
                        order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
        images, labels = zip(*((images.copy(), labels.ravel().copy()) for images, labels in loader))
        np.savez(f"{sys.argv[1]}/{name}-{os_cache}.npz", images=np.concatenate(images), labels=np.concatenate(labels))
"""


def test_ffcv_loads_what_we_write(tmp_path):
    """Two pages, a last batch that is not full, through either memory manager."""
    split = ArraySplit(np.repeat(pixels(50, 1, 30, 41), 14, axis=0), np.arange(700) * 3, "made up")
    split.images[::14] //= 2
    for image_format in ("raw", "jpg"):
        write_split(tmp_path / f"{image_format}.beton", split, image_format=image_format)
    in_new_process(FFCV_LOAD, tmp_path)
    for image_format in ("raw", "jpg"):
        reader = BetonReader(tmp_path / f"{image_format}.beton")
        ours = np.stack([reader.image(index) for index in range(700)])
        for os_cache in (True, False):
            with np.load(tmp_path / f"{image_format}-{os_cache}.npz") as theirs:
                np.testing.assert_array_equal(theirs["labels"], split.labels)
                difference = abs(theirs["images"].astype(int) - ours)
            if image_format == "raw":
                assert not difference.any() and (ours == split.images).all()
            else:  # FFCV asks the same decoder for its fast, less exact arithmetic
                assert difference.max() <= 16 and difference.mean() < 2


HIDDEN = """
import runpy
import sys
sys.modules.update(dict.fromkeys(("ffcv", "numba", "cv2", "torch", "torchvision", "multiprocessing")))
sys.argv = ["data/convert.py", sys.argv[1], "--out", sys.argv[2], "--image-format", sys.argv[3]]
runpy.run_path("data/convert.py", run_name="__main__")
"""


@pytest.mark.parametrize("image_format", ["raw", "jpg"])
def test_conversion_works_without_ffcv(tmp_path, image_format):
    class_folders(tmp_path / "pets")
    out = tmp_path / "it's out"
    said = in_new_process(HIDDEN, tmp_path / "pets", out, image_format).splitlines()
    assert "9 training and 9 test images, 3 classes, 8×8" in said[-2]
    command = said[-1].removeprefix("Train on it with: ")
    assert shlex.split(command) == ["python", "-m", "rsengine.train", "--data", str(out)]
    assert load_dataset(out).image_format == image_format


IMPORTS = """
import sys
import rsengine.data
heavy = {"ffcv", "torch", "torchvision", "pyarrow", "sklearn", "numba", "cv2"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_costs_nothing():
    in_new_process(IMPORTS)


# --- one pass -------------------------------------------------------------------------------------------------------


def test_many_images_from_several_threads(tmp_path, monkeypatch):
    """More than one part and more than one thread: order, pixels and statistics stay right."""
    monkeypatch.setattr(split_module, "CHUNK", 7)
    content = class_folders(tmp_path / "pets", each=70, size=(16, 16))
    dataset = convert(tmp_path / "pets", tmp_path / "out", workers=3, log=lambda line: None)
    for split, path in (("train", dataset.train_beton), ("test", dataset.test_beton)):
        reader = BetonReader(path)
        assert reader.labels.tolist() == content[split][1]
        for index in range(len(reader)):
            np.testing.assert_array_equal(reader.image(index), content[split][0][index])
    np.testing.assert_allclose(dataset.mean, content["train"][0].mean(axis=(0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(dataset.std, content["train"][0].std(axis=(0, 1, 2)) / 255, rtol=1e-12)


def test_few_images_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """A thread takes as many as fit in CHUNK_BYTES, and no more than two tasks a thread wait to be written."""
    monkeypatch.setattr(split_module, "CHUNK_BYTES", 3 * 16 * 16 * 3)
    held, most, lock = set(), 0, threading.Lock()

    class Counting(ArraySplit):
        def load(self, index: int) -> tuple[np.ndarray, bytes]:
            nonlocal most
            with lock:
                held.add(index)
                most = max(most, len(held))
            return super().load(index)

    plain = writer_module.BetonWriter.append

    def append(self: writer_module.BetonWriter, *arguments: object) -> None:
        time.sleep(0.001)  # writing is slower than reading
        plain(self, *arguments)
        with lock:
            held.discard(self._count - 1)

    monkeypatch.setattr(writer_module.BetonWriter, "append", append)
    split = made(200, 16, 16)
    write_split(tmp_path / "a", Counting(split.images, split.labels, "counted"), workers=2)
    assert not held and 3 < most <= 3 * (2 * 2 + 1)


def test_statistics_are_exact_for_hard_cases(tmp_path):
    """All pixels equal: the deviation must be exactly zero, which E[x²] - E[x]² in floating point does not give."""
    images = np.full((10, 33, 35, 3), (255, 201, 7), np.uint8)
    found = write_split(tmp_path / "a", ArraySplit(images, np.zeros(10, np.int64), "x"))
    assert found.mean_and_std() == ((1.0, 201 / 255, 7 / 255), (0.0, 0.0, 0.0))


def test_large_image_gets_a_page_that_holds_it(tmp_path):
    """Also where those before it were small."""
    split = mixed((4, 4), (1000, 3000), (4, 4), (2000, 3000))
    write_split(tmp_path / "a", split)
    reader = BetonReader(tmp_path / "a")
    assert reader.header.page_size == 1 << 25
    assert all((reader.image(i) == split.images[i]).all() for i in range(4))


def test_an_image_too_large_for_any_page(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "LARGEST_PAGE", 1 << 22)
    with pytest.raises(DataError, match="too large for a .beton file; use --size"):
        write_split(tmp_path / "a", made(1, 2000, 3000))
    with pytest.raises(DataError, match="image 0: a side of more than 65500 pixels cannot be stored as jpg"):
        found = write_split(tmp_path / "b", made(1, 1, 65501), image_format="jpg")
        refuse_bad([found])


def test_warnings_are_as_before_and_large_pictures_refused_from_any_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(split_module, "CHUNK", 1)
    monkeypatch.setattr(images_module, "LARGEST_AREA", 150)
    content = class_folders(tmp_path / "pets", each=30, size=(12, 12))
    Image.fromarray(pixels(1, 0, 14, 14)[0]).save(tmp_path / "pets" / "train" / "cat" / "large.png")
    before = list(warnings.filters)
    with pytest.raises(DataError, match="large.png: .*scale it down") as caught:
        convert(tmp_path / "pets", tmp_path / "out", workers=4, log=lambda line: None)
    assert "more cannot" not in str(caught.value) and content
    assert warnings.filters == before


def test_an_error_in_a_thread_ends_the_conversion(tmp_path):
    class Misbehaving(ArraySplit):
        def load(self, index: int) -> tuple[np.ndarray, bytes]:
            if index == 150:
                raise RuntimeError("sample 150 is no good")
            return super().load(index)

    split, threads = made(300, 8, 8), threading.active_count()
    with pytest.raises(RuntimeError, match="sample 150"):
        write_split(tmp_path / "a", Misbehaving(split.images, split.labels, "bad"), workers=2)
    assert threading.active_count() == threads


def test_all_pictures_that_cannot_be_decoded_are_named_and_nothing_is_finished(tmp_path):
    class_folders(tmp_path / "pets", each=100)
    for name in ("cat/050.png", "dog/150.png"):
        (tmp_path / "pets" / "train" / name).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"cat/050.png: not an image.*1 more .*dog/150.png"):
        convert(tmp_path / "pets", tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    found = Measured()
    found.bad.append(("a", DataError("a: bad")))
    with pytest.raises(DataError, match="^a: bad$"):
        refuse_bad([Measured(), found])


# --- verification ---------------------------------------------------------------------------------------------------


def test_verification_finds_what_was_not_written_right(tmp_path):
    split, path = made(300, 8, 8), tmp_path / "a.beton"
    found = write_split(path, split)
    whole, reader = path.read_bytes(), BetonReader(path)
    position = int(reader.pointers[42]) + 17
    label = METADATA + SAMPLE.fields["label"][1]

    def damaged(content: bytes, image_format: str = "raw") -> None:
        path.write_bytes(content)
        verify_beton(path, split.labels, found, image_format)

    damaged(whole)  # passes
    for content, image_format, message in [
        (whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :], "raw", "image 42 read back"),
        (whole[:label] + b"\x09" + whole[label + 1 :], "raw", "labels read back"),
        (whole, "jpg", "not stored as jpg"),
    ]:
        with pytest.raises(DataError, match=message):
            damaged(content, image_format)
    with pytest.raises(DataError, match="labels"):
        path.write_bytes(whole)
        verify_beton(path, made(301, 8, 8).labels, found, "raw")
    found.heights[7] = 9
    with pytest.raises(DataError, match="sizes read back"):
        damaged(whole)


def test_pictures_in_files_are_opened_when_their_turn_comes(tmp_path):
    """A picture that vanishes meanwhile is named."""
    from rsengine.data.sources.archives import Blob

    split = EncodedSplit([Blob(str(tmp_path / "gone.png"))], ["gone.png"], np.zeros(1, np.int64))
    with pytest.raises(DataError, match="gone.png: No such file"):
        refuse_bad([write_split(tmp_path / "a", split)])
