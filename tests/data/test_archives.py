"""Hostile archives are refused and touch nothing."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from rsengine.data import DataError, convert
from rsengine.data.sources import archives
from rsengine.data.sources.archives import Spool, unpack
from tests.data.data_builders import tree_of


def write_tar(path: Path, member: tarfile.TarInfo, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        if member.isreg():
            member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


EVIL_NAMES = ["../escaped", "train/../../escaped", "/tmp/escaped-absolute", "train/cat/..", "C:/escaped", "..\\escaped"]


@pytest.mark.parametrize("name", EVIL_NAMES)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_leave_the_folder(tmp_path, name, kind):
    path = tmp_path / f"evil.{kind}"
    if kind == "tar":
        write_tar(path, member(name))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
    before = tree_of(tmp_path.parent)
    with pytest.raises(DataError, match="points outside"):
        convert(path, tmp_path / "out")
    assert tree_of(tmp_path.parent) == before
    assert not Path("/tmp/escaped-absolute").exists()


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (member("train/cat/1.png", tarfile.SYMTYPE, "/etc/passwd"), "a link.*--hard-dereference"),
        (member("train/cat/1.png", tarfile.LNKTYPE, "../../secret"), "a hard link.*--hard-dereference"),
        (member("train/cat/1.png", tarfile.CHRTYPE), "a device.*without it"),
        (member("train/cat/1.png", tarfile.BLKTYPE), "a device.*without it"),
        (member("train/cat/1.png", tarfile.FIFOTYPE), "a named pipe.*without it"),
    ],
    ids=["symlink", "hard link", "character device", "block device", "pipe"],
)
def test_links_and_devices_in_a_tar(tmp_path, info, words):
    with pytest.raises(DataError, match=f"1.png is {words}"):
        convert(write_tar(tmp_path / "evil.tar.gz", info), tmp_path / "out")


def test_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("train/cat/1.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="1.png is a link"):
        convert(tmp_path / "evil.zip", tmp_path / "out")


def test_encrypted_zip(tmp_path):
    path = tmp_path / "secret.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/cat/1.png", b"x")
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_bomb(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "LARGEST_SMALL", 1 << 20)
    zeros = bytes(30 << 20)
    path = tmp_path / f"bomb.{kind}"
    if kind == "tar":
        write_tar(path, member("train/cat/1.png"), zeros)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train/cat/1.png", zeros)
    with pytest.raises(DataError, match="unpacks to more than"):
        convert(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]


def test_spool_returns_what_was_put_in(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("./d/a", b"one"), ("d/b", b""), ("d/a", b"later wins")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with Spool(tmp_path / "spool") as spool:
        files, _ = unpack(tmp_path / "a.tar", spool)
    assert {name: blob.read() for name, blob in files.items()} == {"d/a": b"later wins", "d/b": b""}


def patched_tar(path: Path, field: slice, value: bytes, kind: bytes = tarfile.REGTYPE, count: int = 1) -> Path:
    """A tar whose first header, ``count`` times, has ``value`` in ``field`` and a right sum."""
    info = tarfile.TarInfo("train/cat/1.png")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) * count + bytes(10240))
    return path


SIZE = slice(124, 136)


@pytest.mark.parametrize(
    "value",
    [
        b"\x80" + (2**50).to_bytes(11, "big"),
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,  # -1
        b"\xff" * 10 + b"\0\0",
        b"00000100000\0",  # more than there is
    ],
    ids=["2**50", "2**88", "-1", "-65536", "32768"],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=str)
def test_sizes_in_a_tar_that_cannot_be(tmp_path, value, kind):
    path = patched_tar(tmp_path / "size.tar", SIZE, value, kind)
    with pytest.raises(DataError, match="size.tar: .*(unpacks to more than|damaged archive|no files)") as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and [entry.name for entry in tmp_path.iterdir()] == ["size.tar"]


def test_thousands_of_extensions_before_a_member(tmp_path):
    path = patched_tar(tmp_path / "deep.tar", SIZE, b"00000000000\0", tarfile.XHDTYPE, count=5000)
    with pytest.raises(DataError, match="deep.tar: truncated or damaged archive"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("record", "offset", "value", "words"),
    [
        (b"PK\x01\x02", 24, b"\xff\xff\xff\xfe", "unpacks to more than"),  # the size
        (b"PK\x01\x02", 28, b"\x06\0\0\0\x09\0", "train/ is a folder with content"),  # where the name ends
        (b"PK\x01\x02", 10, b"\x7f\0", "pack it with deflate"),
        (b"PK\x01\x02", 42, b"\xff\xff\xff\x7f", "damaged"),  # where the member lies
        (b"PK\x05\x06", 12, b"\xff\xff\xff\x7f", "damaged"),  # the size of the directory
        (b"PK\x05\x06", 16, b"\xff\xff\xff\x7f", "damaged"),  # where the directory lies
    ],
)
def test_numbers_in_a_zip_that_cannot_be(tmp_path, record, offset, value, words):
    path = tmp_path / "numbers.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/cat/1.png", b"x")
    data = bytearray(path.read_bytes())
    at = data.index(record) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"numbers.zip: .*{words}") as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_longer_than_any_path(tmp_path, kind):
    """A million folders within each other would take hours."""
    name, path = "a/" * 30_000 + "1.png", tmp_path / f"long.{kind}"
    if kind == "tar":
        write_tar(path, member(name))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")
    with pytest.raises(DataError, match="long.* has a name of 60,005 characters; do not trust") as caught:
        convert(path, tmp_path / "out")
    assert len(str(caught.value)) < 300


def test_an_archive_larger_than_memory_is_one_line(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise MemoryError

    path = write_tar(tmp_path / "large.tar", member("train/cat/1.png"))
    monkeypatch.setattr(archives, "_append", fail)
    with pytest.raises(DataError, match="large.tar: unpacking it takes more memory than there is; unpack it and give"):
        convert(path, tmp_path / "out")
