"""Bad input: one line that names the file and the remedy, and nothing written."""

from __future__ import annotations

import gzip
import os
import pickle
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert
from rsengine.data import convert as convert_function
from rsengine.data.convert import main
from rsengine.data.sources.images import decode_rgb
from tests.data.data_builders import (
    class_folders,
    jpeg,
    official_binary,
    official_python,
    parquet,
    pixels,
    png,
    tar,
    tree_of,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def pets(tmp: Path) -> Path:
    class_folders(tmp / "pets")
    return tmp / "pets"


def missing(tmp: Path) -> Path:
    return tmp / "nowhere.tar.gz"


def truncated_gz(tmp: Path) -> Path:
    path = tar(tmp / "cut.tar.gz", pets(tmp))
    path.write_bytes(path.read_bytes()[:-200])
    return path


def truncated_tar_between_members(tmp: Path) -> Path:
    path = tar(tmp / "cut.tar", pets(tmp), mode="w")
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:last])
    return path


def overwritten_header_in_tar(tmp: Path) -> Path:
    path = tar(tmp / "bad.tar", pets(tmp), mode="w")
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[12].offset
    data = bytearray(path.read_bytes())
    data[middle : middle + 512] = b"\x55" * 512
    path.write_bytes(data)
    return path


def truncated_zip(tmp: Path) -> Path:
    from tests.data.data_builders import zipped

    path = zipped(tmp / "cut.zip", pets(tmp))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def damaged_zip(tmp: Path) -> Path:
    from tests.data.data_builders import zipped

    path = zipped(tmp / "bad.zip", pets(tmp))
    data = bytearray(path.read_bytes())
    data[150:200] = b"\x55" * 50
    path.write_bytes(data)
    return path


def wrong_checksum(tmp: Path) -> Path:
    return tar(tmp / "cifar-10-python.tar.gz", official_python(tmp / "cifar-10-batches-py"))


def wrong_checksum_in_folder(tmp: Path) -> Path:
    return official_python(tmp / "cifar-10-batches-py")


def wrong_checksum_renamed_binary(tmp: Path) -> Path:
    return tar(tmp / "mine.tar", official_binary(tmp / "cifar-10-batches-bin"), mode="w")


def unverified_count(tmp: Path) -> Path:
    return official_binary(tmp / "cifar-10-batches-bin")


def batch_missing(tmp: Path) -> Path:
    folder = official_python(tmp / "cifar-10-batches-py")
    (folder / "data_batch_3").unlink()
    return folder


def corrupt_jpeg(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "train" / "dog" / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(200)))
    return folder


def truncated_jpeg(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "test" / "eel" / "x.jpg").write_bytes(jpeg(pixels(1, 0)[0])[:-40])
    return folder


def not_an_image(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "train" / "cat" / "notes.txt").write_text("meow")
    return folder


def empty_class(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "train" / "fox").mkdir()
    return folder


def differing_classes(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "test" / "eel").rename(folder / "test" / "emu")
    return folder


def picture_outside_classes(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "train" / "stray.png").write_bytes(png(pixels(1, 0)[0]))
    return folder


def only_test(tmp: Path) -> Path:
    class_folders(tmp / "pets", ("test",))
    return tmp / "pets"


def one_class(tmp: Path) -> Path:
    for split in ("train", "test"):
        (tmp / "one" / split / "cat").mkdir(parents=True)
        (tmp / "one" / split / "cat" / "1.png").write_bytes(png(pixels(1, 0)[0]))
    return tmp / "one"


def single_image(tmp: Path) -> Path:
    (tmp / "cat.png").write_bytes(png(pixels(1, 0)[0]))
    return tmp / "cat.png"


def single_batch(tmp: Path) -> Path:
    return official_python(tmp / "cifar-10-batches-py") / "data_batch_1"


def empty_file(tmp: Path) -> Path:
    (tmp / "empty.tar.gz").write_bytes(b"")
    return tmp / "empty.tar.gz"


def empty_folder(tmp: Path) -> Path:
    (tmp / "empty").mkdir()
    return tmp / "empty"


def no_pictures(tmp: Path) -> Path:
    (tmp / "texts").mkdir()
    (tmp / "texts" / "a.txt").write_text("a")
    return tmp / "texts"


def archive_inside(tmp: Path) -> Path:
    (tmp / "downloads").mkdir()
    return tar(tmp / "downloads" / "pets.tar.gz", pets(tmp)).parent


def broken_parquet(tmp: Path) -> Path:
    (tmp / "train.parquet").write_bytes(b"PAR1 and nothing else")
    return tmp / "train.parquet"


def parquet_without_labels(tmp: Path) -> Path:
    return parquet(tmp / "train.parquet", pixels(2, 0), [0, 1], label="kind")


def parquet_label_out_of_range(tmp: Path) -> Path:
    return parquet(tmp / "train.parquet", pixels(6, 0), [0, 0, 1, 1, -1, -1], ["a", "b"])


def parquet_null_label(tmp: Path) -> Path:
    return parquet(tmp / "train.parquet", pixels(3, 0), [0, None, 1], ["a", "b"])


def parquet_without_train(tmp: Path) -> Path:
    return parquet(tmp / "hub" / "test.parquet", pixels(2, 0), [0, 1], ["a", "b"]).parent


def loop_of_links(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "train" / "cat" / "again").symlink_to(folder)
    return folder


def named_pipe(tmp: Path) -> Path:
    folder = pets(tmp)
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    return folder


def socket_in_class_folder(tmp: Path) -> Path:
    folder = pets(tmp)
    os.mknod(folder / "test" / "dog" / "socket", 0o600 | stat.S_IFSOCK)
    return folder


def link_to_a_device(tmp: Path) -> Path:
    folder = pets(tmp)
    (folder / "test" / "dog" / "endless.png").symlink_to("/dev/zero")
    return folder


def pipe_as_parquet(tmp: Path) -> Path:
    (tmp / "hub").mkdir()
    os.mkfifo(tmp / "hub" / "train.parquet")
    return tmp / "hub"


def hard_link_in_tar(tmp: Path) -> Path:
    folder = pets(tmp)
    os.link(folder / "train" / "cat" / "000.png", folder / "train" / "cat" / "same.png")
    return tar(tmp / "links.tar", folder, mode="w")


CASES: list[tuple[Callable[[Path], Path], list[str]]] = [
    (missing, ["nowhere.tar.gz", "no such", "check the path"]),
    (truncated_gz, ["cut.tar.gz", "truncated", "download or copy it again"]),
    (truncated_tar_between_members, ["cut.tar", "truncated", "again"]),
    (overwritten_header_in_tar, ["bad.tar", "damaged", "again"]),
    (truncated_zip, ["cut.zip", "truncated", "again"]),
    (damaged_zip, ["bad.zip", "damaged", "again"]),
    (wrong_checksum, ["cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a", "--no-verify"]),
    (wrong_checksum_in_folder, ["data_batch_1", "md5", "c99cafc152244af753f735de768cd75f", "--no-verify"]),
    (wrong_checksum_renamed_binary, ["mine.tar", "md5", "c32a1d4ab5d03f1284b67883e8d87530", "--no-verify"]),
    (unverified_count, ["cifar-10-batches-bin", "50000", "--no-verify"]),
    (batch_missing, ["data_batch_3", "missing", "unpack"]),
    (corrupt_jpeg, ["train/dog/x.jpg", "remove it"]),
    (truncated_jpeg, ["test/eel/x.jpg", "truncated", "remove it"]),
    (not_an_image, ["train/cat/notes.txt", "not an image", "remove it"]),
    (empty_class, ["train/fox", "empty class", "remove it"]),
    (differing_classes, ["pets", "eel only in train", "emu only in test", "agree"]),
    (picture_outside_classes, ["train/stray.png", "outside", "move it"]),
    (only_test, ["pets", "no train"]),
    (one_class, ["train", "two class", "add"]),
    (single_image, ["cat.png", "single file", "give"]),
    (single_batch, ["data_batch_1", "give the folder", "cifar-10-batches-py"]),
    (empty_file, ["empty.tar.gz", "empty file", "again"]),
    (empty_folder, ["empty", "no files", "give"]),
    (no_pictures, ["texts", "no class folders", "give"]),
    (archive_inside, ["downloads", "give", "downloads/pets.tar.gz itself"]),
    (broken_parquet, ["train.parquet", "damaged", "again"]),
    (parquet_without_labels, ["train.parquet", "label", "kind", "rename"]),
    (parquet_label_out_of_range, ["train.parquet", "label -1", "out of range"]),
    (parquet_null_label, ["train.parquet", "row 1", "None", "remove the row"]),
    (parquet_without_train, ["hub", "no train"]),
    (loop_of_links, ["again", "link", "remove"]),
    (named_pipe, ["train/cat/pipe.png", "named pipe", "remove it"]),
    (socket_in_class_folder, ["test/dog/socket", "a socket", "remove it"]),
    (link_to_a_device, ["test/dog/endless.png", "a device", "remove it"]),
    (pipe_as_parquet, ["hub/train.parquet", "named pipe", "remove it"]),
    (hard_link_in_tar, ["links.tar", "train/cat/", "hard link", "--hard-dereference"]),
]


@pytest.mark.parametrize(("build", "words"), CASES, ids=[build.__name__ for build, _ in CASES])
def test_bad_source(tmp_path, capsys, build, words):
    source = build(tmp_path)
    before = tree_of(tmp_path)
    assert main([str(source), "--out", str(tmp_path / "new" / "out"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert tree_of(tmp_path) == before  # not even the folder above


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("classes", [10, 100])
def test_label_out_of_range(tmp_path, version, classes):
    if version == "python":
        folder = official_python(tmp_path / "c", classes)
        path = folder / ("data_batch_2" if classes == 10 else "train")
        content = pickle.loads(path.read_bytes())
        content[b"labels" if classes == 10 else b"fine_labels"][1] = classes
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        folder = official_binary(tmp_path / "c", classes)
        path = folder / ("data_batch_2.bin" if classes == 10 else "train.bin")
        data = bytearray(path.read_bytes())
        data[len(data) // (4 if classes == 10 else 100) + (classes == 100)] = classes
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: image 1 has label {classes}, out of range"):
        convert(folder, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [10**5000, -(10**5000), True, 1.0, "1", None, [1]], ids=lambda v: type(v).__name__)
def test_a_label_that_is_no_number_of_a_class(tmp_path, label):
    folder = official_python(tmp_path / "c")
    path = folder / "data_batch_2"
    content = pickle.loads(path.read_bytes())
    content[b"labels"][1] = label
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(
        DataError, match="data_batch_2: (image 1 has label a value of type int|labels is no list)"
    ) as caught:
        convert(folder, tmp_path / "out", verify=False)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 1, [b"cat"], {}], ids=repr)
def test_a_class_name_that_is_no_text(tmp_path, name):
    folder = official_python(tmp_path / "c")
    names = [b"x"] * 9 + [name]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=4))
    with pytest.raises(DataError, match="batches.meta: does not name 10 classes; get the official file again"):
        convert(folder, tmp_path / "out", verify=False)


def test_truncated_binary(tmp_path):
    folder = official_binary(tmp_path / "c")
    path = folder / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_4.bin: .* truncated"):
        convert(folder, tmp_path / "out", verify=False)


def test_class_without_samples_in_official_file(tmp_path):
    folder = official_binary(tmp_path / "c")
    data = bytearray((folder / "test_batch.bin").read_bytes())
    data[0] = 0  # it was 9, the only one
    (folder / "test_batch.bin").write_bytes(data)
    with pytest.raises(DataError, match="class9 has no images in test"):
        convert(folder, tmp_path / "out", verify=False)


def test_every_truncation_of_a_jpeg_is_noticed():
    whole = jpeg(pixels(1, 3)[0])  # one of those which Pillow still takes without the last two bytes, the end marker
    decode_rgb(whole, "whole")
    for length in range(len(whole)):
        with pytest.raises(DataError, match="cut.jpg"):
            decode_rgb(whole[:length], "cut.jpg")


def test_every_truncation_and_flipped_byte_of_a_png_is_noticed():
    whole = png(pixels(1, 5, 8, 8)[0])
    expected = decode_rgb(whole, "whole")
    for length in range(0, len(whole) - 12, 5):  # the last 12 bytes are an empty chunk
        with pytest.raises(DataError, match="cut.png"):
            decode_rgb(whole[:length], "cut.png")
    for position in range(8, len(whole) - 12, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        try:
            result = decode_rgb(bytes(damaged), "damaged.png")
        except DataError:
            continue
        np.testing.assert_array_equal(result, expected)


def test_pixel_bomb(tmp_path):
    from PIL import Image

    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="bomb.png.*(scale|large)"):
        decode_rgb((tmp_path / "bomb.png").read_bytes(), "bomb.png")


def test_unsupported_pixel_type():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="x.tif: pixels of type F"):
        decode_rgb(buffer.getvalue(), "x.tif")


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "0"],
        ["--size", "1000000000"],
        ["--test-fraction", "1"],
        ["--test-fraction", "inf"],
        ["--validation", "0"],
        ["--validation", "nan"],
        ["--seed", "9" * 100],
        ["--seed", "-" + "9" * 100],
        ["--workers", "0"],
        ["--workers", "1000000"],
    ],
    ids=" ".join,
)
def test_options_out_of_range(tmp_path, capsys, options):
    assert main([str(pets(tmp_path)), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert options[1] in error and error.count("\n") == 1 and options[0][2:].replace("-", "_") in error
    assert not (tmp_path / "out").exists()


def test_output_folder_is_not_taken_from_others(tmp_path):
    source = pets(tmp_path)
    before = tree_of(source)
    with pytest.raises(DataError, match=r"pets: holds other files .*--out"):
        convert_function(source, source, overwrite=True)
    assert tree_of(source) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is a file"):
        convert_function(source, tmp_path / "file")


def test_overwrite(tmp_path):
    source, out = pets(tmp_path), tmp_path / "out"
    out.mkdir()  # empty is fine
    first = convert(source, out, log=lambda line: None)
    with pytest.raises(DataError, match="--overwrite"):
        convert(source, out, log=lambda line: None)
    second = convert(source, out, overwrite=True, size=16, log=lambda line: None)
    assert first.image_size == (8, 8) and second.image_size == (16, 16)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="notes.txt"):
        convert(source, out, overwrite=True, log=lambda line: None)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["out", "pets"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    source = pets(tmp_path)
    (source / "train" / "cat" / "000.png").chmod(0)
    with pytest.raises(DataError, match="000.png: Permission denied"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("build", [missing, truncated_gz, truncated_jpeg])
def test_command_line_exits_with_2(tmp_path, build):
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "data" / "convert.py"), str(build(tmp_path)), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_gzip_checksum_is_verified(tmp_path):
    """The tar inside is whole; only the checksum behind it is wrong, which tarfile alone would not look at."""
    path = tar(tmp_path / "pets.tar", pets(tmp_path), mode="w")
    data = bytearray(gzip.compress(path.read_bytes()))
    data[-6] ^= 1
    (tmp_path / "pets.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="damaged archive"):
        convert(tmp_path / "pets.tar.gz", tmp_path / "out")
