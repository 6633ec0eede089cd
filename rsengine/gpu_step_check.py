"""The training step on a GPU, as a part of :mod:`rsengine.gpu_check`: captured against plain, and where its time goes.

What only a GPU can do is in :class:`Gpu`; everything else runs wherever something stands in for it, as in the tests.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsengine.config import Recipe, load_recipe
from rsengine.device import Execution
from rsengine.feed import Batch, Feeder, feeder_for
from rsengine.graph import CapturedStep, CudaRecorder, Recorder, compile_forward, static_batch
from rsengine.preprocess import Preprocess
from rsengine.resident import ResidentData
from rsengine.step import TrainStep
from rsengine.weights import build_model

MEAN, STD, SIZE, CLASSES = (0.5,) * 3, (0.25,) * 3, (32, 32), 10
STEPS = 200
# Plain and captured steps run the same kernels in the same order, so that in float32, without TF32 and with cuDNN's
# deterministic algorithms, they should be equal to the bit. cuBLAS may split a sum otherwise where a capture gives it
# another workspace, and 200 steps let a difference in the last bit grow: hence not zero.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-2  # relative; of a step's loss, and of a tensor's length
BF16_TOLERANCE = 0.05  # relative, of the mean loss of the last quarter: the same curve, not the same bits
ROUNDS, ROUND_STEPS, PROFILED_STEPS = 5, 20, 10


class Interval(NamedTuple):
    """Work on the device, from the profiler: microseconds, and whether it is a copy from the host or a kernel."""

    start: float
    end: float
    copy: bool


class Machine(Protocol):
    """What the check needs of a device."""

    device: torch.device

    def recorder(self) -> Recorder: ...
    def synchronize(self) -> None: ...
    def no_waiting(self) -> AbstractContextManager[None]:
        """In the block, an operation that makes the host wait for the device raises."""

    def profile(self, run: Callable[[], None]) -> list[Interval]: ...
    def feeder(self, batch_size: int) -> Feeder | None: ...


class Gpu:
    """:class:`Machine` of the first CUDA GPU."""

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

    def profile(self, run: Callable[[], None]) -> list[Interval]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return [
            Interval(event.time_range.start, event.time_range.end, "HtoD" in event.name)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]

    def feeder(self, batch_size: int) -> Feeder | None:
        return feeder_for(self.device, batch_size, SIZE)


# --- what is made of the measurements ---------------------------------------------------------------------------------


def union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time without overlaps, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def idle_share(work: Sequence[Interval]) -> float:
    """The share of the time between the first and the last kernel in which no kernel ran."""
    busy = union([(w.start, w.end) for w in work if not w.copy])
    if not busy:
        raise RuntimeError("the profiler saw no kernel")
    return 1 - sum(end - start for start, end in busy) / (busy[-1][1] - busy[0][0])


def overlap(work: Sequence[Interval]) -> float:
    """The share of the time of copies from the host in which a kernel ran too."""
    busy, copies = ([(w.start, w.end) for w in work if w.copy == kind] for kind in (False, True))
    total = sum(end - start for start, end in copies)
    if not total:
        raise RuntimeError("the profiler saw no copy from the host")
    covered = sum(max(0.0, min(e, end) - max(s, start)) for start, end in copies for s, e in union(busy))
    return covered / total


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest distance of two tensors over the length of the first; infinite where a number is not finite."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        distance = ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30)).item()
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two equally long curves."""
    pairs = [abs(a - b) / max(abs(a), 1e-30) for a, b in zip(one, other, strict=True)]
    return max(pair if pair == pair else float("inf") for pair in pairs)


# --- the parts --------------------------------------------------------------------------------------------------------


def recipe_of(*settings: str) -> Recipe:
    """The network of the report's first recipe, without randomness unless ``settings`` bring it."""
    return load_recipe("report-1").with_settings(["model.dropout=0", "train.epochs=2", *settings])


def make_step(recipe: Recipe, machine: Machine, *, bf16: bool, graph: bool, resident: bool = False) -> TrainStep:
    torch.manual_seed(recipe.train.seed)
    preprocess = Preprocess(MEAN, STD, machine.device)
    execution = Execution(machine.device, torch.bfloat16 if bf16 else None, 1, "gpu check")
    data = resident_data(recipe, machine, preprocess if resident else None) if resident else None
    model = build_model(recipe, CLASSES)
    return TrainStep(model, recipe, preprocess, execution, STEPS, resident=data, keep_gradients=graph)


def resident_data(recipe: Recipe, machine: Machine, preprocess: Preprocess | None) -> ResidentData:
    size = recipe.train.batch_size
    images, labels = (torch.cat(parts) for parts in zip(*host_batches(recipe, 8), strict=True))
    return ResidentData(
        images.to(machine.device), labels.to(machine.device), size, recipe.augment, MEAN,
        seed=recipe.train.seed, epochs=STEPS, steps_per_epoch=8, preprocess=preprocess,
    )  # fmt: skip


def host_batches(recipe: Recipe, count: int) -> list[Batch]:
    """Batches that can be learned: the class is a brightness, under noise."""
    generator, size = torch.Generator().manual_seed(1), recipe.train.batch_size
    batches = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        noise = torch.randint(0, 100, (size, *SIZE, 3), generator=generator)
        batches.append(((noise + 15 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels))
    return batches


def captured(step: TrainStep, machine: Machine, recipe: Recipe) -> CapturedStep:
    inputs = () if step.resident is not None else static_batch(recipe.train.batch_size, SIZE, machine.device)
    return CapturedStep(step, inputs, machine.recorder())


def check_equality(machine: Machine, recipe: Recipe, steps: int = STEPS) -> dict:
    """Plain against captured from the same weights on the same batches, in float32 and in bfloat16."""
    batches = [[t.to(machine.device) for t in batch] for batch in host_batches(recipe, 8)]
    found: dict = {"steps": steps}
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with flags:
        for bf16 in (False, True):
            curves, weights = [], []
            for graph in (False, True):
                step = make_step(recipe, machine, bf16=bf16, graph=graph)
                run = captured(step, machine, recipe) if graph else step
                losses = []
                for i in range(steps):
                    run(*batches[i % len(batches)])
                    totals = step.read_totals()
                    losses.append(totals.loss / totals.images)
                curves.append(losses)
                own = [step.model] + ([step.ema_model] if step.ema_model is not None else [])
                weights.append([t for m in own for t in m.state_dict().values() if t.is_floating_point()])
            if bf16:
                last = [statistics.mean(curve[-max(steps // 4, 1) :]) for curve in curves]
                found["bf16_loss_difference"] = loss_difference(last[:1], last[1:])
            else:
                found["loss_difference"] = loss_difference(*curves)
                found["weight_difference"] = difference(*weights)
            found["learned"] = curves[0][-1] < curves[0][0]
    found["equal"] = (
        found["loss_difference"] <= LOSS_TOLERANCE
        and found["weight_difference"] <= WEIGHT_TOLERANCE
        and found["bf16_loss_difference"] <= BF16_TOLERANCE
    )
    return found


class _Keep:
    """A step that only makes a resident batch and keeps it."""

    def __init__(self, data: ResidentData, device: torch.device) -> None:
        self.data, self.counter = data, torch.zeros((), dtype=torch.int64, device=device)
        self.images = torch.zeros_like(data(self.counter)[0])

    def __call__(self) -> None:
        self.images.copy_(self.data(self.counter)[0])
        self.counter.add_(1)

    def state_tensors(self) -> list[Tensor]:
        return [self.images, self.counter]


def check_random_numbers(machine: Machine, recipe: Recipe) -> dict:
    """Dropout and stochastic depth differ between replays from one state; resident batches are the plain ones."""
    random = recipe.with_settings(["model.dropout=0.25", "model.drop_path=0.2"])
    step = make_step(random, machine, bf16=False, graph=True)
    run, batch = captured(step, machine, random), [t.to(machine.device) for t in host_batches(random, 1)[0]]
    state, results = [t.clone() for t in step.state_tensors()], []
    for _ in range(2):
        with torch.no_grad():
            for tensor, value in zip(step.state_tensors(), state, strict=True):
                tensor.copy_(value)
        run(*batch)
        results.append([p.detach().clone() for p in step.params])
    augmented = recipe.with_settings(["augment.policy=autoaugment", "augment.cutout_holes=4"])
    keep = _Keep(resident_data(augmented, machine, None), machine.device)
    replay, seen = CapturedStep(keep, (), machine.recorder()), []
    for _ in range(4):
        replay()
        seen.append(keep.images.clone())
    expected = [keep.data(torch.tensor(i, device=machine.device))[0] for i in range(4)]
    return {
        "masks_differ": difference(*results) > 0,
        "batches_differ": all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)),
        "batches_are_the_plain_ones": all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)),
    }


def measure_throughput(machine: Machine, recipe: Recipe, deadline: float) -> list[dict]:
    """Images a second, host time and idle share of each way to run a step, in turn. ``deadline``: of the clock
    ``time.monotonic``; what cannot begin before it is left out, and said to be."""
    batch = [t.to(machine.device) for t in host_batches(recipe, 1)[0]]
    ways: dict[str, tuple[Callable[..., None], tuple]] = {}
    rows: dict[str, dict] = {}
    for name, graph, compile, resident in (
        ("plain", False, False, False),
        ("captured", True, False, False),
        ("captured + resident", True, False, True),
        ("compiled", False, True, False),
        ("captured + compiled", True, True, False),
    ):
        rows[name] = {"way": name}
        if time.monotonic() > deadline:
            rows[name]["error"] = "left out: the time for this part was over"
            continue
        step = make_step(recipe, machine, bf16=True, graph=graph, resident=resident)
        if compile:
            compile_forward(step.model)
        run, inputs = captured(step, machine, recipe) if graph else step, () if resident else tuple(batch)
        for _ in range(3):
            run(*inputs)
        ways[name] = run, inputs
    times: dict[str, list[float]] = {name: [] for name in ways}
    hosts: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (run, inputs) in ways.items():
            machine.synchronize()
            start = time.perf_counter()
            with machine.no_waiting():
                for _ in range(ROUND_STEPS):
                    run(*inputs)
            hosts[name].append((time.perf_counter() - start) / ROUND_STEPS)
            machine.synchronize()
            times[name].append((time.perf_counter() - start) / ROUND_STEPS)
    for name, (run, inputs) in ways.items():
        work = machine.profile(lambda: [run(*inputs) for _ in range(PROFILED_STEPS)])  # noqa: B023
        rows[name] |= {
            "images_per_second": recipe.train.batch_size / statistics.median(times[name]),
            "host_ms": statistics.median(hosts[name]) * 1e3,
            "idle_share": idle_share(work),
        }
    return list(rows.values())


def measure_overlap(machine: Machine, recipe: Recipe) -> dict:
    """The share of the batches' transfer that hides under kernels, through the feeder, into captured steps."""
    step = make_step(recipe, machine, bf16=True, graph=True)
    run, batches = captured(step, machine, recipe), host_batches(recipe, 8)
    feeder = machine.feeder(recipe.train.batch_size)

    def steps() -> None:
        for batch in feeder.feed(batches * 3) if feeder is not None else batches * 3:
            run(*batch)

    steps()
    return {"steps": len(batches) * 3, "overlap": overlap(machine.profile(steps))}


# --- all of it --------------------------------------------------------------------------------------------------------


def check_step(machine: Machine, seconds: float, recipe: Recipe | None = None, steps: int = STEPS) -> dict:
    """Every part, none hidden by another's failure. ``seconds``: after half of them no further way is measured."""
    recipe, start = recipe or recipe_of(), time.monotonic()
    parts: dict[str, Callable[[], object]] = {
        "equality": lambda: check_equality(machine, recipe, steps),
        "random_numbers": lambda: check_random_numbers(machine, recipe),
        "overlap": lambda: measure_overlap(machine, recipe),
        "throughput": lambda: measure_throughput(machine, recipe, start + seconds / 2),
    }
    found: dict = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # one part that breaks off must not hide the others: it is reported
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    found["seconds"] = round(time.monotonic() - start)
    return found


def step_failures(found: dict) -> list[str]:
    """What is wrong, a line each."""
    wrong = [f"{name}: {part['error']}" for name, part in found.items() if isinstance(part, dict) and "error" in part]
    equality, numbers = found["equality"], found["random_numbers"]
    if "error" not in equality:
        wrong += ["equality: captured and plain steps differ"] * (not equality["equal"])
        wrong += ["equality: the loss did not fall"] * (not equality["learned"])
    if "error" not in numbers:
        wrong += [f"random numbers: not so: {name.replace('_', ' ')}" for name, so in numbers.items() if not so]
    if isinstance(found["throughput"], list):
        wrong += [f"throughput, {row['way']}: {row['error']}" for row in found["throughput"] if "error" in row]
    return wrong


def render_step(found: dict) -> list[str]:
    """The part of the report in Markdown."""
    lines = ["## The training step", "", f"ResNet-RS-50, stem 32, as in `report-1`; {found['seconds']} s.", ""]
    lines += [f"- **wrong**: {line}" for line in step_failures(found)]
    equality = found["equality"]
    if "error" not in equality:
        lines += [
            f"- {equality['steps']} steps, captured against plain, float32: largest difference of a loss "
            f"{equality['loss_difference']:.2g} (tolerance {LOSS_TOLERANCE:g}), of a weight, average or buffer "
            f"{equality['weight_difference']:.2g} (tolerance {WEIGHT_TOLERANCE:g}), relative; in bfloat16, of the mean "
            f"loss of the last quarter, {equality['bf16_loss_difference']:.2g} (tolerance {BF16_TOLERANCE:g})"
        ]
    if "error" not in found["random_numbers"]:
        said = ", ".join(f"{name.replace('_', ' ')}: {so}" for name, so in found["random_numbers"].items())
        lines += [f"- replays: {said}"]
    if "error" not in found["overlap"]:
        lines += [f"- {found['overlap']['overlap']:.0%} of the copies' time lies under kernels"]
    if isinstance(found["throughput"], list):
        lines += ["", f"bfloat16; median of {ROUNDS} rounds of {ROUND_STEPS} steps, in turn.", ""]
        lines += ["| step | images/s | host time a step, ms | GPU idle |", "|---|---:|---:|---:|"]
        for row in found["throughput"]:
            numbers = "| | " if "error" in row else f"{row['images_per_second']:,.0f} | {row['host_ms']:.2f} | "
            lines.append(f"| {row['way']} | {numbers}{row.get('error') or format(row['idle_share'], '.1%')} |")
    return [*lines, ""]
