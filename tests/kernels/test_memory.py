"""No op reads or writes memory that is not a tensor's: not of tensors without memory, and not past their ends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsengine.kernels import (
    augment_batch,
    batch_norm,
    batch_norm_squeeze_excite_residual,
    ema_update,
    label_smoothed_cross_entropy,
    sgd_ema_step,
    squeeze_excite,
    squeeze_excite_residual,
)
from rsengine.kernels.native import build, library


def vectors():
    return {n: torch.full((4,), 0.5) for n in ("weight", "bias", "running_mean", "running_var")}


def excitation():
    return {"w1": torch.ones(1, 4), "b1": torch.ones(1), "w2": torch.ones(4, 1), "b2": torch.ones(4)}


def maps(*names):
    return {name: torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last) for name in names}


def lists(*names):
    return {name: [torch.ones(3), torch.ones(2, 2)] for name in names}


NUMBERS = {"momentum": 0.9, "weight_decay": 0.0}
PIXELS = {"seed": 0, "crop_padding": 1, "flip": "random", "cutout_holes": 0}
CALLS = {
    batch_norm: lambda: maps("x") | vectors(),
    batch_norm_squeeze_excite_residual: lambda: (
        maps("x", "shortcut") | vectors() | excitation() | {"keep_scale": torch.ones(2)}
    ),
    squeeze_excite: lambda: maps("x") | excitation(),
    squeeze_excite_residual: lambda: maps("x", "shortcut") | excitation() | {"keep_scale": torch.ones(2)},
    label_smoothed_cross_entropy: lambda: {"logits": torch.ones(4, 3), "target": torch.ones(4, dtype=torch.int64)},
    ema_update: lambda: lists("shadow", "params") | {"decay": torch.tensor(0.5)},
    sgd_ema_step: lambda: (
        lists("params", "grads", "momentum_buffers", "shadow")
        | {"lr": torch.tensor(0.1), "decay": torch.tensor(0.5)}
        | NUMBERS
    ),
    augment_batch: lambda: (
        {"images": torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "indices": torch.arange(3)}
        | {"epoch": torch.tensor(1), "scale": torch.ones(3), "shift": torch.ones(3)}
        | PIXELS
    ),
}
FREED = [
    (function, name)
    for function, arguments in CALLS.items()
    for name, value in arguments().items()
    if isinstance(value, torch.Tensor | list)
]


@pytest.mark.parametrize(("function", "name"), FREED, ids=lambda value: getattr(value, "__name__", value))
def test_a_tensor_whose_memory_was_freed_is_refused(function, name):
    """PyTorch's own operators crash on one, as the C passes do."""
    arguments = CALLS[function]()
    function(**arguments)
    tensor = arguments[name] if isinstance(arguments[name], torch.Tensor) else arguments[name][1]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name}(\[1\])?: expected a tensor with memory; got one whose memory was"):
        function(**arguments)


def test_memory_that_has_become_too_small_is_refused():
    arguments = CALLS[batch_norm]()
    arguments["x"].untyped_storage().resize_(100)
    with pytest.raises(ValueError, match="x: expected a tensor with memory"):
        batch_norm(**arguments)
    arguments = CALLS[batch_norm]()
    arguments["bias"] = torch.ones(9)[5:]
    batch_norm(**arguments)
    arguments["bias"].untyped_storage().resize_(32)
    with pytest.raises(ValueError, match="bias: expected a tensor with memory"):
        batch_norm(**arguments)


@pytest.mark.parametrize("function", [batch_norm, batch_norm_squeeze_excite_residual])
def test_memory_freed_between_the_passes_is_refused(function):
    arguments = CALLS[function]()
    arguments["weight"].requires_grad_()
    y = function(**arguments, impl="native")
    arguments["x"].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="x: its memory was freed"):
        y.sum().backward()


@pytest.mark.parametrize("function", CALLS)
def test_meta_tensors_crash_nothing(function):
    def moved(value):
        if isinstance(value, list):
            return [each.to("meta") for each in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    try:
        function(**{name: moved(value) for name, value in CALLS[function]().items()})
    except (RuntimeError, ValueError, NotImplementedError) as error:
        assert "meta" in str(error).lower()


def arguments_of(name, dtype):
    """What a pass is given for maps of 2 images of 4 channels and 3x3 pixels, on one thread."""
    numbers = {"rows": 18, "channels": 4, "images": 2, "pixels": 9, "segment": 9, "relu": 1, "threads": 1}
    found = {}
    for parameter, kind in library._signatures()[name]:
        if kind == "int64_t":
            found[parameter] = numbers[parameter]
        elif kind == "T":
            found[parameter] = maps("x")["x"].to(dtype)
        else:
            found[parameter] = torch.ones(library.SIZES.get(name, {}).get(parameter, lambda n: 4)(numbers))
    return found


@pytest.mark.parametrize("dtype", library.SUFFIXES, ids=str)
@pytest.mark.parametrize("name", library._signatures())
def test_each_argument_of_each_pass_is_checked(name, dtype):
    good = arguments_of(name, dtype)
    library.call(name, *good.values())
    for parameter, value in good.items():
        if not isinstance(value, torch.Tensor):
            wrong = [-1, 2**63, 1.0, None, True] + [0] * (parameter != "relu")
            for number in wrong:
                with pytest.raises(ValueError, match=f"{parameter}: expected a whole number"):
                    library.call(name, *(good | {parameter: number}).values())
            if parameter != "relu":  # a number too large for what is there
                with pytest.raises((TypeError, ValueError), match="expected"):
                    library.call(name, *(good | {parameter: 5000}).values())
            continue
        freed = torch.empty_like(value)
        freed.untyped_storage().resize_(0)
        short = value[:-1] if value.dim() == 1 else value[:1]
        others = [value.double(), value.to("meta"), freed, short.clone(), value.half(), value.to_sparse(), None]
        others += [value.repeat_interleave(2, 0)[::2]]
        for other in others:
            with pytest.raises(TypeError, match=r": (expected|its memory was freed)"):
                library.call(name, *(good | {parameter: other}).values())


PASSES = """
import sys, ctypes, torch
from rsengine.kernels.native import library
passes = ctypes.CDLL(sys.argv[1])
library.load.cache_clear()
library.load = lambda: (passes, "")
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_c_code_is_clean_under_its_sanitizers(tmp_path):
    """AddressSanitizer finds a read or write past an array, UBSan what C leaves undefined; either ends the process."""
    if not (compiler := shutil.which("gcc")):
        pytest.skip("gcc is not installed")
    runtimes = [
        subprocess.run([compiler, f"-print-file-name=lib{each}.so"], capture_output=True, text=True).stdout.strip()
        for each in ("asan", "ubsan")
    ]
    if not all(Path(each).is_absolute() for each in runtimes):
        pytest.skip("gcc has no libasan or libubsan here")
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-fno-omit-frame-pointer"]
    flags = [flag for flag in build.FLAGS if flag != "-O3"]
    path = tmp_path / "passes.so"
    sources = [str(source) for source in build.SOURCES if source.suffix == ".c"]
    subprocess.run([compiler, *flags, *checks, *sources, "-o", str(path)], check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python gives back nothing at its end
        "RSENGINE_CACHE": str(tmp_path),
    }
    # First that a fault is found: 64 floats of an array that holds fewer.
    fault = (
        "import ctypes, sys, torch; x, s, y, n = torch.ones(64), torch.ones(8), torch.empty(56), ctypes.c_int64;"
        "a = lambda t: ctypes.c_void_p(t.data_ptr());"
        "ctypes.CDLL(sys.argv[1]).affine_f32(a(x), n(8), n(8), a(s), a(s), n(1), a(y), n(1))"
    )
    found = subprocess.run([sys.executable, "-c", fault, str(path)], env=environment, capture_output=True, text=True)
    assert found.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in found.stderr, found.stderr[-2000:]
    here = Path(__file__).parent
    tests = [str(here / f"test_{name}.py") for name in ("batch_normalization", "convolutions", "bottleneck")]
    # Not what is in processes of its own, and Inductor's.
    left_out = ("explained", "compiled", "compiler", "bfloat16_weights", "torch_compile")
    tests += ["-k", " and ".join(f"not {word}" for word in left_out)]
    done = subprocess.run(
        [sys.executable, "-c", PASSES, str(path), *tests, f"{__file__}::test_each_argument_of_each_pass_is_checked"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=here.parents[1],
    )
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
