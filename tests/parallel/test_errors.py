"""What goes wrong in one process of a run reaches the user once, and ends all of them."""

import json
import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from rsengine.parallel.launch import KilledError, _status
from rsengine.parallel.ranks import CONSEQUENCE
from rsengine.run.log import RunLog
from tests.parallel.commands import REPOSITORY, ended, started, torchrun

TERM, KILL, SEGV = signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV

PLANTED = """
from rsengine.trainer import Trainer
record = Trainer._record_interval
def planted(self, *arguments):
    if rank == {rank} and self.steps_done == 5:
        raise ValueError("planted")
    return record(self, *arguments)
Trainer._record_interval = planted
"""
FULL_DISK = """
import errno
from rsengine import trainer
from rsengine.run.files import writing
def full(path, state):
    with writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
trainer.save_checkpoint = full
"""
IMPATIENT = """
import datetime
from rsengine.parallel import ranks
ranks.TIMEOUT = datetime.timedelta(seconds=5)
"""
FROM_PYTHON = """
import json, sys, rsengine
options = dict(data="digits", device="cpu", set={"train.epochs": 1, "train.limit_train_batches": 3})
found = [rsengine.train(sys.argv[1], out=name, **options) for name in ("one", "two")]
print(json.dumps([run.history["test_accuracy_ema"] for run in found]))
"""


def program(folder, text, *, command=True):
    """torchrun's words for a program that changes something before it trains as the command does."""
    start = "import os, sys\nrank = int(os.environ['RANK'])\n"
    end = "from rsengine.train import main\nsys.exit(main())\n" if command else ""
    path = folder / "program.py"
    path.write_text(start + text + end)
    return (str(path),)


def failed(**status):
    return ChildFailedError("run", {int(rank[1:]): ProcessFailure(0, 100, code, "") for rank, code in status.items()})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (failed(r0=CONSEQUENCE, r1=2), 2),
        (failed(r0=1, r1=CONSEQUENCE), 1),
        (failed(r0=-TERM, r1=2), 2),
        (failed(r0=-KILL, r1=2), 2),  # by the agent, which had no more patience
    ],
)
def test_the_status_is_that_of_the_process_that_spoke(error, status):
    assert _status(error) == status


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (failed(r0=CONSEQUENCE, r1=-KILL), "process of rank 1 .* by SIGKILL"),
        (failed(r0=-TERM, r1=-SEGV), "process of rank 1 .* by SIGSEGV"),
        (failed(r0=-KILL, r1=-TERM), "process of rank 0 .* by SIGKILL"),
    ],
)
def test_a_process_that_was_killed_is_named(error, message):
    with pytest.raises(KilledError, match=message) as caught:
        _status(error)
    assert caught.value.status == 1 and "\n" not in str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_one_process_has_one_traceback(options, tmp_path, rank):
    words = torchrun(*options, "--out", "run", program=program(tmp_path, PLANTED.format(rank=rank)))
    end = ended(words, tmp_path)
    assert end.status == 1 and end.err.count("ValueError: planted") == 1 and not end.errors(), end.err
    assert "gloo" not in end.err


@pytest.mark.thorough
def test_a_full_disk_is_said_once(options, tmp_path):
    words = torchrun(*options, "--out", "run", program=program(tmp_path, FULL_DISK))
    end = ended(words, tmp_path)
    (line,) = end.errors()
    assert "checkpoint.pt: cannot be written (No space left on device): the disk is full" in line


@pytest.mark.thorough
def test_a_process_that_hangs_ends_the_run_in_time(options, tmp_path):
    """After 5 seconds here, after half an hour as a rule."""
    words = torchrun(*options, "--out", "run", program=program(tmp_path, IMPATIENT))
    with started(words, tmp_path) as command:
        command.wait_for_step(tmp_path / "run", 5)
        command.send(signal.SIGSTOP, 1)
        end = command.end()
    (line,) = end.errors()
    assert "the processes do not reach each other any more (" in line and "--resume" in line and end.seconds < 60
    assert "Traceback" not in end.err.split("error: ")[0] and len(RunLog(tmp_path / "run").records("interval")) >= 5


@pytest.mark.thorough
def test_training_from_python_works_under_torchrun(options, tmp_path):
    """Twice in one program, with one set of lines and the same result."""
    words = torchrun(options[1], program=program(tmp_path, FROM_PYTHON, command=False))
    end = ended(words, tmp_path)
    assert (end.status, end.err) == (0, "")
    assert end.out.count("compute: ") == end.out.count("epoch 1/1: ") == end.out.count("Report: ") == 2
    results = [json.loads(line) for line in end.out.splitlines() if line.startswith("[")]
    assert len(results) == 2 and results[0] == results[1] and results[0][0] == results[0][1]  # each process has them


@pytest.mark.parametrize("variables", [{}, {"RANK": "1"}], ids=["alone", "of several"])
@pytest.mark.parametrize(
    ("work", "status", "words"),
    [
        ("return 5", 5, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("raise ValueError('odd')", 1, "ValueError: odd\n"),
    ],
)
def test_a_process_ends_with_the_status_of_its_command(variables, work, status, words):
    program = (
        f"import sys\nfrom rsengine.parallel.launch import end_process\ndef main():\n    {work}\nend_process(main)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | variables
    end = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert end.returncode == status and end.stderr.endswith(words) and bool(end.stderr) == bool(words)
