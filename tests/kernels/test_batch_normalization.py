"""Batch norm and the block epilogue: C passes and eager against the reference in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rsengine.kernels import batch_norm, batch_norm_squeeze_excite_residual, explain, reference
from rsengine.kernels.native import library
from tests.tolerances import assert_close

# (images, channels, height, width): one pixel; odd everything; fewer rows than threads and than a block; more than one
# block an image; channels on either side of a vector's length.
SHAPES = [(2, 8, 1, 1), (3, 5, 1, 2), (1, 7, 3, 5), (5, 17, 4, 4), (4, 33, 9, 16), (2, 64, 17, 11), (64, 16, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift


def maps(shape, dtype, **numbers):
    """Numbers that ``dtype`` holds exactly, so that the float64 reference sees the same."""
    return random(*shape, **numbers).to(dtype).contiguous(memory_format=torch.channels_last)


def inputs(shape, dtype, epilogue):
    channels = shape[1]
    hidden = max(1, channels // 4)
    tensors = {
        "x": maps(shape, dtype, seed=1, scale=2.0, shift=0.5),
        "weight": random(channels, seed=2).float(),
        "bias": random(channels, seed=3).float(),
    }
    if epilogue:
        tensors |= {
            "w1": random(hidden, channels, seed=4).float(),
            "b1": random(hidden, seed=5).float(),
            "w2": random(channels, hidden, seed=6).float(),
            "b2": random(channels, seed=7).float(),
            "shortcut": maps(shape, dtype, seed=8),
        }
    return tensors


def run(function, tensors, dy, exact, **options):
    """Output, gradients and buffers of an op on its own copies, in float64 if ``exact``."""
    leaves = {k: (t.double() if exact else t.clone()).requires_grad_() for k, t in tensors.items()}
    channels = tensors["weight"].shape[0]
    kind = torch.float64 if exact else torch.float32
    buffers = torch.full((channels,), 0.25, dtype=kind), torch.full((channels,), 2.0, dtype=kind)
    names = list(leaves)
    arguments = [leaves[n] for n in names]
    y = function(*arguments[:3], *buffers, *arguments[3:], **options)
    y.backward(dy.double() if exact else dy)
    found = {"y": y, "running_mean": buffers[0], "running_var": buffers[1]}
    return found | {"d" + n: leaves[n].grad for n in names}


def compare(function, truth, shape, dtype, epilogue, **options):
    tensors, dy = inputs(shape, dtype, epilogue), maps(shape, dtype, seed=9)
    expected = run(truth, tensors, dy, True, **options)
    eager = run(function, tensors, dy, False, impl="eager", **options)
    native = run(function, tensors, dy, False, impl="native", **options)
    for name, value in native.items():
        assert value.dtype == eager[name].dtype, name
        scale = max(1.0, float(expected[name].detach().abs().max()))
        assert_close(value, expected[name], scale=scale, eager=eager[name])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape, dtype, relu):
    compare(batch_norm, reference.batch_norm, shape, dtype, False, relu=relu, momentum=0.3, eps=1e-3)


@pytest.mark.parametrize("depth", [False, True], ids=["", "stochastic depth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_epilogue(shape, dtype, depth):
    keep = torch.tensor([0.0, 1.25])[torch.arange(shape[0]) % 2] if depth else None
    compare(
        batch_norm_squeeze_excite_residual,
        reference.batch_norm_squeeze_excite_residual,
        shape,
        dtype,
        True,
        keep_scale=keep,
        momentum=0.3,
        eps=1e-3,
    )


@pytest.mark.parametrize("epilogue", [False, True], ids=["batch norm", "block epilogue"])
def test_a_large_mean_costs_no_more_precision_than_eager(epilogue):
    """Squares of a mean of 100 would leave a variance of 1 three digits in float32."""
    tensors, dy = inputs((8, 16, 8, 8), torch.float32, epilogue), maps((8, 16, 8, 8), torch.float32, seed=9)
    tensors["x"] = tensors["x"] + 100
    function = batch_norm_squeeze_excite_residual if epilogue else batch_norm
    truth = run(getattr(reference, function.__name__), tensors, dy, True)
    eager, native = (run(function, tensors, dy, False, impl=impl) for impl in ("eager", "native"))
    for name, value in native.items():
        assert_close(value, truth[name], scale=50 if name == "running_mean" else 10, eager=eager[name])


def test_nan_stays_nan_and_infinity_reaches_the_output():
    x = maps((4, 8, 4, 4), torch.bfloat16)
    x[0, 3, 1, 1], x[1, 5, 0, 0] = float("nan"), float("inf")
    ones, zeros = torch.ones(8), torch.zeros(8)
    found = batch_norm(x, ones, zeros, zeros.clone(), ones.clone(), relu=True, impl="native")
    assert found[:, 3].isnan().all() and found[:, 5].isnan().any() and found[:, [0, 1, 2, 4, 6, 7]].isfinite().all()


def test_bfloat16_is_the_float32_result_rounded_to_the_nearest():
    x, ones, zeros = maps((3, 9, 5, 7), torch.bfloat16), torch.ones(9), torch.zeros(9)
    rounded, whole = (batch_norm(t, ones, zeros, zeros.clone(), ones.clone(), impl="native") for t in (x, x.float()))
    assert torch.equal(rounded, whole.bfloat16())


def test_outputs_are_written_whole(monkeypatch):
    """Whatever lies in the memory an output gets: every allocation is filled with NaN first."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    for epilogue in (False, True):
        function = batch_norm_squeeze_excite_residual if epilogue else batch_norm
        found = run(function, inputs((3, 9, 5, 7), torch.bfloat16, epilogue), maps((3, 9, 5, 7), torch.bfloat16), False)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_and_the_same_bits_each_time(threads):
    before = torch.get_num_threads()
    tensors, dy = inputs((5, 24, 9, 9), torch.float32, True), maps((5, 24, 9, 9), torch.float32)
    truth = run(reference.batch_norm_squeeze_excite_residual, tensors, dy, True)
    try:
        torch.set_num_threads(threads)
        first, second = (run(batch_norm_squeeze_excite_residual, tensors, dy, False, impl="native") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert_close(value, truth[name], scale=20)


def test_contiguous_inputs_and_gradients_give_the_same():
    tensors, dy = inputs((3, 6, 4, 5), torch.float32, True), maps((3, 6, 4, 5), torch.float32)
    expected = run(batch_norm_squeeze_excite_residual, tensors, dy, False, impl="native")
    tensors["x"], tensors["shortcut"] = tensors["x"].contiguous(), tensors["shortcut"].contiguous()
    found = run(batch_norm_squeeze_excite_residual, tensors, dy.contiguous(), False, impl="native")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_under_autocast_the_tail_is_as_near_as_eager():
    tensors, dy = inputs((8, 32, 4, 4), torch.bfloat16, True), maps((8, 32, 4, 4), torch.bfloat16, seed=9)
    truth = run(reference.batch_norm_squeeze_excite_residual, tensors, dy, True)
    with torch.autocast("cpu", torch.bfloat16):
        eager, native = (
            run(batch_norm_squeeze_excite_residual, tensors, dy, False, impl=impl) for impl in ("eager", "native")
        )
    for name, value in native.items():
        assert_close(value, truth[name], scale=max(1.0, float(truth[name].detach().abs().max())), eager=eager[name])


def test_where_native_cannot_run_it_says_why_and_auto_is_eager():
    ones, zeros = torch.ones(4), torch.zeros(4)

    def normalise(x, impl):
        return batch_norm(x, ones.to(x.dtype), zeros.to(x.dtype), zeros.to(x.dtype), ones.to(x.dtype), impl=impl)

    for x, reason in [
        (torch.randn(2, 4, 3, 3, dtype=torch.float64), "float64"),
        (torch.randn(0, 4, 3, 3), "empty"),
        (torch.randn(2, 4, 3, 3, device="meta"), "meta"),
    ]:
        with pytest.raises(RuntimeError, match=f"impl: 'native' cannot run batch_norm here, because .*{reason}"):
            normalise(x, "native")
        if x.device.type == "cpu" and x.numel():
            expected = F.batch_norm(x, None, None, ones.double(), zeros.double(), True)
            torch.testing.assert_close(normalise(x, "auto"), expected)
    with pytest.raises(ValueError, match="impl: expected one of auto, native, triton, eager; got 'cuda'"):
        normalise(torch.randn(2, 4, 3, 3), "cuda")


MODEL = """
import torch
from rsengine.model import resnet_rs
torch.manual_seed(0)
model = resnet_rs(26, 10, stem_width=16).train()
x, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
expected = model.stages(model.stem(x))
model = model.bfloat16()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
found = model.stages(model.stem(x.bfloat16()))
assert (found - expected).norm() < 0.05 * expected.norm()
losses = []
for _ in range(3):
    losses.append(torch.nn.functional.cross_entropy(model(x.bfloat16()).float(), labels))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < losses[0], losses
"""


def test_a_model_of_bfloat16_weights_trains():
    """In a process of its own: C that takes bfloat16 memory for float32 corrupts the heap, which ends the process."""
    done = subprocess.run([sys.executable, "-c", MODEL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def channel_vectors(channels=4, **changed):
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    vectors = {"weight": ones, "bias": zeros, "running_mean": zeros.clone(), "running_var": ones.clone()}
    return vectors | changed


UNFIT = {
    "float64 statistics": ({"running_mean": torch.zeros(4).double(), "running_var": torch.ones(4).double()}, "float64"),
    "bfloat16 weight": ({"weight": torch.ones(4).bfloat16()}, "weight is torch.bfloat16"),
    "strided statistics": ({"running_var": torch.ones(8)[::2]}, "running_var is non-contiguous torch.float32"),
    "expanded bias": ({"bias": torch.zeros(1).expand(4)}, "bias is non-contiguous"),
    "bias elsewhere": ({"bias": torch.zeros(4, device="meta")}, "bias is on meta and the input on cpu"),
}


@pytest.mark.parametrize("epilogue", [False, True], ids=["batch norm", "block epilogue"])
@pytest.mark.parametrize("name", UNFIT)
def test_vectors_that_c_would_misread_are_left_to_eager(name, epilogue):
    changed, reason = UNFIT[name]
    x, function, others = torch.randn(2, 4, 3, 3), batch_norm, ()
    if epilogue:
        function = batch_norm_squeeze_excite_residual
        others = torch.randn(1, 4), torch.zeros(1), torch.randn(4, 1), torch.zeros(4), torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match=f"impl: 'native' cannot run {function.__name__} here, because .*{reason}"):
        function(x, *channel_vectors(**changed).values(), *others, impl="native")

    def outcome(impl):
        vectors = {key: value.clone() if value.is_contiguous() else value for key, value in changed.items()}
        vectors = channel_vectors(**vectors)
        try:
            return function(x, *vectors.values(), *others, impl=impl), *vectors.values()
        except ValueError as error:  # PyTorch's own batch norm mixes no dtypes and devices
            return str(error)

    eager, auto = outcome("eager"), outcome("auto")
    assert type(auto) is type(eager)
    if isinstance(eager, str):
        assert auto == eager
    else:
        for one, other in zip(auto, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "changed", "words"),
    [
        (torch.float64, {}, "weight: expected torch.float64 on cpu beside x in torch.float64; got torch.float32 on"),
        (torch.float32, {"bias": torch.zeros(4).double()}, "bias: expected torch.float32 .* got torch.float64"),
        (torch.bfloat16, {"weight": torch.ones(4).half()}, "weight: expected torch.bfloat16 .* got torch.float16"),
        (torch.bfloat16, {"running_var": torch.ones(4).bfloat16()}, "running_var: expected torch.float32 .*bfloat16"),
    ],
)
def test_dtypes_that_do_not_go_together_are_named(dtype, changed, words):
    with pytest.raises(ValueError, match=words):
        batch_norm(torch.randn(2, 4, 3, 3, dtype=dtype), *channel_vectors(**changed).values(), impl="eager")


def test_it_is_explained_what_native_takes():
    answer = explain("batch_norm", "cpu")
    assert answer.endswith("; parameters and running statistics that are not contiguous float32 take eager")


@pytest.mark.parametrize("impl", ["native", "eager"])
def test_a_shortcut_of_another_dtype_is_no_silent_change_of_the_implementation(impl, monkeypatch):
    x, weights = torch.randn(2, 4, 3, 3), (torch.ones(1, 4), torch.ones(1), torch.ones(4, 1), torch.ones(4))
    arguments = x, *channel_vectors().values(), *weights, x.bfloat16()
    monkeypatch.setattr(library, "call", None)  # nothing native may run
    if impl == "native":
        with pytest.raises(RuntimeError, match="shortcut is torch.bfloat16 and the input torch.float32"):
            batch_norm_squeeze_excite_residual(*arguments, impl=impl)
    else:
        assert batch_norm_squeeze_excite_residual(*arguments, impl=impl).dtype == torch.float32


@pytest.mark.parametrize("impl", ["native", "eager"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"w1": torch.ones(1, 3)}, r"w1: expected \(R, 4\)"),
        ({"w2": torch.ones(1, 1), "b2": torch.ones(1)}, r"w2: expected \(4, 1\); got \(1, 1\)"),
        ({"b2": torch.ones(1)}, r"b2: expected \(4,\); got \(1,\)"),
        ({"keep_scale": torch.ones(1)}, r"keep_scale: expected \(2,\); got \(1,\)"),
        ({"b1": torch.ones(1, dtype=torch.int64)}, "b1: expected floating point on cpu; got torch.int64"),
        ({"shortcut": torch.ones(2, 4, 3, 3, device="meta")}, "shortcut: expected floating point on cpu; got .* meta"),
    ],
)
def test_squeeze_excite_that_does_not_fit_is_refused_before_c_runs(changed, says, impl):
    """A gate of one channel would broadcast, and C write the sums of all channels into it."""
    x, kept = torch.randn(2, 4, 3, 3), torch.ones(2)
    rest = {"w1": torch.ones(1, 4), "b1": torch.ones(1), "w2": torch.ones(4, 1), "b2": torch.ones(4)}
    rest |= {"shortcut": x.clone(), "keep_scale": kept, **changed}
    with pytest.raises(ValueError, match=says):
        batch_norm_squeeze_excite_residual(x, **channel_vectors(), **rest, impl=impl)


def test_c_gets_no_address_of_a_tensor_of_another_kind():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    good = {"x": x, "rows": 18, "channels": 4, "scale": torch.ones(4), "shift": torch.zeros(4), "relu": 0}
    good |= {"y": torch.empty_like(x), "threads": 1}
    library.call("affine", *good.values())
    assert torch.equal(good["y"], x)
    for changed, says in [
        ({"scale": torch.ones(4).double()}, "scale: expected contiguous torch.float32 on the CPU; got torch.float64"),
        ({"shift": torch.zeros(8)[::2]}, r"shift: expected .* strides \(2,\)"),
        ({"y": torch.empty(2, 4, 3, 3)}, "y: expected .* in channels_last"),
        ({"y": torch.empty(3, 4, 3, 3).contiguous(memory_format=torch.channels_last)}, r"y: expected .*\(2, 4, 3, 3\)"),
        ({"y": torch.empty_like(x, dtype=torch.float64)}, "y: expected torch.float32"),
    ]:
        with pytest.raises(TypeError, match=says):
            library.call("affine", *(good | changed).values())
    with pytest.raises(ValueError, match="shorter"):
        library.call("affine", *list(good.values())[:-1])


def test_arguments_that_do_not_fit_are_named():
    x, ones, zeros = torch.randn(2, 4, 3, 3), torch.ones(4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"x: expected floating point \(N, C, H, W\); got torch.float32 \(4, 3\)"):
        batch_norm(x[0, :, :, 0], ones, zeros, zeros, ones)
    with pytest.raises(ValueError, match=r"running_var: expected \(4,\); got \(3,\)"):
        batch_norm(x, ones, zeros, zeros, torch.ones(3))
    with pytest.raises(ValueError, match=r"x: expected more than one value a channel"):
        batch_norm(torch.randn(1, 4, 1, 1), ones, zeros, zeros, ones)
    with pytest.raises(ValueError, match=r"running_mean: expected \(4,\); got None"):
        batch_norm(x, ones, zeros, None, ones)
    for momentum, eps, words in [
        (1.5, 1e-5, r"momentum: expected a number in \[0, 1\]; got 1.5"),
        (0.1, -1.0, "eps: expected a finite number of at least 0; got -1.0"),
        (0.1, float("nan"), "eps: expected a finite number of at least 0; got nan"),
    ]:
        with pytest.raises(ValueError, match=words):
            batch_norm(x, ones, zeros, zeros, ones, momentum, eps)
    with pytest.raises(ValueError, match=r"shortcut: expected the shape of x"):
        weights = torch.ones(1, 4), torch.ones(1), torch.ones(4, 1), torch.ones(4)
        batch_norm_squeeze_excite_residual(x, ones, zeros, zeros, ones, *weights, x[:1])


def test_torch_compile_takes_pytorchs_operators():
    tensors, dy = inputs((4, 8, 3, 3), torch.float32, True), maps((4, 8, 3, 3), torch.float32)
    expected = run(batch_norm_squeeze_excite_residual, tensors, dy, False, impl="native")
    torch.compiler.reset()
    compiled = torch.compile(batch_norm_squeeze_excite_residual, fullgraph=True, dynamic=False, backend="aot_eager")
    found = run(compiled, tensors, dy, False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


SCRIPT = """
import torch
from rsengine.kernels import batch_norm, explain
print(explain("batch_norm", "cpu"))
x, ones, zeros = torch.randn(2, 4, 3, 3), torch.ones(4), torch.zeros(4)
y = batch_norm(x, ones, zeros, zeros.clone(), ones.clone())
assert torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, ones, zeros, True), atol=1e-5)
"""


def explained(monkeypatch, cache, compiler=None):
    """What a new process says of the op, after using it."""
    monkeypatch.setenv("RSENGINE_CACHE", str(cache))
    if compiler:
        monkeypatch.setenv("CC", str(compiler))
    return subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout


def test_the_library_is_compiled_once_and_kept(monkeypatch, tmp_path):
    assert "native on cpu, because" in explained(monkeypatch, tmp_path)
    (library,) = (tmp_path / "native").iterdir()
    written = library.stat().st_mtime_ns
    explained(monkeypatch, tmp_path)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "native").iterdir()] == [written]


def test_without_a_working_compiler_it_is_eager_and_says_so(monkeypatch, tmp_path):
    assert (
        "missing-compiler cannot be started (No such file or directory); see the environment variable CC"
        in explained(monkeypatch, tmp_path, tmp_path / "missing-compiler")
    )
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.c:1: error: out of luck' >&2; exit 1\n")
    broken.chmod(0o755)
    answer = explained(monkeypatch, tmp_path, broken)
    assert answer.startswith("batch_norm: eager on cpu, because") and "error: out of luck" in answer
    assert not list((tmp_path / "native").iterdir())
