"""The device that a check runs on, and the arithmetic on what its profiler recorded."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from rsengine.config import Recipe, load_recipe
from rsengine.engine.graph import CudaRecorder, Recorder
from rsengine.input.transfer import Feeder, feeder_for
from rsengine.run.machine import versions

SIZE = (32, 32)  # pixels, height and width
COPY_BYTES, PRODUCT_SIDE = 2**30, 8192
LABEL = "operator #"  # prefix of the labels that :meth:`Device.launches` looks for; no operator has it


class Work(NamedTuple):
    """A kernel or copy that the device ran: its name, start and end in microseconds."""

    name: str
    start: float
    end: float

    @property
    def is_upload(self) -> bool:
        """Whether it is a copy from the host, which runs beside kernels."""
        return "HtoD" in self.name

    @property
    def microseconds(self) -> float:
        return self.end - self.start


class Device(Protocol):
    """What the measurements need of a device.

    Attributes:
        is_gpu: whether steps can be captured here and work be profiled.
    """

    device: torch.device
    is_gpu: bool

    def recorder(self) -> Recorder: ...
    def synchronize(self) -> None: ...
    def no_waiting(self) -> AbstractContextManager[None]:
        """In the block, an operation that makes the host wait for the device raises."""

    def profile(self, run: Callable[[], object]) -> list[Work]:
        """What the device did in ``run``, in order of its start."""

    def launches(self, run: Callable[[], object]) -> list[tuple[int, list[str]]]:
        """For each ``record_function(f"{LABEL}{i}")`` in ``run``: ``i``, and the kernels that were launched in it."""

    def feeder(self, batch_size: int) -> Feeder | None: ...
    def describe(self) -> dict[str, Any]: ...


class Gpu:
    """:class:`Device` of the first CUDA GPU."""

    is_gpu = True

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def recorder(self) -> CudaRecorder:
        return CudaRecorder(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def no_waiting(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def profile(self, run: Callable[[], object]) -> list[Work]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return device_work(profiler.events())

    def launches(self, run: Callable[[], object]) -> list[tuple[int, list[str]]]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            torch.cuda.synchronize()
        return labelled_kernels(profiler.events())

    def feeder(self, batch_size: int) -> Feeder | None:
        return feeder_for(self.device, batch_size, SIZE)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "clocks": clocks(),
            "copy_gb_per_s": copy_rate(self) / 1e9,
            "product_tflop_per_s": product_rate(self) / 1e12,
            "host": host(),
        }


class Cpu:
    """:class:`Device` of a dry run: nothing is captured, and no profiler sees kernels."""

    is_gpu = False
    name = "CPU, a dry run"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def recorder(self) -> Recorder:
        raise RuntimeError("a CPU captures no CUDA graph")

    def synchronize(self) -> None:
        return None

    def no_waiting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def profile(self, run: Callable[[], object]) -> list[Work]:
        raise RuntimeError("a dry run on the CPU profiles nothing")

    launches = profile

    def feeder(self, batch_size: int) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "copy_gb_per_s": copy_rate(self, 2**26) / 1e9,
            "product_tflop_per_s": product_rate(self, 1024) / 1e12,
            "host": host(),
        }


@dataclass(frozen=True)
class Setup:
    """Where and at which scale a check runs.

    Attributes:
        settings: change every recipe, as ``--set`` does; they make a dry run's network small.
        steps: of the equality check.
        rounds, round_steps: of a timing; its figures are medians over the rounds.
        profiled_steps: of a profile, after one more that is left out.
        seconds: limit of a measurement that runs other commands: it ends them then, and reports what they have found.
        log: called with lines about the progress.
    """

    device: Device
    settings: tuple[str, ...] = ()
    steps: int = 200
    rounds: int = 5
    round_steps: int = 20
    profiled_steps: int = 10
    seconds: float = 3600.0
    log: Callable[[str], None] = print

    def recipe(self, *settings: str) -> Recipe:
        """The network of the report's first recipe, without randomness unless ``settings`` bring it."""
        return load_recipe("report-1").with_settings(["model.dropout=0", "train.epochs=2", *settings, *self.settings])


DRY_RUN = ("model.blocks=[1]", "model.width_multiplier=0.25", "model.stem_width=8", "train.batch_size=16")


def setup_for(device: str) -> Setup:
    """The setup of a worker on ``"cuda"``, or of a dry run on ``"cpu"``."""
    if device == "cpu":
        return Setup(Cpu(), DRY_RUN, steps=8, rounds=2, round_steps=2, profiled_steps=2)
    return Setup(Gpu())


# --- rates and facts --------------------------------------------------------------------------------------------------


def time_in_turn(
    device: Device, runs: dict[str, Callable[[], object]], rounds: int, round_steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Time callables in turn, A B A B, so that what slows the machine slows them alike.

    Returns:
        For each callable and round, the seconds of a call until the device was done and until the host was.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            device.synchronize()
            start = time.perf_counter()
            for _ in range(round_steps):
                run()
            host_seconds = time.perf_counter() - start
            device.synchronize()
            times[name].append(((time.perf_counter() - start) / round_steps, host_seconds / round_steps))
    return times


def copy_rate(device: Device, size: int = COPY_BYTES) -> float:
    """Bytes a second, read and written together, of a copy of ``size`` bytes: the median of five rounds."""
    source = torch.zeros(size, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(device, lambda: target.copy_(source))


def product_rate(device: Device, side: int = PRODUCT_SIDE) -> float:
    """Floating-point operations a second of a square bfloat16 matrix product of random numbers."""
    a, b = (torch.randn(side, side, device=device.device).to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _median_seconds(device, lambda: a @ b)


def _median_seconds(device: Device, run: Callable[[], object]) -> float:
    run()
    return statistics.median(seconds for seconds, _ in time_in_turn(device, {"": run}, 5, 4)[""])


def host() -> dict[str, Any]:
    return {"python": platform.python_version(), **versions()}


def clocks() -> str:
    """Clocks, temperature and driver as ``nvidia-smi`` reports them, or why it does not."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        lines = subprocess.run(command, text=True, capture_output=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer: {error}"
    return f"{query}: {lines[0] if lines else 'nothing'}"


# --- what the profiler saw --------------------------------------------------------------------------------------------


def device_work(events: Sequence[Any]) -> list[Work]:
    """Kernels and copies among the profiler's events, without the device's copies of host labels."""
    found = [
        Work(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda work: work.start)


def labelled_kernels(events: Sequence[Any]) -> list[tuple[int, list[str]]]:
    """For each label ``operator #i`` among the host's events: ``i``, and the kernels launched in it, in order."""
    kernels: dict[int, list[str]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CPU or not event.kernels:
            continue
        label: Any = event
        while label is not None and not label.name.startswith(LABEL):
            label = label.cpu_parent
        if label is not None:
            names = kernels.setdefault(int(label.name.removeprefix(LABEL)), [])
            names += [kernel.name for kernel in event.kernels]
    return sorted(kernels.items())


def union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals: in order and without overlaps."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def idle_share(work: Sequence[Work]) -> float:
    """The share of the time between the first and the last kernel in which no kernel ran."""
    busy = union([(w.start, w.end) for w in work if not w.is_upload])
    if not busy:
        raise RuntimeError("the profiler saw no kernel")
    return 1 - sum(end - start for start, end in busy) / (busy[-1][1] - busy[0][0])


def overlap(work: Sequence[Work]) -> float:
    """The share of the time of copies from the host in which a kernel ran too."""
    copies = [(w.start, w.end) for w in work if w.is_upload]
    busy = union([(w.start, w.end) for w in work if not w.is_upload])
    total = sum(end - start for start, end in copies)
    if not total:
        raise RuntimeError("the profiler saw no copy from the host")
    return sum(max(0.0, min(e, end) - max(s, start)) for start, end in copies for s, e in busy) / total


def split_rounds(work: Sequence[Work], rounds: int) -> list[list[Work]]:
    """Split the work into ``rounds`` equal rounds, leaving out one more round before them.

    The profiler may lose all or part of the first round, so the last ``rounds`` count. Their common length lies between
    the one that follows if nothing was lost and the one that follows if a whole round was; all launch the same kernels
    in the same order.

    Raises:
        RuntimeError: there is no such length.
    """
    for each in range(max(1, -(-len(work) // (rounds + 1))), len(work) // rounds + 1):
        kept = list(work[len(work) - each * rounds :])
        split = [kept[i : i + each] for i in range(0, len(kept), each)]
        if all([w.name for w in part] == [w.name for w in split[0]] for part in split):
            return split
    raise RuntimeError(f"expected {rounds + 1} equal rounds; the profiler saw {len(work)} kernels and copies")
