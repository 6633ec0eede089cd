"""Sums in memory that processes share."""

import os
import random
import time

import pytest
import torch

from rsengine.parallel import shared
from rsengine.parallel.shared import CHUNK, shared_sum
from tests.parallel.processes import processes


@pytest.fixture(scope="module", params=[2, 3])
def group(request):
    with processes(request.param) as run:
        yield run


@pytest.fixture(scope="module")
def pair():
    with processes(2) as run:
        yield run


def parts(rank, length, dtype):
    return torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def summed(ranks, length, dtype, rounds):
    """The sums of some rounds, in which the processes come at different times."""
    found = shared_sum(length, dtype, ranks)
    late, sums = random.Random(ranks.rank), []
    for i in range(rounds):
        time.sleep(late.random() * 0.003)
        found.tensor.copy_(parts(ranks.rank + ranks.size * i, length, dtype))
        found.sum_()
        time.sleep(late.random() * 0.003)
        sums.append(found.tensor.clone())
    return sums


# Less than a chunk, one more than a chunk, and more chunks than processes that do not fill the last one.
@pytest.mark.parametrize("length", [1, CHUNK + 1, 7 * CHUNK - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sum_is_that_of_all_processes_in_their_order(group, length, dtype):
    rounds = 10
    found = group(summed, length, dtype, rounds)
    for i in range(rounds):
        expected = torch.zeros(length, dtype=dtype)
        for rank in range(len(found)):
            expected += parts(rank + len(found) * i, length, dtype)
        for each in found:
            assert torch.equal(each[i], expected)


def held_memory(ranks):
    """How many files and maps of such memory a process has, with a sum and then without."""

    def count():
        files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return sum("memfd:rsengine" in name for name in files), maps.read().count("memfd:rsengine")

    names = set(os.listdir("/dev/shm"))
    found = shared_sum(100, torch.float32, ranks)
    during = count()
    assert set(os.listdir("/dev/shm")) <= names
    del found
    return during, count()


def test_the_memory_has_no_name_and_ends_with_the_sum(pair):
    for during, after in pair(held_memory):
        assert min(during) > 0 and after == (0, 0)


def elsewhere(ranks, kind):
    """A sum where one process is not on this machine, or its system has no such files."""
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1 and kind == "other process":
            patch.setattr(shared.os, "getpid", os.getppid)
        elif ranks.rank == 1 and kind == "no process":
            patch.setattr(shared.os, "getpid", lambda: 2**22 + 1)
        elif ranks.rank == 1:
            patch.delattr(shared.os, "memfd_create")
        return shared_sum(10, torch.float32, ranks)


@pytest.mark.parametrize("kind", ["other process", "no process", "no files"])
def test_processes_that_do_not_see_each_others_memory_are_told_so(pair, kind):
    assert pair(elsewhere, kind) == [None, None]
