"""The table of one process beside several, from made-up timings, and its processes."""

import contextlib

import pytest

from bench.process_group import Group, Network, Timing, last_reductions
from bench.processes import ACCURACY, ALONE, HEADING, SHARED, SOCKETS, TITLE, Measured, networks, text, write
from rsengine.config import Recipe

SMALL = Recipe().with_settings(["model.blocks=[1]", "model.width_multiplier=0.125", "train.batch_size=8"])
NETWORK = Network("small", SMALL, 16, 3)


def made_up():
    """Rounds of which the second is a slow one for all; of two processes the slower counts."""
    one = [[Timing(each, (), 0)] for each in (0.02, 0.06, 0.02)]
    two = [
        [Timing(each, (0.001, 0.002), 2_500_000), Timing(each / 2, (0.003, 0.001), 2_500_000)]
        for each in (0.016, 0.048, 0.016)
    ]
    return Measured(NETWORK, {ALONE: one, SHARED: two, SOCKETS: [[t[0], t[0]] for t in two]})


def test_the_row_of_a_network():
    written = text([made_up()], 3, 2, 0.25)
    assert "load average 0.2 at the start" in written
    row = "| small | 400.0 | 500.0 | 1.25x (1.25 to 1.25) | 1.25x (1.25 to 1.25) | 2.5 | 1.0 | 1.8 | 1.5 |"
    assert row in written.splitlines()


def test_the_process_that_comes_last_does_not_wait():
    timings = [Timing(0, (5.0, 1.0), 0), Timing(0, (2.0, 4.0), 0)]
    assert last_reductions(timings) == [2.0, 1.0]


def test_sections_keep_each_other(tmp_path):
    results = tmp_path / "processes.md"
    for section in ("speed 1", "speed 2"):
        write(f"{HEADING}\n\n{section}\n", HEADING, ACCURACY, results)
        write(f"{ACCURACY}\n\nof {section}\n", ACCURACY, results=results)
    assert results.read_text() == f"{TITLE}\n\n{HEADING}\n\nspeed 2\n\n{ACCURACY}\n\nof speed 2\n"


def test_processes_share_the_steps_and_say_how_long_they_take():
    with contextlib.closing(Group(1)) as one, contextlib.closing(Group(2)) as two:
        for group, size in ((one, 1), (two, 2)):
            for network in (NETWORK, NETWORK):  # the second takes the place of the first
                group.prepare(network)
            timings = group.run(3)
            assert len(timings) == size and min(timing.seconds for timing in timings) > 0
            assert [len(timing.reductions) for timing in timings] == [3 * (size > 1)] * size
            assert {timing.nbytes > 0 for timing in timings} == {size > 1}
            for timing in timings:
                assert sum(timing.reductions) < 3 * timing.seconds
        two._processes[1].kill()
        with pytest.raises(RuntimeError, match="run: one of 2 processes ended"):
            two.run(1)


def test_the_networks_are_those_of_the_other_tables():
    names = [network.name for network in networks()]
    assert names[0] == "RS-50, stem 32 stride 2, 32x32, batch 128" and names[-1] == "speedrun, 32x32, batch 512"
    assert [network.batch for network in networks()] == [128, 512, 128, 512, 512]
