"""The pickles of the official archives, read without running anything that they name.

A pickle is a program: it calls what it names with arguments of its own, and gives what it made a state of its own.
Numpy believes such a state, so that a forged one reads and writes memory that is not an array's. Here nothing of numpy
is called: what a pickle names are the stand-ins below, which take the few arguments that an array of bytes has.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from rsengine.data.errors import DataError

PLAIN = (str, bytes, bool, int, float, type(None))
DEEPEST, MOST_DIMENSIONS = 8, 8  # of containers within each other, and of arrays


class _Array:
    """Stands for numpy's helper that makes an empty array, and then for the array."""

    def __init__(self, subtype: object, shape: object, dtype: object) -> None:
        if subtype is not ARRAY_TYPE or shape != (0,) or dtype not in ("b", b"b"):
            raise pickle.UnpicklingError("an array that is not a plain one")
        self.values: np.ndarray | None = None

    def fill(self, state: object) -> None:
        """Take what numpy writes: its version, the shape, the data type, whether columns come first, the content."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array of another version")
        _, shape, dtype, columns_first, content = state
        if isinstance(content, str):  # of Python 2, one character a byte
            content = content.encode("latin1")
        if not isinstance(dtype, _DataType) or not isinstance(content, bytes) or type(columns_first) is not bool:
            raise pickle.UnpicklingError("an array that is not one of bytes")
        sizes = isinstance(shape, tuple) and len(shape) <= MOST_DIMENSIONS and all(type(n) is int for n in shape)
        if not sizes or min(shape, default=0) < 0 or math.prod(shape) != len(content):
            raise pickle.UnpicklingError("an array whose shape is not that of its content")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C")


class _DataType:
    """Stands for the data type of an array, which has to be that of bytes."""

    def __init__(self, name: object, *options: object) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError("an array that is not one of bytes")

    def fill(self, state: object) -> None:
        """Check what numpy writes of it, after its version and the order of its bytes: no parts, size or flags."""
        if not isinstance(state, tuple) or len(state) != 8 or state[2:] != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("an array that is not one of bytes")


def _encode(text: object, encoding: object) -> bytes:
    """What Python 3 writes for bytes in a pickle that Python 2 can read."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("text that does not stand for bytes")
    return text.encode("latin1")


ARRAY_TYPE = "numpy.ndarray"  # only ever an argument

# All that the pickles of the official archives refer to; numpy 2 renamed one module.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): ARRAY_TYPE,
    ("numpy", "dtype"): _DataType,
    ("_codecs", "encode"): _encode,
}
CALLABLE = (_Array, _DataType, _encode)
# Instructions that plain values need none of: other ways to call, buffers, sets, and text that is evaluated.
REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.BINPERSID, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
)


class _Unpickler(pickle._Unpickler):
    """The module's own in Python, not the one in C, which allocates whatever a forged length asks for."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR archive does")
        return ALLOWED[module, name]

    def refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that no CIFAR archive has")

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is each for each in CALLABLE) or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls what is no function")
        self.stack.append(function(*arguments))

    def load_build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if type(instance) not in (_Array, _DataType):
            raise pickle.UnpicklingError("it changes what is no array")
        instance.fill(state)

    # To look up a key hashes it, and a tuple of a million tuples within each other overflows the stack of C.

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack)  # since the mark
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack)
        super().load_dict()

    def _check_keys(self, items: list[Any]) -> None:
        if not all(type(key) in PLAIN for key in items[::2]):
            raise pickle.UnpicklingError("a key that is no plain value")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for code in REFUSED:
        dispatch[code[0]] = refuse


class _Copy:
    """Copies what was unpickled, with arrays in place of their stand-ins, and refuses all that is not plain."""

    def __init__(self, most: int) -> None:
        self.left = most  # values: a list may hold another many times, which hold others many times

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise pickle.UnpicklingError("it holds more than it has bytes, or too deep")
        if type(value) in PLAIN:
            return value
        if type(value) is _Array and value.values is not None:
            return value.values
        if type(value) in (list, tuple):
            return type(value)(self(each, depth + 1) for each in value)
        if type(value) is dict:
            return {key: self(each, depth + 1) for key, each in value.items()}
        raise pickle.UnpicklingError("it holds other than plain values and arrays of bytes")


def restricted_loads(data: bytes, name: str) -> Any:
    """Unpickle `data`, allowing lists, tuples, dictionaries, numbers, strings and arrays of bytes, and nothing else.

    Strings written by Python 2 become str, one character a byte. `name` is for the error message.

    Raises:
        DataError: not a pickle, cut short, or referring to anything else.
    """
    try:
        return _Copy(len(data))(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except Exception as error:
        # A forged pickle can make the pickle module raise almost anything.
        reason = str(error)[:120] or type(error).__name__
        raise DataError(f"{name}: refused or damaged pickle ({reason}); get the official file again") from error
