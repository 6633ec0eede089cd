"""What runs the tests of several processes: results by rank, and the first error of any of them within the limit."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from tests.parallel.processes import processes, run_in_processes


def summed(ranks, value):
    return ranks.rank, ranks.sum_(torch.full((2,), value * 10.0**ranks.rank))


def raises_in_the_last(ranks):
    if ranks.rank == ranks.size - 1:
        raise ValueError("planted")
    ranks.sum_(torch.zeros(1))  # waits for the last one


def ends(ranks):
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum_(torch.zeros(1))


def hangs(ranks):
    time.sleep(ranks.rank * 1000)


def test_results_come_by_rank_and_the_processes_are_used_again():
    with processes(3) as run:
        for value in (1.0, 2.0):
            found = run(summed, value)
            assert [rank for rank, _ in found] == [0, 1, 2]
            assert all(total.tolist() == [111 * value] * 2 for _, total in found)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises_in_the_last, "rank 1: Traceback(.|\n)*ValueError: planted"),
        (ends, "rank 0: the process ended without an answer"),
    ],
)
def test_the_first_error_ends_all_of_them(function, message):
    with pytest.raises(RuntimeError, match=message):
        run_in_processes(2, function)
    assert not multiprocessing.active_children()


def test_what_takes_longer_than_its_limit_is_ended():
    with processes(2) as run:
        run(summed, 1.0)
        with pytest.raises(RuntimeError, match="no answer within 1 s from rank 1"):
            run(hangs, limit=1)
    assert not multiprocessing.active_children()
