"""Hostile archives and pickles are refused and touch nothing."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert
from rsengine.data.sources import archives
from rsengine.data.sources.archives import Spool, restricted_loads, unpack
from tests.data.data_builders import official_python, tree_of


class Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: Evil(os.system, f"touch {path}"),
        lambda path: Evil(eval, f"open({str(path)!r}, 'w')"),
        lambda path: Evil(open, str(path), "w"),
        lambda path: {"data": Evil(np.fromfile, str(path))},
        lambda path: Evil(np.memmap, str(path), np.uint8, "w+", 0, (3,)),
        lambda path: Evil(getattr, np.ndarray, "tofile"),
    ],
)
def test_evil_pickle(tmp_path, protocol, make):
    target = tmp_path / "touched"
    with pytest.raises(DataError, match="batch: refused or damaged pickle .*official file"):
        restricted_loads(pickle.dumps(make(target), protocol=protocol), "batch")
    assert not target.exists()


def test_evil_pickle_in_a_source(tmp_path):
    folder = official_python(tmp_path / "cifar-10-batches-py")
    (folder / "batches.meta").write_bytes(pickle.dumps(Evil(os.system, f"touch {tmp_path}/touched")))
    with pytest.raises(DataError, match="batches.meta: refused"):
        convert(folder, tmp_path / "out", verify=False)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()


def test_harmless_looking_names_are_not_enough():
    """The list holds exact pairs: not every attribute of numpy, and no dotted way through an allowed one."""
    for module, name in [("numpy", "load"), ("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile")]:
        crafted = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)])
        with pytest.raises(DataError, match="refers to"):
            restricted_loads(crafted + name.encode() + b"\x93.", "batch")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"garbage", pickle.dumps({"a": np.zeros(9)}, 4)[:-20]])
def test_damaged_pickle(data):
    with pytest.raises(DataError, match="batch: refused or damaged"):
        restricted_loads(data, "batch")


def test_array_of_absurd_size_is_refused():
    huge = Evil(np.zeros(0).__reduce__()[0], np.ndarray, (1 << 50,), b"b")
    with pytest.raises(DataError, match="refused"):
        restricted_loads(pickle.dumps(huge, 4), "batch")


def test_pickle_of_python_2():
    """What Python 2 and old numpy wrote into the official files: str for bytes, numpy.core, protocol 2."""
    values = np.array([[1, 2, 255], [0, 128, 7]], np.uint8)
    raw = values.tobytes()
    data = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(raw)]) + raw + b"tbU\x06labelsq\x08]q\x09(K\x06K\x09eu."
    )
    content = restricted_loads(data, "data_batch_1")
    np.testing.assert_array_equal(content["data"], values)
    assert content["data"].dtype == np.uint8 and content["labels"] == [6, 9]


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
