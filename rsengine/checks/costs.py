"""What the operators of a traced step ask of a GPU: kernels, bytes, arithmetic, and the time that these allow.

Predicted, not measured: for each operator the kernels that it is known to launch, and the largest of three times. The
GPU check compares the kernels with those that a profiler sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rsengine.checks.trace import Operand, Operation

# An H100 SXM by its data sheet, and what a launch costs inside a CUDA graph.
H100_BYTES, H100_FLOPS, LAUNCH_SECONDS = 3.35e12, 989e12, 2.25e-6

# Operators of more than one kernel: PyTorch's, where it depends on nothing but the operator.
SEVERAL = {
    "aten.convolution_backward": 2,  # of the input and of the weight
    "aten.native_batch_norm": 2,
    "aten.native_batch_norm_backward": 2,
}
MULTI_TENSOR = {1: 110, 2: 64}  # tensors that a kernel of a foreach operator takes, by the number of its lists


@dataclass(frozen=True)
class Prediction:
    """Of one step."""

    operators: int
    kernels: int
    bytes: int
    flops: int
    seconds: float  # the sum over operators of the largest of launch, memory and arithmetic time

    @property
    def memory_seconds(self) -> float:
        """What the bytes alone take."""
        return self.bytes / H100_BYTES


def predict(operations: Sequence[Operation]) -> Prediction:
    """Add up a step. Bytes are counted as if no operator found any of them in a cache."""
    work = [operation for operation in operations if operation.launches]
    costs = [(kernels_of(operation), operation.bytes + _more(operation), operation.flops) for operation in work]
    seconds = [max(kernels * LAUNCH_SECONDS, moved / H100_BYTES, flops / H100_FLOPS) for kernels, moved, flops in costs]
    kernels, moved, flops = (sum(column) for column in zip(*costs, strict=True))
    return Prediction(len(work), kernels, moved, flops, sum(seconds))


def kernels_of(operation: Operation) -> int:
    """How many kernels an operator launches, as far as is known; 0 for one that launches none."""
    if not operation.launches:
        return 0
    name = operation.name
    if name.startswith("aten._foreach"):
        return _foreach(operation)
    own = OWN.get(name.removesuffix(".default"))
    return own(_operands(operation)) if own is not None else SEVERAL.get(name, 1)


def _foreach(operation: Operation) -> int:
    lists = 2 if operation.name.endswith((".List", "copy_")) else 1
    return math.ceil(len(_operands(operation)) / lists / MULTI_TENSOR[lists])


def _operands(operation: Operation) -> list[Operand]:
    return [argument for argument in operation.arguments if isinstance(argument, Operand)]


def _norm_plan(x: Operand):
    from rsengine.kernels.jit.batch_norm import plan

    n, channels, height, width = x.shape
    return plan(n * height * width, channels, x.dtype)


def _epilogue_plan(x: Operand, w1: Operand):
    from rsengine.kernels.jit.block_epilogue import plan

    n, channels, height, width = x.shape
    return plan(n, height * width, channels, w1.shape[0], x.dtype, w1.dtype)


def _batch_norm(operands: list[Operand]) -> int:
    return 1 if _norm_plan(operands[0]).is_single_pass else 2


def _epilogue_forward(operands: list[Operand]) -> int:
    x, w1 = operands[0], next(t for t in operands if len(t.shape) == 2)
    plan = _epilogue_plan(x, w1)
    return (1 if plan.is_whole else 2) + (1 if plan.is_fused else 3)


def _epilogue_backward(operands: list[Operand]) -> int:
    x, w1 = operands[1], next(t for t in operands if len(t.shape) == 2)
    return 3 if _epilogue_plan(x, w1).is_fused else 6


def _squeeze_excite(single: int, split: int) -> Callable[[list[Operand]], int]:
    def count(operands: list[Operand]) -> int:
        from rsengine.kernels.jit.squeeze_excite import plan

        x, w1 = next(t for t in operands if len(t.shape) == 4), next(t for t in operands if len(t.shape) == 2)
        pixels, channels = x.shape[2] * x.shape[3], x.shape[1]
        return single if plan(pixels, channels, w1.shape[0], x.dtype, w1.dtype).is_single_pass else split

    return count


OWN: dict[str, Callable[[list[Operand]], int]] = {
    "rsengine.batch_norm": _batch_norm,
    "rsengine.batch_norm_backward": lambda operands: _batch_norm(operands[1:]),
    "rsengine.batch_norm_squeeze_excite_residual": _epilogue_forward,
    "rsengine.batch_norm_squeeze_excite_residual_backward": _epilogue_backward,
    "rsengine.squeeze_excite": _squeeze_excite(1, 4),
    "rsengine.squeeze_excite_backward": _squeeze_excite(2, 5),
}


def _more(operation: Operation) -> int:
    """Bytes that pass beside :attr:`Operation.bytes`: maps that are read a second time, less what is never read."""
    operands, name = _operands(operation), operation.name.removeprefix("rsengine.")
    if name == "augment_batch":  # of the whole set it reads the images that the indices name
        images, indices = operands[:2]
        return images.nbytes * indices.shape[0] // images.shape[0] - images.nbytes
    if name == "batch_norm" and not _norm_plan(operands[0]).is_single_pass:
        return operands[0].nbytes
    if name == "batch_norm_backward" and not _norm_plan(operands[1]).is_single_pass:
        return 2 * operands[0].nbytes
    if name == "batch_norm_squeeze_excite_residual":
        return operands[0].nbytes
    if name == "batch_norm_squeeze_excite_residual_backward":
        return 3 * operands[0].nbytes
    if name in ("aten.native_batch_norm", "aten.native_batch_norm_backward"):
        return operands[0].nbytes * (2 if name.endswith("backward") else 1)
    return 0
