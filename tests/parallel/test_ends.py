"""Runs of several processes that are stopped, killed or fail: how they end, what is left, and how they go on."""

import random
import signal
import subprocess
import sys

import psutil
import pytest

from rsengine.run.log import RunLog
from tests.parallel.commands import (
    GROUP,
    LAUNCHER,
    STEPS,
    ended,
    interrupted_at,
    processes,
    started,
    steps_logged,
    torchrun,
)
from tests.run.test_resume import assert_same

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
MIDDLE = STEPS + STEPS // 2  # a step inside an epoch


def one_process(*options):
    return [sys.executable, "-m", "rsengine.train", *map(str, options)]


def both_import(command):
    """Whether both processes are past the start of the interpreter, which no signal may disturb."""
    times = [process.cpu_times() for process in command.found().values()]
    return len(times) == 2 and all(each.user + each.system > 0.5 for each in times)


def assert_stopped(end, status):
    assert end.status == status and end.out.count("stopped after step") == 1 and not end.errors(), end
    assert end.out.splitlines()[-1].startswith("stopped after step") and end.seconds < 60


def assert_lost(end, rank, name="SIGKILL"):
    """One message that names the rank, within half a minute."""
    (line,) = end.errors()
    assert f"the process of rank {rank} (process " in line and f"was ended by {name}" in line and "--resume" in line
    assert end.status == 1 and end.err.splitlines() == [line] and end.seconds < 30


def test_a_stopped_run_goes_on_to_the_same_bits(whole, options, tmp_path):
    run = tmp_path / "run"
    end = interrupted_at(processes(*options, "--out", "run"), tmp_path, run, MIDDLE, TERM, 1)
    assert_stopped(end, 143)
    assert "python -m rsengine.train --resume --out run --processes=2 --data digits" in end.out
    assert (run / "report.html").exists() and steps_logged(run) % STEPS
    again = ended(processes("--resume", "--out", "run", "--data", "digits", "--device", "cpu"), tmp_path)
    assert (again.status, again.err) == (0, "") and "resumed at step" in again.out
    assert "otherwise than before" not in again.out
    assert_same(whole[0], run)


def test_a_killed_run_goes_on_in_one_process_and_again_in_two(options, tmp_path):
    run = tmp_path / "run"
    assert_lost(interrupted_at(processes(*options, "--out", "run"), tmp_path, run, STEPS // 2, KILL, 0), 0)
    resumed = [*options, "--out", "run", "--resume"]
    end = interrupted_at(one_process(*resumed), tmp_path, run, STEPS + 3, TERM, LAUNCHER)
    assert_stopped(end, 143)
    assert "resumed otherwise than before (processes 2, now 1" in end.out and "not bit for bit" in end.out
    end = ended(processes(*resumed), tmp_path)
    assert end.status == 0 and "resumed otherwise than before (processes 1, now 2" in end.out
    assert [record["step"] for record in RunLog(run).records("epoch")] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_torchrun_starts_a_killed_run_again(whole, options, tmp_path):
    """Without ``--out``: the folder of the first attempt is found again."""
    with started(torchrun(*options, agent=("--max-restarts=2",)), tmp_path) as command:
        run = command.wait_for(lambda: next(iter((tmp_path / "runs").glob("tiny-*")), None))
        command.wait_for_step(run, MIDDLE)
        command.send(KILL, 1)
        end = command.end()
    assert end.status == 0 and end.out.count("started again by torchrun, attempt 2: the run goes on with") == 1
    (line,) = end.errors()
    assert "rank 1 (process " in line and "was killed" in line
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    assert_same(whole[0], run)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_run_again_that_has_no_checkpoint(whole, options, tmp_path, rank):
    with started(torchrun(*options, agent=("--max-restarts=1",)), tmp_path) as command:
        run = command.wait_for(lambda: next(iter((tmp_path / "runs").glob("tiny-*/recipe.toml")), None)).parent
        command.send(KILL, rank)
        end = command.end()
    assert end.status == 0 and "attempt 2: the run goes on" in end.out, end
    assert_same(whole[0], run)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "number", "target", "status"),
    [
        (processes, TERM, 0, 143),
        (processes, TERM, LAUNCHER, 143),
        (processes, INT, LAUNCHER, 130),
        (processes, INT, GROUP, 130),
        (torchrun, TERM, 0, 0),
        (torchrun, TERM, LAUNCHER, 1),  # a traceback of torchrun's own
        (torchrun, INT, GROUP, 1),
    ],
)
def test_every_way_to_stop_saves_and_says_so_once(options, tmp_path, words, number, target, status):
    run = tmp_path / "run"
    end = interrupted_at(words(*options, "--out", "run", "--json"), tmp_path, run, MIDDLE, number, target)
    assert end.status == status and end.err.count("stopped after step") == 1 and not end.errors(), end
    assert f'"stopped_by_signal": {int(number)}' in end.out and len(end.out.splitlines()) == 1
    assert end.seconds < 60 and not (run / ".lock").exists() and (run / "report.html").exists()


@pytest.mark.thorough
def test_a_stop_before_the_first_step_is_quiet(options, tmp_path):
    for number, status, said in ((INT, 130, "interrupted\n"), (TERM, 143, "")):
        with started(processes(*options, "--out", "run"), tmp_path) as command:
            command.wait_for(lambda: both_import(command))  # noqa: B023 (called in the loop)
            command.send(number, GROUP)
            end = command.end()
        assert (end.status, end.out, end.err) == (status, "", said)


@pytest.mark.thorough
def test_a_second_ctrl_c_ends_at_once(options, tmp_path):
    with started(processes(*options, "--out", "run"), tmp_path) as command:
        command.wait_for_step(tmp_path / "run", 4)
        command.send(signal.SIGSTOP, 1)  # so that the first cannot
        command.send(INT, LAUNCHER)
        with pytest.raises(subprocess.TimeoutExpired):
            command.process.wait(3)
        command.send(INT, LAUNCHER)
        end = command.end()
    assert end.status == 130 and end.err == "interrupted\n" and end.seconds < 10


@pytest.mark.thorough
def test_processes_stop_with_their_launcher(options, tmp_path):
    with started(processes(*options, "--out", "run"), tmp_path) as command:
        command.wait_for_step(tmp_path / "run", MIDDLE)
        command.send(KILL, LAUNCHER)
        command.process.wait()
        _, alive = psutil.wait_procs(command.members.values(), timeout=60)
    assert not alive
    assert "stopped after step" in (tmp_path / "out.txt").read_text()
    # It removes the folder of the launcher that was killed.
    assert ended(processes(*options, "--out", "run", "--resume"), tmp_path).status == 0


@pytest.mark.thorough
@pytest.mark.parametrize("words", [processes, torchrun])
@pytest.mark.parametrize("number", [TERM, KILL])
def test_ends_at_random_moments_change_nothing(whole, options, tmp_path, words, number):
    """Ten in all with each signal, one after another on the same run, until it is done."""
    draw, run, ends = random.Random(f"{number}"), tmp_path / "run", 0
    while ends < 5:
        resume = ["--resume"] * (run / "checkpoint.pt").exists()
        end = interrupted_at(
            words(*options, "--out", "run", *resume), tmp_path, run, steps_logged(run) + draw.randrange(1, 12),
            number, draw.choice([0, 1]),
        )  # fmt: skip
        assert end.seconds < 30 and (end.status == (143 if number == TERM else 1) or words is torchrun), end
        said = end.out.count("stopped after step") if number == TERM else len(end.errors())
        assert said == 1, end
        ends += 1
    assert ended(words(*options, "--out", "run", "--resume"), tmp_path).status == 0
    assert_same(whole[0], run)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
