"""How OpenMP's threads wait: said before PyTorch is imported, and changed while other processes want the processors."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rsengine import processor, waiting


@pytest.mark.parametrize(
    ("cores", "given", "expected"),
    [
        (2, {}, "30000"),
        (5, {}, None),
        (2, {"GOMP_SPINCOUNT": "7"}, "7"),
        (2, {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_how_often_threads_look_before_they_sleep(monkeypatch, cores, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))  # so that what is set below is undone
        if name not in given:
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    processor.set_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert waiting._is_ours() == (expected == "30000")


def test_it_is_said_before_pytorch_is_imported():
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys; os.cpu_count = lambda: 2; import rsengine; "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), *sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    count, *modules = said.stdout.split()
    assert count == "30000" and "rsengine" in modules and "torch" not in modules


@pytest.fixture
def others(monkeypatch):
    """How many processors other processes want, which the test changes; and what became of the waiting, in order."""
    state = {"wanted": 0, "looks": 0, "done": []}

    class Others:
        def used(self):
            state["looks"] += 1
            return state["wanted"]

    class Short:
        def __init__(self, threads):
            state["done"].append(f"short for {threads}")

        def end(self):
            state["done"].append("long")

    monkeypatch.setenv("GOMP_SPINCOUNT", str(processor.LOOKS))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(waiting, "PERIOD", 0.001)
    monkeypatch.setattr(waiting, "OtherWork", Others)
    monkeypatch.setattr(waiting, "usable_cpus", lambda: {0, 1})
    monkeypatch.setattr(waiting, "_Short", Short)
    monkeypatch.setattr(waiting, "_can_shorten", lambda: True)
    return state


def looked(state, more):
    """Wait until the machine was looked at so often from now on; the first look may have begun before."""
    goal, deadline = state["looks"] + more + 1, time.monotonic() + 60
    while state["looks"] < goal:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_waiting_is_short_only_beside_others(others):
    with waiting.beside_others(2):
        looked(others, waiting.CALM + 1)
        others["wanted"] = 0.2
        looked(others, 3)
        assert others["done"] == []
        others["wanted"] = 0.9
        looked(others, 3)
        assert others["done"] == ["short for 2"]
        others["wanted"] = 0
        looked(others, waiting.CALM + 1)
        assert others["done"] == ["short for 2", "long"]
        others["wanted"] = 2
        looked(others, 1)
    assert others["done"] == ["short for 2", "long", "short for 2", "long"]  # also at the end
    assert "waiting" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("threads", "environment", "can"),
    [(1, {}, True), (2, {"GOMP_SPINCOUNT": "5"}, True), (2, {"OMP_WAIT_POLICY": "active"}, True), (2, {}, False)],
)
def test_nothing_is_done_where_it_does_not_apply(others, monkeypatch, threads, environment, can):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(waiting, "_can_shorten", lambda: can)
    others["wanted"] = 1
    with waiting.beside_others(threads):
        time.sleep(0.05)
    assert others["looks"] == 0 and others["done"] == []


def test_an_error_ends_it(others):
    others["wanted"] = 1
    with contextlib.suppress(KeyError), waiting.beside_others(2):
        looked(others, 2)
        raise KeyError
    assert others["done"] == ["short for 2", "long"]


def test_threads_that_sleep_are_added_until_the_end():
    """More of OpenMP's than there are processors, as GNU's OpenMP asks for; none of them computes."""
    maps = Path("/proc/self/maps")
    if not waiting._can_shorten() or not maps.exists() or "libomp" in maps.read_text():
        pytest.skip("needs the C passes, and GNU's OpenMP alone")

    def added():
        return {path.name for path in processor.TASKS.iterdir()} - before

    before = {path.name for path in processor.TASKS.iterdir()}
    short = waiting._Short(os.cpu_count())
    deadline = time.monotonic() + 30
    try:
        while len(added()) < 2:  # the one that begins the team, and another
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        short.end()
    while added():
        assert time.monotonic() < deadline
        time.sleep(0.01)
