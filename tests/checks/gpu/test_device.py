"""Arithmetic on what a profiler saw, and what is asked of a device."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from rsengine.checks.gpu import device
from rsengine.checks.gpu.device import Work, device_work, idle_share, overlap, split_rounds, time_in_turn, union


def kernel(start, end):
    return Work("kernel", start, end)


def upload(start, end):
    return Work("Memcpy HtoD (Pinned -> Device)", start, end)


def test_union_of_intervals():
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == [(0, 4), (5, 7)]
    assert union([]) == []


def test_idle_share():
    assert idle_share([kernel(0, 2), kernel(1, 3), kernel(8, 10)]) == 0.5
    assert idle_share([kernel(0, 2), upload(0, 9)]) == 0  # a copy from the host is not the step's
    with pytest.raises(RuntimeError, match="no kernel"):
        idle_share([upload(0, 9)])


def test_overlap():
    kernels = [kernel(0, 4), kernel(2, 5), kernel(9, 11)]
    assert overlap([*kernels, upload(3, 7), upload(8, 10)]) == pytest.approx(3 / 6)
    assert overlap([*kernels, upload(6, 8)]) == 0
    with pytest.raises(RuntimeError, match="no copy"):
        overlap(kernels)


def works(names):
    return [Work(name, i, i + 1) for i, name in enumerate(names)]


@pytest.mark.parametrize("lost", range(5))
def test_rounds_are_found_whatever_was_lost_of_the_first(lost):
    work = works(("a b a c " * 6).split())
    split = split_rounds(work[lost:], 5)
    assert split == [work[4 * i : 4 * i + 4] for i in range(1, 6)]


@pytest.mark.parametrize("names", ["a b a b a c", "a b b a b b a b a b", "", "a"])
def test_rounds_that_are_not_alike_are_refused(names):
    with pytest.raises(RuntimeError, match="expected 4 equal rounds"):
        split_rounds(works(names.split()), 3)


def test_the_devices_work_is_in_order_and_without_the_shadows_of_labels():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, start, kind, label=False):
        at = SimpleNamespace(start=start, end=start + 1)
        return SimpleNamespace(name=name, time_range=at, device_type=kind, is_user_annotation=label)

    events = [event("b", 3, cuda), event("aten::mm", 0, cpu), event("a", 1, cuda), event("label", 1, cuda, True)]
    assert device_work(events) == [Work("a", 1, 2), Work("b", 3, 4)]


def test_callables_take_turns():
    calls = []
    stand_in = SimpleNamespace(synchronize=lambda: calls.append("-"))
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = time_in_turn(stand_in, runs, rounds=2, round_steps=2)
    assert calls == ["-", "a", "a", "-", "-", "b", "b", "-"] * 2
    assert [len(times[name]) for name in "ab"] == [2, 2]
    assert all(total >= host >= 0 for each in times.values() for total, host in each)


def test_rates_on_the_cpu():
    cpu = device.Cpu()
    assert device.copy_rate(cpu, 2**20) > 0 and device.product_rate(cpu, 64) > 0
    with pytest.raises(RuntimeError, match="a CPU captures no CUDA graph"):
        cpu.recorder()


def test_without_nvidia_smi_the_clocks_say_why(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("no nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert device.clocks() == "nvidia-smi does not answer: no nvidia-smi"
