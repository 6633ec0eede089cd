"""Pictures as cameras, phones and editors write them, and files among them that are none."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from rsengine.data import DataError
from rsengine.data.sources.images import decode_rgb
from tests.data.data_builders import jpeg, pixels

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
