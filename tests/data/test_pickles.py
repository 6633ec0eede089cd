"""Pickles: those of the official archives are read; hostile ones are refused, touch nothing and crash nothing."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import DataError, convert
from rsengine.data.sources.pickles import restricted_loads
from tests.data.data_builders import official_python

CONVERT = Path(__file__).resolve().parents[2] / "data" / "convert.py"


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


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_bytes_and_plain_values_come_back(protocol, order):
    values = np.asarray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), order=order)
    content = {"data": values, b"labels": [1, -2, 1 << 40], "rest": (None, True, 1.5, "é", b"\xff", {}, [])}
    found = restricted_loads(pickle.dumps(content, protocol=protocol), "batch")
    np.testing.assert_array_equal(found.pop("data"), values)
    content.pop("data")
    assert found == content


def array(
    shape=b"K\x02\x85", dtype=b"\x8c\x02u1", state=b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", content=b"C\x02ab"
):
    """The instructions for an array as numpy writes them, with another shape, data type or content."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    kind = b"cnumpy\ndtype\n" + dtype + b"\x89\x88\x87R(K\x03\x8c\x01|" + state + b"tb"
    return made + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"


LENGTH = struct.pack("<i", 1 << 30)
NUMPY_CALLS = {
    "an array at an address": b"cnumpy\nndarray\nJ" + LENGTH + b"\x85R",
    "an array with a buffer and strides": b"cnumpy\nndarray\n(K\x08\x85\x8c\x02u1C\x01aK\x00J" + LENGTH + b"\x85tR",
    "an array made without its class": b"cnumpy\nndarray\nK\x08\x85\x81",
    "objects": array(dtype=b"\x8c\x01O"),
    "objects of a data type told so afterwards": array(state=b"NNNK\x08K\x08K?"),
    "records": b"cnumpy\ndtype\n](\x8c\x01a\x8c\x02u1\x86e\x85R",
    "a data type as its own state": b"cnumpy\ndtype\n\x8c\x02u1\x85R}b",
    "too long for its content": array(shape=b"J" + LENGTH + b"\x85"),
    "negative": array(shape=b"J" + struct.pack("<i", -2) + b"J" + struct.pack("<i", -1) + b"\x86"),
    "overflowing": array(shape=b"(" + (b"\x8a\x09" + (1 << 64).to_bytes(9, "little")) + b"K\x00t"),
    "not a shape": array(shape=b"\x8c\x02ab"),
    "content that is a list": array(content=b"]"),
    "content that is text beyond bytes": array(content=b"\x8c\x03\xe2\x82\xac"),
    "filled with a number": array()[:-1] + b"0K\x01b",
    "never filled": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
    "the function itself": b"cnumpy.core.multiarray\n_reconstruct\n",
    "a function changed": b"c_codecs\nencode\n}\x8c\x01xK\x01sb",
    "attributes of a function set": b"c_codecs\nencode\nN}\x8c\x0c__defaults__K\x01\x85s\x86b",
    "a class changed": b"cnumpy\ndtype\n}\x8c\x01xK\x01sb",
    "another codec": b"c_codecs\nencode\n\x8c\x01a\x8c\x03zip\x86R",
    "a set": b"\x8f(K\x01\x90",
    "a class with old means": b"(cnumpy\ndtype\n\x8c\x02u1o",
    "a bytearray of a tebibyte": b"\x96" + struct.pack("<Q", 1 << 40),
    "bytes of a tebibyte": b"\x8e" + struct.pack("<Q", 1 << 40),
    "a memo of four thousand million places": b"Nr\xff\xff\xff\xff0N" + b"\x81",
    "an endless list": b"]q\x00h\x00a",
    "lists of lists of lists": b"]("
    + b"K\x01" * 99
    + b"e"
    + b"".join(b"q" + bytes([i]) + b"0](" + (b"h" + bytes([i])) * 99 + b"e" for i in range(6)),
    "deep": b")" + b"\x85" * 100_000,
    "deep keys": b"})" + b"\x85" * 1_000_000 + b"Ns",
    "many deep keys": b"}()" + b"\x85" * 1_000_000 + b"Nu",
    "a deep key of a dictionary": b"()" + b"\x85" * 1_000_000 + b"Nd",
    "a persistent name": b"Pname\n",
}


@pytest.mark.parametrize("name", NUMPY_CALLS)
def test_crafted_pickles_are_refused_in_one_line(name):
    """They ended the process, wrote elsewhere or took all memory when numpy and the unpickler in C saw them."""
    assert restricted_loads(b"\x80\x04" + array() + b".", "batch").tolist() == [97, 98]
    with pytest.raises(DataError, match="^batch: refused or damaged pickle .*official file again$") as error:
        restricted_loads(b"\x80\x04" + NUMPY_CALLS[name] + b".", "batch")
    assert len(str(error.value)) < 250


def test_a_crafted_batch_is_one_line_of_the_command(tmp_path):
    folder = official_python(tmp_path / "cifar-10-batches-py")
    crafted = b"\x80\x04}(\x8c\x04data" + NUMPY_CALLS["objects of a data type told so afterwards"]
    crafted += b"\x8c\x06labels]" + b"u."
    (folder / "data_batch_1").write_bytes(crafted)
    command = [sys.executable, str(CONVERT), str(folder), "--no-verify", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert not (tmp_path / "out").exists()
