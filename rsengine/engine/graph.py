"""A step as one replay of a CUDA graph: warm-up that leaves no trace, capture, static inputs, replay.

Nothing here is particular to training: a step is any callable that works on tensors it keeps, and evaluation is
captured by the same class. What only a GPU can do is in :class:`CudaRecorder`; the rest runs wherever a recorder does,
and the tests drive it with one for the CPU.

Sources: the CUDA-graph notes of PyTorch (docs/notes/cuda.rst: warm-up on a side stream, private pools, generators).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rsengine.device import Execution
from rsengine.kernels.jit.ema_table import capture_tables, keep_tables

# The first runs set up what a capture may not: plans and workspaces of cuDNN and cuBLAS, kernels of Triton and
# Inductor. PyTorch's notes ask for three.
WARMUP_STEPS = 3


class Step(Protocol):
    """A tensor program: static shapes, no host synchronisation, what it changes is changed in place."""

    def __call__(self, *inputs: Tensor) -> None: ...

    def state_tensors(self) -> list[Tensor]:
        """Every tensor a call changes and keeps, always the same ones at the same addresses."""


class Recorder(Protocol):
    """What captures a program. ``rng_devices``: indices of the GPUs whose generators the program draws from."""

    rng_devices: Sequence[int]

    def side_stream(self) -> AbstractContextManager[None]:
        """Run the block's work where the capture will happen, after what is queued and before what comes next."""

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        """Capture one call of ``program``, running none of it; what comes back repeats it on the same addresses."""


class CudaRecorder:
    """Captures on one GPU. All its graphs share one memory pool, so that it grows to the largest of them only.

    They may, because a step keeps nothing in the pool from one replay to the next, and no two replays run at once.

    Generators: torch registers the default CUDA generator with every graph; each replay advances it, so that dropout
    and stochastic depth differ each time, and ``torch.cuda.get_rng_state`` is what a checkpoint must hold.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rng_devices = [torch.cuda.current_device() if device.index is None else device.index]
        self.stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: object = None

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        # The stream of the warm-up: autograd runs a parameter's accumulation where its first use was. What other
        # threads do on the device is no part of the step, and is allowed.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            program()
        self._graphs.add(graph)
        return graph.replay


class CapturedStep:
    """``step`` captured once; each call is one replay, queued on the current stream.

    Building one runs the step several times and puts everything back: tensors of ``step.state_tensors()`` in place,
    random number generators too. The graph holds addresses: nothing of the step's state may be replaced afterwards,
    only changed in place, as ``load_state_dict`` of :class:`rsengine.engine.step.TrainStep` does.

    Args:
        inputs: the static inputs, on the step's device, overwritten at each call with what it is given. Their values
            matter only in that the warm-up runs on them. None for a step that makes its own.
        recorder: what captures, :class:`CudaRecorder` on a GPU.

    Raises:
        RuntimeError: a state tensor moved during warm-up or capture. Others come from the capture itself, on a step
            that breaks its rules; :mod:`rsengine.checks.capture` says where, on any machine.
    """

    def __init__(
        self, step: Step, inputs: Sequence[Tensor], recorder: Recorder, warmup_steps: int = WARMUP_STEPS
    ) -> None:
        self.step, self.inputs = step, tuple(inputs)
        state = step.state_tensors()  # held until the comparison, so that no address is used again
        with keep_tables() as used:
            warm_up(step, self.inputs, recorder, warmup_steps)
        with capture_tables(used) as self._tables:  # of addresses, which the graph reads as long as it lives
            self._replay = recorder.record(lambda: step(*self.inputs))
        before, now = ([tensor.data_ptr() for tensor in tensors] for tensors in (state, step.state_tensors()))
        if before != now:
            moved = sum(a != b for a, b in zip(before, now, strict=False)) + abs(len(before) - len(now))
            raise RuntimeError(
                f"step: {moved} of {len(before)} state tensors moved during warm-up and capture, and a replay would "
                "go on writing to the old addresses; make them before the first step and change them in place"
            )

    def __call__(self, *inputs: Tensor) -> None:
        """Replay on ``inputs``.

        Raises:
            ValueError: number, shape, dtype, device or strides differ from the static inputs'.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"inputs: the graph was captured with {len(self.inputs)}; got {len(inputs)}")
        for i, (static, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            expected, got = _describe(static), _describe(given)
            if expected != got:
                raise ValueError(f"inputs[{i}]: the graph was captured with {expected}; got {got}")
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._replay()


def warm_up(step: Step, inputs: Sequence[Tensor], recorder: Recorder, count: int) -> None:
    """Run ``step`` ``count`` times where it will be captured, and put its state and the generators back, in place."""
    state = step.state_tensors()
    saved = [tensor.detach().clone() for tensor in state]
    with torch.random.fork_rng(devices=recorder.rng_devices):
        with recorder.side_stream():
            for _ in range(count):
                step(*inputs)
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)


def explain_step(execution: Execution, graph: bool = True, compile: bool = False) -> str:
    """How steps will run, and why: a phrase for the line that says how a run computes."""
    if uses_graph(execution, graph):
        how = "each step one CUDA-graph replay"
    elif execution.device.type == "cuda":
        how = "plain steps as asked, no CUDA graph"
    else:
        how = "plain steps (CUDA graphs need a GPU)"
    return how + (", forward and backward pass compiled" if compile else "")


def uses_graph(execution: Execution, graph: bool = True) -> bool:
    return graph and execution.device.type == "cuda"


def compile_forward(model: nn.Module) -> None:
    """Compile ``model``'s forward pass, and so its backward pass, in place, at its first call.

    Inductor's default mode: it makes no CUDA graphs of its own, which could not be captured into another.
    """
    model.compile(dynamic=False)


def choose_step(
    step: Step, inputs: Sequence[Tensor] = (), *, recorder: Recorder | None = None, compile: bool = False
) -> Callable[..., None]:
    """``step`` captured where there is a recorder, else ``step`` itself.

    Args:
        step: with ``compile``, one that has a ``model``.
        inputs: as :class:`CapturedStep` takes them; used with a recorder only.
    """
    if compile:
        compile_forward(step.model)
    return step if recorder is None else CapturedStep(step, inputs, recorder)


def static_batch(batch_size: int, image_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Static inputs of a step that takes a batch: (N, H, W, 3) uint8 zeros and (N,) int64 zeros."""
    images = torch.zeros((batch_size, *image_size, 3), dtype=torch.uint8, device=device)
    return images, torch.zeros(batch_size, dtype=torch.int64, device=device)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
