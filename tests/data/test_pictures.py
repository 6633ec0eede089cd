"""Pictures as cameras, phones and editors write them, and files among them that are none."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from rsengine.data import DataError, convert, load_dataset
from rsengine.data.errors import NAMED, few
from rsengine.data.sources.images import decode_rgb
from tests.data.data_builders import class_folders, jpeg, pixels

TRAILERS = {
    "scan marker": b"\x00\x00\x00\x18ftypmp42" + b"\xff\xda" * 9,
    "cut picture": jpeg(pixels(1, 1)[0])[:-40],
    "whole picture": jpeg(pixels(1, 1)[0]),
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str)
def test_bytes_after_the_end_of_a_jpeg_do_not_matter(trailer, options):
    whole = jpeg(pixels(1, 3)[0], **options)
    found = decode_rgb(whole + TRAILERS[trailer], "motion.jpg")
    np.testing.assert_array_equal(found, decode_rgb(whole, "still.jpg"))


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 1}, {"thumbnail": True}], ids=str)
def test_every_truncation_of_a_jpeg_is_noticed_whatever_is_in_it(options):
    thumbnail = options.pop("thumbnail", False)
    whole = jpeg(pixels(1, 3)[0], **options)
    if thumbnail:
        segment = b"Exif\0\0" + jpeg(pixels(1, 4, 8, 8)[0])
        whole = whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]
    decode_rgb(whole, "whole")
    for length in range(len(whole)):
        with pytest.raises(DataError, match="cut.jpg"):
            decode_rgb(whole[:length], "cut.jpg")


@pytest.mark.parametrize("what", ["compressed XMP", "plain XMP", "profile", "text after the pixels"])
def test_a_png_may_hold_megabytes_beside_its_pixels(what):
    buffer, info, image = io.BytesIO(), PngImagePlugin.PngInfo(), pixels(1, 5)[0]
    large = np.random.default_rng(0).integers(0, 26, 3 << 20, np.uint8) + ord("a")
    if what.endswith("XMP"):
        info.add_itxt("XML:com.adobe.xmp", large.tobytes().decode(), zip=what == "compressed XMP")
    options = {"icc_profile": large.tobytes()} if what == "profile" else {}
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info, **options)
    data = buffer.getvalue()
    if what == "text after the pixels":
        chunk = b"zTXtnotes\0\0" + zlib.compress(large.tobytes())
        text = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        data = data[:-12] + text + data[-12:]
    np.testing.assert_array_equal(decode_rgb(data, "edited.png"), image)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_all_files_that_are_no_pictures_are_named_at_once(tmp_path, count):
    class_folders(tmp_path / "pets", each=20)
    bad = [f"{('train', 'test')[number % 2]}/dog/note{number}.txt" for number in range(count)]
    for name in bad:
        (tmp_path / "pets" / name).write_text("woof")
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message and "not an image" in message and "remove it" in message
    assert message.count(".txt") == min(count, 1 + NAMED)
    assert count > NAMED or all(name in message for name in bad)
    assert count == 1 or f"{count - 1} more cannot be used" in message
    assert count <= 1 + NAMED or f"and {count - 1 - NAMED} more" in message


def test_damaged_pictures_and_texts_are_named_together(tmp_path, monkeypatch):
    monkeypatch.setattr("rsengine.data.beton.split.CHUNK", 2)
    class_folders(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat" / "a.jpg").write_bytes(jpeg(pixels(1, 0)[0])[:-40])
    (tmp_path / "pets" / "train" / "eel" / "b").write_bytes(b"")
    (tmp_path / "pets" / "test" / "cat" / "c.txt").write_text("meow")
    with pytest.raises(DataError, match=r"a.jpg: truncated.*2 more cannot be used either: .*eel/b, .*c.txt$"):
        convert(tmp_path / "pets", tmp_path / "out", log=lambda line: None)


def test_all_empty_classes_and_all_stray_pictures_are_named(tmp_path):
    class_folders(tmp_path / "pets")
    for name in ("fox", "gnu"):
        (tmp_path / "pets" / "train" / name).mkdir()
    with pytest.raises(DataError, match="train/fox: empty class folder, and so are train/gnu; add"):
        convert(tmp_path / "pets", tmp_path / "out")
    for name in ("1.png", "2.png"):
        (tmp_path / "pets" / "train" / name).write_bytes(jpeg(pixels(1, 0)[0]))
    with pytest.raises(DataError, match="1.png: lies outside the class folders, and so do train/2.png; move"):
        convert(tmp_path / "pets", tmp_path / "out")


def test_few():
    assert few(["a"]) == "a" and few(list("abcde")) == "a, b, c, d, e" and few(list("abcdefg")).endswith("e and 2 more")


def test_a_channel_without_spread_counts_as_one_and_is_said(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            image = pixels(1, len(split) + ord(label))[0]
            image[..., 1] = 7
            (tmp_path / "flat" / split / label).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / "flat" / split / label / "1.png")
    said: list[str] = []
    dataset = convert(tmp_path / "flat", tmp_path / "out", log=said.append)
    assert dataset.std[1] == 1.0 and 0 < dataset.std[0] < 1 and dataset.mean[1] == 7 / 255
    assert any("green is the same in all pixels" in line and "counts as 1" in line for line in said)
    # A description that an older version wrote.
    path = dataset.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["std"][1] = 0.0
    path.write_text(json.dumps(content))
    assert load_dataset(dataset.folder) == replace(dataset, std=dataset.std)


def with_exif(picture: bytes, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A JPEG with these entries in its EXIF block: tag, type, count and value."""
    directory = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    segment = b"Exif\0\0II" + struct.pack("<HIH", 42, 8, len(entries)) + directory + bytes(4)
    return picture[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + picture[2:]


@pytest.mark.parametrize("orientation", range(10))
def test_a_turned_picture_is_put_upright_as_pillow_does(orientation):
    data = with_exif(jpeg(pixels(1, 2, 8, 16)[0]), (0x0112, 3, 1, struct.pack("<I", orientation)))
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(data, "turned.jpg"), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("kind", range(0, 20))
def test_exif_of_any_type_and_count_leaves_the_picture_as_it_is(kind, count, recwarn):
    whole = jpeg(pixels(1, 2, 8, 16)[0])
    turned = (0x0112, 3, 1, b"\6\0\0\0")
    for tag in (0x0112, 0x010F, 0x8769, 0x8825, 0x927C, 0x014A):
        odd = (tag, kind, count, b"\0\1\2\3")
        np.testing.assert_array_equal(decode_rgb(with_exif(whole, odd), "odd.jpg"), decode_rgb(whole, "whole"))
        if tag != 0x0112:  # what else is in the block does not keep it from being turned
            assert decode_rgb(with_exif(whole, turned, odd), "odd.jpg").shape == (16, 8, 3)
    assert not recwarn.list


@pytest.mark.parametrize("error", [struct.error("x"), ZeroDivisionError(), RecursionError("deep"), zlib.error("x")])
def test_whatever_a_decoder_raises_is_damage(monkeypatch, error):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(DataError, match="a.jpg: damaged image .*repair or remove it"):
        decode_rgb(jpeg(pixels(1, 2)[0]), "a.jpg")


def test_a_picture_larger_than_memory_is_one_line(monkeypatch):
    def fail(*_arguments):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(DataError, match="a.jpg: more than memory holds; scale it down or remove it"):
        decode_rgb(jpeg(pixels(1, 2)[0]), "a.jpg")


def test_the_limit_of_size_does_not_depend_on_filters_of_warnings():
    """Threads put the filters of warnings back in any order."""
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="bomb.png: 12000×12000 pixels is too large; scale it down"):
            decode_rgb(buffer.getvalue(), "bomb.png")


def test_a_jpeg_full_of_the_byte_before_a_marker_is_looked_through_once():
    """It took hours."""
    whole = jpeg(pixels(1, 2)[0])
    with pytest.raises(DataError, match="full.jpg: truncated JPEG"):
        decode_rgb(whole[:-2] + b"\xff" * 5_000_000 + b"\0", "full.jpg")
    np.testing.assert_array_equal(decode_rgb(whole[:-2] + b"\xff" * 1000 + whole[-2:], "a"), decode_rgb(whole, "a"))
