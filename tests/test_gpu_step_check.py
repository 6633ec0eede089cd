"""The check of the captured step, on the CPU with a recorder that replays; and its arithmetic on made-up numbers."""

import contextlib
import math
import sys

import pytest
import torch

from rsengine import gpu_step_check
from rsengine.gpu_step_check import Interval, check_step, difference, idle_share, loss_difference, overlap, union
from rsengine.kernels import augment_eager
from tests.graph_simulator import ReplayRecorder

COPY, KERNEL = True, False


@pytest.fixture(scope="module", autouse=True)
def nothing_is_read_on_the_host():
    """As on a GPU: what is recorded here may not look at values, and is PyTorch's operators alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["rsengine.kernels.batch_norm"], "choose_native", lambda *_: "eager")
        patch.setattr(augment_eager, "may_read", lambda images: False)
        yield


class Cpu:
    """Stands in for a GPU: the replay simulator captures, and the profiler saw two kernels and a copy between them."""

    device = torch.device("cpu")
    recorder = ReplayRecorder

    def synchronize(self):
        pass

    def no_waiting(self):
        return contextlib.nullcontext()

    def profile(self, run):
        run()
        return [Interval(0, 6, KERNEL), Interval(4, 8, COPY), Interval(9, 10, KERNEL)]

    def feeder(self, batch_size):
        return None


def tiny():
    settings = ["model.blocks=[1]", "model.width_multiplier=0.25", "model.stem_width=8", "train.batch_size=16"]
    return gpu_step_check.recipe_of(*settings)


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_step_check, "ROUNDS", 2)
        patch.setattr(gpu_step_check, "ROUND_STEPS", 2)
        patch.setattr(gpu_step_check, "compile_forward", lambda model: None)  # minutes, and of no interest here
        yield check_step(Cpu(), 600, tiny(), steps=12)


def test_every_part_runs_and_all_is_well(found):
    assert gpu_step_check.step_failures(found) == []
    assert found["equality"]["equal"] and found["equality"]["learned"]
    assert found["equality"]["loss_difference"] < 1e-5 and found["equality"]["steps"] == 12
    assert all(found["random_numbers"].values())
    assert found["overlap"] == {"steps": 24, "overlap": 0.5}


def test_throughput_has_every_way(found):
    rows = {row["way"]: row for row in found["throughput"]}
    assert list(rows) == ["plain", "captured", "captured + resident", "compiled", "captured + compiled"]
    for row in rows.values():
        assert row["images_per_second"] > 0 and row["host_ms"] > 0 and row["idle_share"] == pytest.approx(0.3)


def test_without_time_the_ways_are_left_out_and_said_to_be():
    rows = gpu_step_check.measure_throughput(Cpu(), tiny(), deadline=0.0)
    assert len(rows) == 5 and all("left out" in row["error"] for row in rows)


class Spoiled(Cpu):
    """Captures that go wrong."""

    def __init__(self, spoil):
        self.spoil = spoil

    def recorder(self):
        recorder, spoil = ReplayRecorder(), self.spoil

        class Recorder(ReplayRecorder):
            def record(self, program):
                replay = recorder.record(program)
                return lambda: spoil(replay)

        return Recorder()


def test_a_capture_that_leaves_out_a_step_is_seen():
    calls = []

    def every_other(replay):
        calls.append(None)
        if len(calls) % 5:
            replay()

    # A step left out leaves no image to divide the loss by: the part breaks off, and says so.
    found = check_step(Spoiled(every_other), 600, tiny(), steps=8)
    assert gpu_step_check.step_failures(found)


def test_masks_that_are_frozen_are_seen():
    def frozen(replay):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            replay()

    assert not gpu_step_check.check_random_numbers(Spoiled(frozen), tiny())["masks_differ"]


def test_a_part_that_breaks_off_is_reported_and_the_others_run(monkeypatch):
    def broken(*_):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(gpu_step_check, "check_equality", broken)
    monkeypatch.setattr(gpu_step_check, "measure_throughput", broken)
    found = check_step(Cpu(), 600, tiny(), steps=2)
    assert found["equality"] == found["throughput"] == {"error": "RuntimeError: no"}
    assert all(found["random_numbers"].values())
    failures = gpu_step_check.step_failures(found)
    assert failures == ["equality: RuntimeError: no", "throughput: RuntimeError: no"]
    assert all(f"- **wrong**: {line}" in gpu_step_check.render_step(found) for line in failures)


def test_union_of_intervals():
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == [(0, 4), (5, 7)]
    assert union([]) == []


def test_idle_share():
    assert idle_share([Interval(0, 2, KERNEL), Interval(1, 3, KERNEL), Interval(8, 10, KERNEL)]) == 0.5
    assert idle_share([Interval(0, 2, KERNEL), Interval(0, 9, COPY)]) == 0  # a copy is not a kernel
    with pytest.raises(RuntimeError, match="no kernel"):
        idle_share([Interval(0, 9, COPY)])


def test_overlap():
    kernels = [Interval(0, 4, KERNEL), Interval(2, 5, KERNEL), Interval(9, 11, KERNEL)]
    assert overlap([*kernels, Interval(3, 7, COPY), Interval(8, 10, COPY)]) == pytest.approx(3 / 6)
    assert overlap([*kernels, Interval(6, 8, COPY)]) == 0
    with pytest.raises(RuntimeError, match="no copy"):
        overlap(kernels)


def test_differences():
    ones, nearly, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.2]), torch.tensor([1.0, 1.0, 1.0, math.nan])
    assert difference([ones, ones], [ones, nearly]) == pytest.approx(0.1)
    assert difference([ones], [bad]) == math.inf and difference([ones], [ones]) == 0
    assert loss_difference([2.0, 4.0], [2.0, 5.0]) == pytest.approx(0.25)
    assert loss_difference([2.0, 4.0], [math.nan, 4.0]) == math.inf
