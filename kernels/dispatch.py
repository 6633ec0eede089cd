"""Which implementation of an op runs, and why. The only place in this package that asks about devices."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

OPS = ("augment_batch", "squeeze_excite", "squeeze_excite_residual", "label_smoothed_cross_entropy")
UPDATE_OPS = ("ema_update", "sgd_ema_step")  # of lists of tensors; in C for the CPU beside Triton for the GPU
NATIVE_OPS = ("batch_norm", "batch_norm_squeeze_excite_residual")  # in C for the CPU beside Triton for the GPU
BLOCK_OPS = ("conv_batch_norm_relu", "bottleneck")  # in C for the CPU alone
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS = ("auto", "triton", "eager")
NATIVE_IMPLEMENTATIONS = ("auto", "native", "triton", "eager")
BLOCK_IMPLEMENTATIONS = ("auto", "native", "eager")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # uint8: pixels
OLDEST_CAPABILITY = (8, 0)  # Ampere: the oldest GPU the kernels are compiled for in the tests

_triton_assumed = contextvars.ContextVar("rsengine_triton_assumed", default=False)
# Of each eager_only() that is open: whether ops may read values on the host. A context variable would not do, because
# activation checkpointing runs forward passes again in autograd's threads, which have a context of their own.
_eager_blocks: list[bool] = []
INSIDE_EAGER_ONLY = "the process is inside eager_only()"


@contextlib.contextmanager
def assume_triton() -> Iterator[None]:
    """In the block, ``"auto"`` chooses as on a GPU with Triton wherever the device is not the CPU.

    For tracing a program with fake tensors on a machine without a GPU: each op appears as the one operator that it is
    on a GPU, and the operator's fake implementation answers. On real tensors it would fail.
    """
    token = _triton_assumed.set(True)
    try:
        yield
    finally:
        _triton_assumed.reset(token)


def is_triton_assumed() -> bool:
    """Whether the caller is inside :func:`assume_triton`."""
    return _triton_assumed.get()


@contextlib.contextmanager
def eager_only(*, host_reads: bool = True) -> Iterator[None]:
    """In the block every op of the process runs in PyTorch's operators, and asking for anything else is an error.

    For what records or counts operators, and for measuring what the fused operations are worth.

    Args:
        host_reads: ``False``: no op looks at a tensor's values on the host either, as on a GPU, so that its operators
            can be recorded and replayed.
    """
    _eager_blocks.append(host_reads)
    try:
        yield
    finally:
        _eager_blocks.remove(host_reads)


def may_read(tensor: Tensor) -> bool:
    """Whether the host may look at values here: on the CPU, where tensors have some and nothing waits for them."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and all(_eager_blocks)


def check_memory(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor whose memory was given back, as ``untyped_storage().resize_(0)`` does.

    Everything that reads it, PyTorch's own operators too, would end the process.
    """
    if torch.compiler.is_compiling():  # what is traced has no memory
        return
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and tensor.numel():
            last = tensor.storage_offset() + sum(
                (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
            )
            if (last + 1) * tensor.element_size() > _bytes_behind(tensor):
                raise ValueError(f"{name}: expected a tensor with memory; got one whose memory was freed")


def has_memory(tensor: Tensor) -> bool:
    """The same for lists of hundreds of tensors, where only none at all is looked for."""
    return not tensor.numel() or torch.compiler.is_compiling() or bool(_bytes_behind(tensor))


def _bytes_behind(tensor: Tensor) -> float:
    try:
        return tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a function transform's, which stands for another
        return float("inf")


def explain(op: str, device: torch.device | str | None = None) -> str:
    """Say which implementation ``impl="auto"`` chooses for ``op`` on ``device``, and why.

    Args:
        op: one of :data:`OPS`, :data:`UPDATE_OPS`, :data:`NATIVE_OPS` or :data:`BLOCK_OPS`.
        device: ``None`` is the GPU where PyTorch sees one, else the CPU.

    Raises:
        ValueError: ``op`` is none of them.
    """
    known = OPS + UPDATE_OPS + NATIVE_OPS + BLOCK_OPS
    if op not in known:
        raise ValueError(f"op: expected one of {', '.join(known)}; got {op!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if _eager_blocks:
        return f"{op}: eager on {place}, because {INSIDE_EAGER_ONLY}"
    if op in NATIVE_OPS + UPDATE_OPS and place.type == "cpu":
        native, reason = _native_on(place.type)
        if native and op in UPDATE_OPS:
            reason += "; tensors that are not float32, or not dense in one order for each parameter, take eager"
        elif native:
            reason += "; parameters and running statistics that are not contiguous float32 take eager"
        return f"{op}: {'native' if native else 'eager'} on {place}, because {reason}"
    if op in BLOCK_OPS:
        native, _, reason = _blocks_on(place.type)
        if native:
            reason += "; under autocast in bfloat16, for float32 parameters"
        return f"{op}: {'native' if native else 'eager'} on {place}, because {reason}"
    automatic, _, reason = _triton_on(place.type, place.index)
    return f"{op}: {'triton' if automatic else 'eager'} on {place}, because {reason}"


def choose(op: str, impl: str, tensor: Tensor) -> str:
    """``"triton"`` or ``"eager"`` for an ``op`` whose main input is ``tensor``.

    Raises:
        ValueError: ``impl`` is not one of :data:`IMPLEMENTATIONS`.
        RuntimeError: ``impl="triton"`` where it cannot run; the message says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "eager":
        return "eager"
    automatic, possible, reason = _triton_on(tensor.device.type, tensor.device.index)
    if _eager_blocks:
        automatic, possible, reason = False, False, INSIDE_EAGER_ONLY
    elif tensor.dtype not in TRITON_DTYPES:
        automatic, possible, reason = False, False, f"the kernels compute in float32, and the input is {tensor.dtype}"
    if impl == "auto":
        return "triton" if automatic else "eager"
    if not possible:
        raise RuntimeError(f"impl: 'triton' cannot run {op} here, because {reason}; use 'auto' or 'eager'")
    return "triton"


def choose_native(op: str, impl: str, maps: dict[str, Tensor], vectors: dict[str, Tensor]) -> str:
    """``"native"``, ``"triton"`` or ``"eager"`` for an ``op`` of :data:`NATIVE_OPS`.

    Under :func:`torch.compile`, ``"auto"`` is eager: Inductor fuses these operations with what surrounds them.

    Args:
        maps: the inputs with pixels, by name: the main one first, the others in its dtype.
        vectors: the parameters and statistics of the channels, by name.

    Raises:
        ValueError: ``impl`` is not one of :data:`NATIVE_IMPLEMENTATIONS`.
        RuntimeError: ``impl`` names an implementation that cannot run; the message says why.
    """
    if impl not in NATIVE_IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(NATIVE_IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "eager":
        return "eager"
    main = next(iter(maps.values()))
    wanted = impl if impl != "auto" else "native" if main.device.type == "cpu" else "triton"
    automatic = possible = False
    reason = "torch.compile sees only PyTorch's operators"
    if not torch.compiler.is_compiling():
        dtypes = NATIVE_DTYPES if wanted == "native" else TRITON_DTYPES
        reason = INSIDE_EAGER_ONLY if _eager_blocks else _unfit(maps, vectors, dtypes, wanted)
        if not reason and wanted == "native":
            automatic, reason = _native_on(main.device.type)
            possible = automatic
        elif not reason:
            automatic, possible, reason = _triton_on(main.device.type, main.device.index)
    if impl == "auto":
        return wanted if automatic else "eager"
    if not possible:
        raise RuntimeError(f"impl: {impl!r} cannot run {op} here, because {reason}; use 'auto' or 'eager'")
    return wanted


def choose_update(op: str, impl: str, tensor: Tensor) -> str:
    """``"triton"`` for an ``op`` of :data:`UPDATE_OPS` whose first tensor is ``tensor``, or else ``impl`` as it is.

    :func:`choose_update_on_host` chooses among the others when the op runs, which is one operator to
    :func:`torch.compile`.

    Raises:
        ValueError: ``impl`` is not one of :data:`NATIVE_IMPLEMENTATIONS`.
        RuntimeError: ``impl="triton"`` where it cannot run; the message says why.
    """
    if impl not in NATIVE_IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(NATIVE_IMPLEMENTATIONS)}; got {impl!r}")
    return "triton" if impl != "native" and choose(op, impl, tensor) == "triton" else impl


def choose_update_on_host(op: str, impl: str, tensor: Tensor, unfit: Callable[[], str]) -> str:
    """``"native"`` or ``"eager"`` for an ``op`` of :data:`UPDATE_OPS` that does not run in Triton.

    Args:
        tensor: the first one.
        unfit: says why C cannot have the tensors, or nothing. Called where nothing else decides.

    Raises:
        RuntimeError: ``impl="native"`` where it cannot run; the message says why.
    """
    if impl == "eager":
        return "eager"
    possible = False
    reason = INSIDE_EAGER_ONLY if _eager_blocks else unfit() if tensor.device.type == "cpu" else ""
    if not reason:
        possible, reason = _native_on(tensor.device.type)
    if impl == "native" and not possible:
        raise RuntimeError(f"impl: 'native' cannot run {op} here, because {reason}; use 'auto' or 'eager'")
    return "native" if possible else "eager"


def choose_blocks(op: str, impl: str, x: Tensor, parameters: Sequence[Tensor]) -> str:
    """``"native"`` or ``"eager"`` for an ``op`` of :data:`BLOCK_OPS` with input ``x``.

    Under :func:`torch.compile`, ``"auto"`` is eager, as in :func:`choose_native`.

    Raises:
        ValueError: ``impl`` is not one of :data:`BLOCK_IMPLEMENTATIONS`.
        RuntimeError: ``impl="native"`` where it cannot run; the message says why.
    """
    if impl not in BLOCK_IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(BLOCK_IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "eager":
        return "eager"
    automatic = possible = False
    reason = "torch.compile sees only PyTorch's operators"
    if not torch.compiler.is_compiling():
        reason = INSIDE_EAGER_ONLY if _eager_blocks else _unfit_for_blocks(x, parameters)
        if not reason:
            automatic, possible, reason = _blocks_on(x.device.type)
    if impl == "native" and not possible:
        raise RuntimeError(f"impl: 'native' cannot run {op} here, because {reason}; use 'auto' or 'eager'")
    return "native" if automatic or impl == "native" else "eager"


def _unfit_for_blocks(x: Tensor, parameters: Sequence[Tensor]) -> str:
    if x.device.type != "cpu":
        return _blocks_on(x.device.type)[2]
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "it is for autocast in bfloat16, which is off"
    if not x.numel():
        return "the input is empty"
    if x.dtype not in NATIVE_DTYPES:
        return f"it is written for {' and '.join(map(str, NATIVE_DTYPES))} maps, and the input is {x.dtype}"
    for tensor in (x, *parameters):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"a tensor is a {type(tensor).__name__}, which has no memory to pass over"
    for tensor in parameters:
        dense = tensor.dim() == 4 or tensor.is_contiguous()
        if tensor.dtype != torch.float32 or tensor.device != x.device or not dense:
            return (
                "it takes float32 parameters that are contiguous, or in channels_last, on the device of the input, and "
                f"one is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    return ""


def _unfit(maps: dict[str, Tensor], vectors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...], wanted: str) -> str:
    """Why code that is given addresses cannot have these tensors, or nothing: one of another kind would be misread."""
    main = next(iter(maps.values()))
    if main.dtype not in dtypes or not main.is_floating_point():
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point)
        return f"it is written for {names}, and the input is {main.dtype}"
    if not main.numel():
        return "the input is empty"
    for name, tensor in (maps | vectors).items():
        # A tracer's fake tensors reach Triton's operator, whose fake implementation answers.
        if wanted == "native" and type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}, which has no memory to pass over"
        if tensor.device != main.device:
            return f"{name} is on {tensor.device} and the input on {main.device}"
    for name, tensor in maps.items():
        if tensor.dtype != main.dtype:
            return f"{name} is {tensor.dtype} and the input {main.dtype}"
    for name, tensor in vectors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            kind = "" if tensor.is_contiguous() else "non-contiguous "
            return f"it takes contiguous float32 vectors, and {name} is {kind}{tensor.dtype}"
    return ""


def _native_on(device_type: str) -> tuple[bool, str]:
    if device_type != "cpu":
        return False, f"the passes are for the CPU, and the device type is {device_type!r}"
    from .native.library import load

    library, reason = load()
    return library is not None, reason


def _blocks_on(device_type: str) -> tuple[bool, bool, str]:
    """As :func:`_triton_on`, for the functions in C."""
    if device_type != "cpu":
        return False, False, f"the functions are for the CPU, and the device type is {device_type!r}"
    from .native.convolutions import available

    return available()


def _triton_on(device_type: str, index: int | None) -> tuple[bool, bool, str]:
    """``(chosen by "auto", possible when asked for, the reason)`` for Triton on a device."""
    if device_type != "cpu" and is_triton_assumed():
        return True, True, "a tracer assumes a GPU that Triton compiles for"
    if importlib.util.find_spec("triton") is None:
        return False, False, "Triton is not installed (pip install triton)"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return False, True, "on the CPU Triton has only its interpreter (TRITON_INTERPRET=1), which is for tests"
        return False, False, "Triton compiles for GPUs only"
    if device_type != "cuda" or not torch.cuda.is_available():
        return False, False, f"PyTorch sees no GPU that Triton compiles for (device type {device_type!r})"
    if torch.version.hip:
        return False, True, "the kernels compile for AMD GPUs and have not been proved on one"
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST_CAPABILITY:
        return False, False, f"{name}, and the kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    return True, True, name


# What torch.compiler.assume_constant_result sets, after importing the compiler and with it Triton: torch.compile is to
# take the answer as it is and not look inside.
_triton_on._dynamo_marked_constant = True
