"""What is measured of a step, on a stand-in for a GPU."""

import math
from collections import Counter
from functools import partial

import pytest
import torch

import rsengine.kernels
from bench import baselines, gpu_baselines
from bench.baselines import Case, recipe_of, timm_network
from rsengine.checks.gpu import equality, kernels, overlap, profile, random_numbers, smoke, steps, throughput
from rsengine.checks.gpu.device import LABEL, Work, copy_rate, labelled_kernels, product_rate
from rsengine.checks.gpu.equality import difference, loss_difference
from rsengine.checks.launches import CASTS, EPILOGUE, GRADIENTS, PARTS, PRODUCTS, UPDATE, part_of
from rsengine.checks.trace import Operation
from rsengine.engine.build import build_model
from rsengine.kernels.jit.case import CompileCase
from rsengine.kernels.proof import compile_report
from rsengine.kernels.proof.compile_report import all_cases
from tests.checks.gpu.stand_in import ROUNDS, Spoiled, StandIn, setup

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


# --- equality and random numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_equal_plain_ones(precision):
    found = equality.measure(precision, setup())
    assert found["wrong"] == [] and found["learned"] and found["steps"] == 12
    assert found["first_difference"] is None and found["weight_difference"] == 0


def test_the_first_step_that_differs_is_named():
    calls = []

    def off_from_the_fifth(replay):
        calls.append(None)
        replay()
        if len(calls) == 5:
            with torch.no_grad():
                made[1].update.params[3].mul_(1.001)

    made = []  # the plain step, then the one that is captured
    make_step = equality.make_step

    def keeping(*arguments, **options):
        made.append(make_step(*arguments, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equality, "make_step", keeping)
        found = equality.measure("float32", setup(Spoiled(off_from_the_fifth), steps=8))
    first = found["first_difference"]
    names = [name for name, _ in made[1].model.named_parameters()]
    assert first["step"] == 4 and first["tensors"] == 1 and first["largest"] == f"model.{names[3]}"
    assert first["relative"] == pytest.approx(1e-3, rel=1e-2)


def test_a_capture_that_leaves_out_a_step_is_seen():
    calls = []

    def every_other(replay):
        calls.append(None)
        if len(calls) % 5:
            replay()

    with pytest.raises(RuntimeError, match=r"step 4 \(captured\) counted no image"):
        equality.measure("float32", setup(Spoiled(every_other), steps=8))


def test_masks_and_resident_batches():
    for row in ("masks", "resident batches"):
        found = random_numbers.measure(row, setup())
        assert found["wrong"] == [] and len(found) > 1


def test_masks_that_are_frozen_are_seen():
    def frozen(replay):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            replay()

    assert random_numbers.measure("masks", setup(Spoiled(frozen)))["wrong"] == ["not so: masks differ"]


def test_differences():
    ones, off, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.2]), torch.tensor([1.0, 1.0, 1.0, math.nan])
    assert difference([ones, ones], [ones, off]) == [0, pytest.approx(0.1)]
    assert difference([ones], [bad]) == [math.inf]
    assert loss_difference([2.0, 4.0], [2.0, 5.0]) == pytest.approx(0.25)
    assert loss_difference([2.0, 4.0], [math.nan, 4.0]) == math.inf


# --- throughput, baselines, overlap -----------------------------------------------------------------------------------


def test_throughput_has_every_way():
    found = throughput.measure("batch 128", setup())
    assert found["wrong"] == [] and found["batch_size"] == 16  # a stand-in's network and batch are small
    assert list(found["ways"]) == [way.name for way in throughput.WAYS]
    for way in found["ways"].values():
        assert way["images_per_second"] > 0 and way["host_ms"] > 0 and way["host_waits"] is None
        assert way["kernels"] == 3 and way["idle_share"] == pytest.approx(0.3)


def test_a_resident_way_runs_on_after_the_last_of_its_batches():
    """A timing takes many more steps than there are batches; past the end of a table a GPU ends its context."""
    recipe = setup().recipe()
    run = steps.Way("", graph=True, resident=True).prepare(recipe, StandIn())
    for _ in range(steps.KEPT_BATCHES * recipe.train.epochs + 1):
        run()


def test_the_compiled_ways(monkeypatch):
    compiled = []
    monkeypatch.setattr(steps, "compile_forward", compiled.append)  # minutes, and of no interest here
    found = throughput.measure("compiled, batch 512", setup())
    assert list(found["ways"]) == ["captured", "compiled", "captured, compiled"] and len(compiled) == 2


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    def broken(model):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(steps, "compile_forward", broken)
    found = throughput.measure("compiled, batch 512", setup())
    assert found["wrong"] == ["compiled: RuntimeError: no", "captured, compiled: RuntimeError: no"]
    assert found["ways"]["captured"]["images_per_second"] > 0


def test_a_step_that_waits_for_the_device_is_wrong():
    class Waits(StandIn):
        def no_waiting(self):
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    found = throughput.measure("batch 128", setup(Waits()))
    assert found["wrong"][0] == "plain: the host waits (called a synchronizing CUDA operation)"


def test_the_flag_of_cudnn_stands_while_a_benchmarked_way_is_prepared_and_called(monkeypatch):
    seen = []

    def looking(*arguments, **options):
        seen.append(torch.backends.cudnn.benchmark)
        return lambda *inputs: seen.append(torch.backends.cudnn.benchmark)

    monkeypatch.setattr(steps, "capture", looking)
    monkeypatch.setattr(steps, "make_step", lambda *arguments, **options: looking())
    recipe = setup().recipe()
    for benchmark in (False, True):
        seen.clear()
        steps.Way("", benchmark=benchmark).prepare(recipe, StandIn())()
        assert seen[1:] == [benchmark] * 4  # plain: at each call; the first entry is of make_step
        seen.clear()
        steps.Way("", graph=True, benchmark=benchmark).prepare(recipe, StandIn())
        assert seen[1] == benchmark  # captured: while it is captured
    assert not torch.backends.cudnn.benchmark


def test_a_baseline_is_the_same_network_and_is_timed_in_turn(monkeypatch):
    case = Case(50, stem_width=32, stem_stride=2, size=32, batch=128)
    with torch.device("meta"):
        theirs, ours = timm_network(case), build_model(recipe_of(case), 10)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())

    small = Case(26, stem_width=8, stem_stride=2, size=32, batch=4)
    monkeypatch.setattr(baselines, "Case", lambda *_, **__: small)
    found = gpu_baselines.measure("bfloat16, channels_last, batch 4", setup())
    assert found["batch_size"] == 4 and found["times_faster"] > 0 and found["wrong"] == []


def test_overlap_through_the_feeder():
    # Of each copy from 4 to 8, a kernel runs until 6.
    assert overlap.measure("", setup()) == {"steps": 24, "overlap": pytest.approx(0.5)}


# --- the profile of a step --------------------------------------------------------------------------------------------


class Profiled(StandIn):
    """Every operator of the step launched one kernel, some of which share a name; the replay has one more."""

    def __init__(self):
        self.count = 0

    def profile(self, run):
        run()
        names = ["Memcpy DtoD", *(f"k{i % 7}" for i in range(self.count or 40))]
        place = 0
        work = []
        for _ in range(ROUNDS + 1):
            for name in names:
                work.append(Work(name, place, place + 1))
                place += 2
        return work

    def launches(self, run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run()
        labels = {e.name for e in profiler.events() if e.name.startswith(LABEL)}
        return [(i, [f"k{i % 7}"]) for i in sorted(int(name.removeprefix(LABEL)) for name in labels)]


def test_the_profile_of_a_step(monkeypatch):
    # A CPU would take half a minute for what is right for a GPU: a product of 8192 x 8192, copies of a gigabyte.
    monkeypatch.setattr(profile, "product_rate", partial(product_rate, side=64))
    monkeypatch.setattr(profile, "copy_rate", partial(copy_rate, size=2**20))
    found = profile.measure("report-1, batch 128", setup(Profiled()))
    assert found["kernels"] == 41 and found["kernel_us"] == 41 and found["idle_share"] == pytest.approx(0.5, abs=0.01)
    assert [part for part in found["parts"] if part["part"] == profile.UNPLACED][0]["kernels"] == 1
    assert {part["part"] for part in found["parts"]} <= {*PARTS, profile.UNPLACED}
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert sum(kernel["count"] for kernel in found["largest"]) == 41  # eight names, all of them shown
    assert max(kernel["tflop_per_s"] for kernel in found["largest"]) > 0


def test_every_operator_of_a_real_step_has_a_part_and_a_cost():
    device, recipe = StandIn(), setup().recipe()
    step = steps.make_step(recipe, device, bf16=True)
    (inputs,) = steps.device_batches(recipe, device, 1)
    trace = profile.LabellingTrace("cpu")
    for _ in range(2):
        trace.begin()
        with trace:
            step(*inputs)
    operations = trace.steps[-1]
    parts = Counter(part_of(operation) for operation in operations if operation.launches)
    # On the CPU the block epilogue is not one operator with a name of its own, and no gradient needs another layout.
    assert set(parts) | {CASTS} == set(PARTS) - {EPILOGUE, GRADIENTS}
    products = [operation.flops for operation in operations if "convolution" in operation.name]
    assert products and all(products)
    assert parts[PRODUCTS] >= len(products)
    # Forward and backward pass: three times the network's multiply-adds, less the gradient of the images.
    forward = 2 * step.model.summary((32, 32)).multiply_adds * recipe.train.batch_size
    assert 2 * forward < sum(operation.flops for operation in operations) <= 3 * forward


def test_an_operation_has_the_part_of_its_innermost_known_label():
    def part(name, *labels):
        return part_of(Operation(name, (), None, None, labels, True))

    assert part("aten.add_.Tensor", "network", "block epilogue") == EPILOGUE
    assert part("aten._foreach_add_.List", "update", "Optimizer.step#SGD.step") == UPDATE
    assert part("aten.add_.Tensor", "backward") == GRADIENTS  # of no forward operation: autograd adds a gradient
    with pytest.raises(ValueError, match=r"aten.relu at None: expected a label of images, network, "):
        part("aten.relu", "mine")


def test_kernels_are_placed_by_the_order_of_their_names():
    names = ["copy", "a", "b", "b", "c"]
    rounds = [[Work(name, 10 * i, 10 * i + 2 + r) for i, name in enumerate(names)] for r in (0, 2, 2)]
    launches = [(0, ["a"]), (2, ["b", "b"]), (3, ["d"]), (4, ["c"])]
    costs = [(8, 0), (0, 0), (100, 60), (0, 0), (4, 4)]
    operations = [Operation("aten.add.Tensor", (), None, None, (), True, *cost) for cost in costs]
    placed = profile.place(rounds, launches, operations, ["A", "-", "B", "D", "C"])
    assert [(k.name, k.part, k.microseconds, k.bytes, k.flops) for k in placed] == [
        ("copy", profile.UNPLACED, 4, 0, 0),
        ("a", "A", 4, 8, 0),
        ("b", "B", 4, 50, 30),
        ("b", "B", 4, 50, 30),
        ("c", "C", 4, 4, 4),
    ]


def test_what_a_label_launched_is_read_from_the_profilers_events():
    from types import SimpleNamespace as Namespace

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, start, parent=None, kernels=(), device=cpu):
        launched = [Namespace(name=kernel) for kernel in kernels]
        at = Namespace(start=start, end=start + 1)
        return Namespace(name=name, time_range=at, cpu_parent=parent, kernels=launched, device_type=device)

    outer, second = event(f"{LABEL}3", 0), event(f"{LABEL}12", 5, kernels=["triton"])
    events = [
        event("aten::mm", 2, outer, ["gemm"]),
        second,
        outer,
        event("aten::copy_", 1, event("aten::to", 1, outer), ["cast"]),
        event("aten::other", 7, kernels=["unlabelled"]),
        event("rsengine::sgd_ema_step", 4, outer, ["update"]),  # as our own operators are called
        event("gemm", 2, device=cuda),
    ]
    assert labelled_kernels(events) == [(3, ["cast", "gemm", "update"]), (12, ["triton"])]


# --- kernels and the first look ---------------------------------------------------------------------------------------


def test_kernel_times_are_medians_of_rounds_in_turn_with_flushes_between(monkeypatch):
    monkeypatch.setattr(kernels, "FLUSH_BYTES", 64)
    flush = f"void at::native::vectorized_elementwise_kernel<4, at::native::{kernels.FLUSH_KERNEL}>"

    class Timed(StandIn):
        def profile(self, run):
            run()
            work, at = [Work("lost", 0, 1)], 1
            for i in range(kernels.ROUNDS + 1):
                for name, length in ((flush, 50), ("ours", 3 + i % 3), ("alien", 9), (flush, 50), ("a", 5), ("b", 6)):
                    work.append(Work(name, at, at + length))
                    at += length
            return work[1:] if self.whole else work[3:]  # the profiler may lose the beginning

    device, calls = Timed(), []
    runs = {"ours": lambda: calls.append("ours"), "eager": lambda: calls.append("eager")}
    for device.whole in (True, False):
        calls.clear()
        found = kernels.microseconds(setup(device), runs, {"ours": {"ours"}})
        assert found == {"ours": 4, "eager": 11}
        assert calls == ["ours", "eager"] * (kernels.ROUNDS + 2)

    class Uneven(Timed):
        whole = True

        def profile(self, run):
            return super().profile(run)[:-1]

    with pytest.raises(RuntimeError, match=r"eager: expected the same kernels in each call; the profiler saw \[1, 2\]"):
        kernels.microseconds(setup(Uneven()), runs, {"ours": {"ours"}})


def test_a_case_makes_its_operands_on_the_device_at_each_call(monkeypatch):
    devices = []

    def launch(size):
        devices.append(torch.empty(size).device.type)
        return {}

    case = CompileCase("a case", launch, 1, 1, {}, lambda ops, size: lambda: launch(size))
    monkeypatch.setattr(compile_report, "all_cases", lambda: {"op": [case]})
    monkeypatch.setattr(kernels, "copy_rate", lambda device: 1.0)

    class Elsewhere(StandIn):
        device = torch.device("meta")

        def profile(self, run):
            run()
            ran = [(kernels.FLUSH_KERNEL, "kernel")] * 2 * (kernels.ROUNDS + 1)
            return [Work(name, i, i + 1) for i, name in enumerate(name for names in ran for name in names)]

    assert kernels.measure("op", setup(Elsewhere()))["wrong"] == []
    assert set(devices) == {"meta"} and len(devices) == 1 + 2 * (kernels.ROUNDS + 2)


@pytest.mark.parametrize("case", [c for cases in all_cases().values() for c in cases], ids=lambda case: case.name)
def test_the_eager_side_of_a_compile_case_runs(case):
    case.eager(rsengine.kernels, case.small)()


def test_what_the_first_look_compares():
    ones = torch.ones(4)
    assert smoke.compare([ones], [ones], torch.float32)["wrong"] == []
    assert smoke.compare([ones * 1.1], [ones], torch.bfloat16)["wrong"] == ["Triton and eager differ by 0.1, relative"]
    assert smoke.compare([ones * math.nan], [ones], torch.float32)["difference"] == math.inf


def test_the_first_look_at_a_captured_step_and_the_profiler():
    assert smoke.measure("captured step", setup())["wrong"] == []
    assert smoke.measure("profiler", setup())["kernels"] == 9

    calls = []

    def every_other(replay):
        calls.append(None)
        if len(calls) % 2:
            replay()

    with pytest.raises(RuntimeError, match="captured. counted no image"):
        smoke.measure("captured step", setup(Spoiled(every_other)))


@pytest.mark.parametrize("row", ["cross-entropy", "batch norm", "block epilogue", "update", "augmentation"])
def test_the_first_look_at_an_op_compares_triton_with_eager(row, monkeypatch):
    """With eager in Triton's place all is well, and with a fault put in it is not."""
    fault = []

    def twice(op):
        def run(*arguments, impl, **options):
            out = op(*arguments, impl="eager", **options)
            if impl != "triton" or not fault:
                return out
            if out is None:  # the update writes to the parameters
                arguments[0][0].add_(1)
                return None
            return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1

        return run

    ops = (
        "label_smoothed_cross_entropy",
        "batch_norm",
        "batch_norm_squeeze_excite_residual",
        "sgd_ema_step",
        "augment_batch",
    )
    for op in ops:
        monkeypatch.setattr(smoke, op, twice(getattr(smoke, op)))
    assert smoke.measure(row, setup())["wrong"] == []
    fault.append(True)
    assert smoke.measure(row, setup())["wrong"]


def test_operators_that_launch_other_kernels_than_expected_are_listed():
    names = ["aten.add.Tensor", "aten.convolution_backward", "aten.convolution_backward", "aten.view"]
    operations = [Operation(name, (), None, None, (), name != "aten.view") for name in names]
    launches = [(0, ["a"]), (1, ["b", "c", "d"]), (2, ["b", "c", "d"]), (3, [])]
    assert profile.differences(operations, launches) == [
        {"operator": "aten.convolution_backward", "expected": 2, "kernels": 3, "count": 2}
    ]
