"""The part of the GPU check for two GPUs, with two processes on the CPU in their place."""

from unittest import mock

import pytest

import rsengine.engine.reduction
from rsengine.checks.gpu import processes, report
from rsengine.kernels.dispatch import eager_only
from tests.checks.gpu.stand_in import setup

FOUND = {"backend": "nccl", "mbytes": 52.6, "difference": 0.0, "moved": True, "same_in_all": True, "batch_size": 128}
ROWS = [FOUND | {"alone": 0.001, "together": 0.00125}, FOUND | {"alone": 0.0008, "together": 0.002}]


def with_a_stand_in(ranks, given):
    """As on GPUs no kernel in C runs, and gradients are sent."""
    sent = mock.patch.object(rsengine.engine.reduction, "shared_sum", lambda *_: None)
    with eager_only(host_reads=False), sent:
        return processes._member(ranks, given)


def broken(ranks, given):
    if ranks.rank:
        raise ValueError("no\nmore")
    return ranks.most(1)


def test_two_processes_measure_what_two_gpus_would():
    found = processes.in_processes(with_a_stand_in, setup())
    result = processes.summary(found)
    assert result["wrong"] == [] and result["difference"] == 0 and result["backend"] == "gloo"
    assert result["batch_size"] == 16 and result["images_per_second"] > 0 and result["all_reduce_mbytes"] > 0


def test_the_error_of_a_process_is_told_in_a_line():
    with pytest.raises(RuntimeError, match="^process 1: more$"):
        processes.in_processes(broken, setup())


def test_one_gpu_is_left_out(monkeypatch):
    monkeypatch.setattr(processes, "gpu_count", lambda: 1)
    result = processes.measure("two GPUs", setup())
    assert result == {"left_out": "one GPU", "wrong": []}
    assert report.left_out({"processes": {"two GPUs": result}}) == ["processes, two GPUs: one GPU"]


def test_the_slower_process_counts_and_the_story_says_what_was_found():
    result = processes.summary(ROWS)
    assert result["wrong"] == [] and result["efficiency"] == pytest.approx(0.5)
    assert (result["images_per_second"], result["images_per_second_together"]) == pytest.approx((128_000, 128_000))
    (line,) = [line for line in report.story({"processes": {"two GPUs": result}}) if "two GPUs" in line]
    assert line == (
        "two GPUs through nccl: 20 captured steps and plain ones, equal to the bit; batch 128 on one 128,000 images/s, "
        "256 on both 128,000, an efficiency of 50% with 52.6 MB of gradients"
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"difference": 1e-6}, "captured and plain steps differ by 1e-06, relative"),
        ({"same_in_all": False}, "the processes have different weights"),
        ({"moved": False}, "no weight has changed"),
    ],
)
def test_what_is_wrong_in_one_process_is_said(fault, said):
    assert processes.summary([ROWS[0], ROWS[1] | fault])["wrong"] == [said]
