"""Triton's CPU interpreter made strict, and able to count the bytes a kernel moves: kernels proved without a GPU.

The interpreter of Triton 3.8 runs a kernel's programs one after another on NumPy arrays. It forgives what a GPU does
not, and its bfloat16 is wrong. After :func:`install` a launch raises on

- arithmetic on bfloat16 itself (``TypeError``), while casts round to nearest even and ``tl.dot`` is exact;
- ``tl.device_assert`` (``AssertionError``), and int32 arithmetic that overflows (``OverflowError``);
- a load, store or atomic outside the tensor it was addressed from, or misaligned (``IndexError``);
- two lanes of one store at one address, programs that touch memory another program writes, and a program that reads
  what it stored itself with no ``tl.debug_barrier()`` in between (:class:`RaceError`).

Programs run in a shuffled order, always the same one. ``tl.dot`` of float32 in ``"tf32"``, which is Triton's default,
drops the bits that a GPU would. Not modelled: an order between programs that atomics establish (it counts as a race),
and a store over what other lanes of the same program still have to read.

``TRITON_INTERPRET=1 python -m rsengine.kernels.proof.interpreter`` prints the bytes every compile case moves, as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import ir
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .memory import ADDRESS, Launch, Memory, RaceError, Traffic


class StrictBuilder(InterpreterBuilder):
    """The interpreter's instructions, checked. Every instruction goes through it, so it also holds a launch's state."""

    def __init__(self) -> None:
        super().__init__()
        # device_assert does nothing without debug. Triton's own check for overflow is slow; binary_op has another.
        self.options = upstream.InterpreterOptions(debug=True, sanitize_overflow=False)
        self.launch: Launch | None = None
        self.allowed: dict[int, Memory] = {}
        self.counters: list[Traffic] = []

    # programs

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self.launch.order = np.random.default_rng(0).permutation(nx * ny * nz)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        program = tuple(int(i) for i in np.unravel_index(self.launch.order[(x * ny + y) * nz + z], self.grid_dim))
        super().set_grid_idx(*program)
        self.launch.begin_program(program)

    def create_barrier(self) -> None:
        self.launch.epoch += 1

    # memory

    def checked(self, kind: str, pointers: TensorHandle, mask: object = None) -> TensorHandle:
        """The same pointers as plain addresses, after every check on the lanes that ``mask`` leaves."""
        live = pointers.data.reshape(-1)
        if mask is not None:
            chosen = np.asarray(mask.data).reshape(-1)
            live = live if chosen.all() else live[chosen]
        plain = TensorHandle(pointers.data & ADDRESS, pointers.dtype)
        if not live.size:
            return plain
        nbytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if kind == "store" and live.size > 1:
            addresses = (live & ADDRESS).view(np.int64)
            if not (addresses[1:] > addresses[:-1]).all() and np.unique(addresses).size != addresses.size:
                raise RaceError(f"race: two lanes of one store in {self.launch.where()} write one address")
        for memory, addresses in self.launch.locate(live):
            self.launch.access(kind, memory, addresses, nbytes)
            if kind == "load":
                self.launch.loaded[-1] += addresses.size * nbytes
            for counter in self.counters:
                counter.count(kind, memory.storage, addresses.size * nbytes)
        return plain

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        plain = self.checked("load", ptrs, mask)
        return super().create_masked_load(plain, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        plain = self.checked("store", ptrs, mask)
        return super().create_masked_store(plain, value, mask, cache_modifier, eviction_policy)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        return super().create_atomic_cas(self.checked("atomic", ptr), cmp, val, sem, scope)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        refuse_bfloat16(val)
        return super().create_atomic_rmw(rmwOp, self.checked("atomic", ptr, mask), val, mask, sem, scope)

    # numbers

    def get_bf16(self, value):
        return to_bfloat16(TensorHandle(np.array([value], np.float32), tl.float32))

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            wide = to_float32(src)
            return wide if target == tl.float32 else super().cast_impl(wide, dst_type)
        if target == tl.bfloat16:
            return to_bfloat16(src if source == tl.float32 else super().cast_impl(src, tl.float32))
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and rounding_mode != ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        refuse_bfloat16(lhs, rhs)
        result = super().binary_op(lhs, rhs, op)
        if result.data.dtype == np.int32 and op in (np.add, np.subtract, np.multiply):
            exact = op(lhs.data, rhs.data, dtype=np.int64)
            if not np.array_equal(exact, result.data):
                raise OverflowError(f"{self.launch.where()} overflows int32: {op.__name__} reaches {exact.max()}")
        return result

    def unary_op(self, arg, op):
        refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where:  # a choice between bit patterns is no arithmetic
            refuse_bfloat16(lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        refuse_bfloat16(x, y, z)
        return super().create_fma(x, y, z)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        refuse_bfloat16(d)
        if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
            a, b = to_tf32(a), to_tf32(b)
        a, b = (to_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


class StrictExecutor(upstream.GridExecutor):
    def __call__(self, *args, **kwargs) -> None:
        builder = _builder()
        builder.launch = Launch(self.fn.__name__, builder.allowed)
        try:
            with np.errstate(all="ignore"):  # a GPU warns of no overflow either
                super().__call__(*args, **kwargs)
            for counter in builder.counters:
                counter.longest.append(max(builder.launch.loaded, default=0))
        except upstream.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, upstream.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__  # Triton wraps an error once for each call between it and the launch
            raise cause from None
        finally:
            builder.launch = None


def to_bfloat16(handle: TensorHandle) -> TensorHandle:
    """float32 to the nearest bfloat16, ties to even; NaN becomes PyTorch's."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16)
    return TensorHandle(rounded.reshape(handle.data.shape), tl.bfloat16)


def to_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_tf32(handle: TensorHandle) -> TensorHandle:
    bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def refuse_bfloat16(*handles: TensorHandle) -> None:
    if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
        raise TypeError("arithmetic on bfloat16 itself: cast to float32 first, compute, and cast the result")


def install() -> None:
    """Make the interpreter of this process strict; a second call changes nothing.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, so that there is no interpreter; or its
            interpreter does not work with this NumPy.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter needs TRITON_INTERPRET=1 in the environment before Triton is imported")
    if isinstance(upstream.interpreter_builder, StrictBuilder):
        return
    _check_numpy()
    builder = StrictBuilder()
    upstream.interpreter_builder = upstream.interpreter_semantic.builder = builder
    upstream.GridExecutor = StrictExecutor
    convert, check = upstream._implicit_cvt, upstream.ReduceScanOpInterface.check_tensor

    def convert_argument(argument: object) -> object:
        converted = convert(argument)
        if isinstance(argument, Tensor):
            converted.handle.data += np.uint64(builder.launch.add_argument(argument))
            for counter in builder.counters:
                counter.keep(argument)
        return converted

    def check_reduction(self: object, inputs: tuple[tl.tensor, ...]) -> None:
        check(self, inputs)
        refuse_bfloat16(*(tensor.handle for tensor in inputs))

    def call_device_function(self: upstream.InterpretedFunction, *args: object, **kwargs: object) -> object:
        # Triton patches its language again at every call, which takes a quarter of all time; once a launch is enough.
        if self.fn not in builder.launch.device_functions:
            builder.launch.device_functions.add(self.fn)
            upstream._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    upstream._implicit_cvt = convert_argument
    upstream.InterpretedFunction.__call__ = call_device_function
    upstream.ReduceScanOpInterface.check_tensor = check_reduction


def _check_numpy() -> None:
    """Raise where a scalar in a kernel cannot bound a loop: Triton 3.6 leaves to NumPy what NumPy 2.4 refuses."""
    scalar = tl.tensor(TensorHandle(np.ones(1, np.int32), tl.int32), tl.int32)  # an array of one dimension, as loaded
    scope = upstream._LangPatchScope()
    upstream._patch_lang_tensor(tl.tensor, scope)
    try:
        operator.index(scalar)
    except TypeError as error:
        raise RuntimeError(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {np.__version__}: "
            "install 'numpy<2.4', or Triton 3.7 or later"
        ) from error
    finally:
        scope.restore()


def _builder() -> StrictBuilder:
    if not isinstance(upstream.interpreter_builder, StrictBuilder):
        raise RuntimeError("the interpreter is not strict yet: call install() first")
    return upstream.interpreter_builder


@contextlib.contextmanager
def allow(*tensors: Tensor) -> Iterator[None]:
    """Let kernels touch the storages of ``tensors``, which they reach through tables of pointers only."""
    builder = _builder()
    before = builder.allowed
    declared = [Memory.of_storage(tensor) for tensor in tensors]
    builder.allowed = {**before, **{memory.storage: memory for memory in declared}}
    try:
        yield
    finally:
        builder.allowed = before


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes that launches in the block load and store under their masks."""
    builder, traffic = _builder(), Traffic()
    builder.counters.append(traffic)
    try:
        yield traffic
    finally:
        builder.counters.remove(traffic)


class _AllowEverythingMade(TorchDispatchMode):
    """Declare every tensor made in the block: a compile case makes its operands itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        builder = _builder()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = Memory.of_storage(tensor)
                builder.allowed[memory.storage] = memory  # into the dictionary that allow() made for the block
                for counter in builder.counters:
                    counter.keep(tensor)
        return result


def measure() -> dict[str, dict[str, Any]]:
    """Run every compile case at its small size: ``{case: {"streams": ..., "longest": ...}}``, all in bytes.

    streams: ``{stream: {read, written, expected_read, expected_written}}``; the expected ones are what the
    case says its streams must move. longest: as in :class:`Traffic`.
    """
    from .. import jit

    report = {}
    for info in pkgutil.iter_modules(jit.__path__):
        module = importlib.import_module(f"{jit.__name__}.{info.name}")
        for case in getattr(module, "compile_cases", list)():
            with allow(), count_traffic() as traffic, _AllowEverythingMade():
                streams = case.launch(case.small)
            rows = {name: _row(stream, traffic) for name, stream in streams.items()}
            report[case.name] = {"streams": rows, "longest": traffic.longest}
    return report


def _row(stream: object, traffic: Traffic) -> dict[str, int]:
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in stream.tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in stream.tensors}.values()
    return {
        "read": sum(traffic.read(tensor) for tensor in storages),
        "written": sum(traffic.written(tensor) for tensor in storages),
        "expected_read": stream.reads * nbytes,
        "expected_written": stream.writes * nbytes,
    }


def traffic() -> dict[str, dict[str, Any]]:
    """:func:`measure` in a process of its own, for callers that are no interpreter.

    Raises:
        RuntimeError: a case failed; the message ends with its error.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"counting bytes in the interpreter failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def main() -> None:
    install()
    print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    main()
