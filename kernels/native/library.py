"""The C passes as one shared library: compiled once by the machine's own compiler, then kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor

from .build import HERE, SOURCES, BuildError, built

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of the functions, by the dtype of the maps
MOST_THREADS = 1 << 12  # a pass has an array of them on its stack


@functools.lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None``; and a sentence on why. Compiles for about a second where the cache does not have it."""
    try:
        with built() as (path, reason):
            library = ctypes.CDLL(str(path))
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled passes cannot be kept or loaded: {error}"
    missing = [
        f"{name}_{end}" for name in _signatures() for end in SUFFIXES.values() if not hasattr(library, f"{name}_{end}")
    ]
    if missing:
        return None, f"what the compiler made has no function {missing[0]}"
    return library, reason


def call(name: str, first: Tensor, *others: Tensor | int) -> None:
    """Call the function ``name`` of the library, which must have loaded, for maps of the dtype of ``first``.

    Raises:
        TypeError: a tensor is not what the function reads or writes at its address.
        ValueError: the number of arguments is not the function's, or a number is none it can have.
    """
    signature = _signatures()[name]
    arguments = list(zip(signature, (first, *others), strict=True))
    if not isinstance(first, Tensor) or first.dtype not in SUFFIXES:
        raise TypeError(f"{signature[0][0]}: expected a map of float32 or bfloat16; got {_description(first)}")
    numbers = {parameter: value for (parameter, kind), value in arguments if kind == "int64_t"}
    for parameter, value in numbers.items():
        most = {"threads": MOST_THREADS, "relu": 1}.get(parameter, 2**62)
        if type(value) is not int or not (parameter != "relu") <= value <= most:
            raise ValueError(f"{parameter}: expected a whole number of at most {most}; got {value!r}")
    converted = [_converted(name, parameter, kind, value, first, numbers) for (parameter, kind), value in arguments]
    getattr(load()[0], f"{name}_{SUFFIXES[first.dtype]}")(*converted)


@functools.lru_cache(maxsize=1)
def _signatures() -> dict[str, list[tuple[str, str]]]:
    """Name and type (T of a map's element, float, int64_t) of each parameter, read from the functions themselves."""
    source = (HERE / "passes.h").read_text(encoding="utf-8")
    found = re.findall(r"^void NAME\((\w+)\)\(([^)]*)\)", source, re.MULTILINE)
    parameter = re.compile(r"(?:const )?(T|float|int64_t) (?:\*restrict )?(\w+)$")
    return {
        name: [parameter.match(" ".join(each.split())).group(2, 1) for each in parameters.split(",")]
        for name, parameters in found
    }


def _images_and_channels(n: dict[str, int]) -> int:
    return n["images"] * n["channels"]


# How many numbers a function touches at an address, where it is not one for each channel.
SIZES: dict[str, dict[str, Callable[[dict[str, int]], int]]] = {
    "statistics": {
        "sums": lambda n: -(-n["rows"] // n["segment"]) * n["channels"],
        "scratch": lambda n: n["threads"] * 4 * n["channels"],
    },
    "affine_sums": {"scratch": lambda n: n["threads"] * 2 * n["channels"]},
    "epilogue": {"scale": _images_and_channels, "shift": _images_and_channels},
    "epilogue_sums": {"sum": _images_and_channels, "product": _images_and_channels},
    "epilogue_gradient": {"scale": _images_and_channels, "constant": _images_and_channels},
}


def _converted(
    name: str, parameter: str, kind: str, value: Tensor | int, first: Tensor, numbers: dict[str, int]
) -> ctypes.c_void_p | ctypes.c_int64:
    """The argument for C, checked: what lies at an address is of the kind that it touches there, and as much."""
    if kind == "int64_t":
        return ctypes.c_int64(value)
    if kind == "T":
        dtype, layout = first.dtype, torch.channels_last
        size = numbers["channels"] * (numbers["rows"] if "rows" in numbers else numbers["images"] * numbers["pixels"])
        expected = f"{dtype} {tuple(first.shape)} in channels_last"
    else:
        dtype, layout = torch.float32, torch.contiguous_format
        size = SIZES.get(name, {}).get(parameter, lambda n: n["channels"])(numbers)
        expected = f"contiguous {dtype}"
    fits = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    fits = fits and value.dtype == dtype and value.is_contiguous(memory_format=layout)
    if not fits or (kind == "T" and value.shape != first.shape):
        raise TypeError(f"{parameter}: expected {expected} on the CPU; got {_description(value)}")
    if value.numel() != size:
        raise TypeError(f"{parameter}: expected {size} numbers; got {value.numel()}, {_description(value)}")
    # With its memory given back, or a tensor that never had any, the address is nobody's.
    address, storage = value.data_ptr(), value.untyped_storage()
    if not address or storage.nbytes() < (value.storage_offset() + size) * value.element_size():
        raise TypeError(f"{parameter}: its memory was freed; got {_description(value)}")
    return ctypes.c_void_p(address)


def _description(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}"
    strides = f" with strides {value.stride()}" if value.layout == torch.strided else f" in {value.layout}"
    return f"{value.dtype} {tuple(value.shape)}{strides} on {value.device}"


# --- functions of one dtype, whose arguments are given by name --------------------------------------------------------

DTYPES = {
    "bf16": torch.bfloat16,
    "float": torch.float32,
    "int64_t": torch.int64,
    "int32_t": torch.int32,
    "uint32_t": torch.int32,
}


def run(name: str, **arguments: Tensor | int | None) -> None:
    """Call a function of the library's other sources with the arguments that its parameters have by name, and
    ``threads``. A pointer may be ``None``.

    Raises:
        TypeError: an argument is missing or unknown, or a tensor is not of the parameter's dtype, dense on the CPU, and
            in channels_last if it is a map.
    """
    arguments["threads"] = torch.get_num_threads()
    function, parameters = _function(name)
    if arguments.keys() != parameters.keys():
        wrong = ", ".join(sorted(arguments.keys() ^ parameters.keys()))
        raise TypeError(f"{name}: expected {', '.join(parameters)}; missing or unknown: {wrong}")
    converted = []  # a step of a large network converts six thousand
    for parameter, dtype in parameters.items():
        value = arguments[parameter]
        if dtype is None:
            if type(value) is not int or not 0 <= value < 2**62:
                raise TypeError(f"{name}: {parameter}: expected a whole number; got {value!r}")
        elif value is not None:
            value = _address(name, parameter, dtype, value)
        converted.append(value)
    function(*converted)


def number(name: str) -> int:
    """What a function of the library without parameters returns."""
    function = getattr(load()[0], name)
    function.restype = ctypes.c_int64
    return function()


@functools.lru_cache(maxsize=64)
def _function(name: str) -> tuple[Callable[..., None], dict[str, torch.dtype | None]]:
    """The function ``name`` of the library, and its :func:`_parameters`."""
    function, parameters = getattr(load()[0], name), _parameters()[name]
    function.argtypes = [ctypes.c_void_p if dtype else ctypes.c_int64 for dtype in parameters.values()]
    return function, parameters


@functools.lru_cache(maxsize=1)
def _parameters() -> dict[str, dict[str, torch.dtype | None]]:
    """Of each function, its parameters and what they point to, or ``None`` for a number, read from the source."""
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES if source.suffix == ".c")
    parameter = re.compile(r"(?:const )?(\w+) (\*?)(\w+)$")
    found = {}
    for name, parameters in re.findall(r"^void (\w+)\(([^)]*)\) {", text, re.MULTILINE):
        matches = [parameter.match(" ".join(each.split())) for each in parameters.split(",")]
        found[name] = {match[3]: DTYPES[match[1]] if match[2] else None for match in matches}
    return found


def _address(name: str, parameter: str, dtype: torch.dtype, value: Tensor) -> int:
    if isinstance(value, Tensor) and value.dtype is dtype and value.is_cpu and value.layout is torch.strided:
        is_map = value.dim() == 4
        if value.is_contiguous(memory_format=torch.channels_last) if is_map else value.is_contiguous():
            address = value.data_ptr()
            if not address and value.numel():  # nobody's memory
                raise TypeError(f"{name}: {parameter}: its memory was freed; got {_description(value)}")
            return address
    raise TypeError(f"{name}: {parameter}: expected dense {dtype} on the CPU; got {_description(value)}")
