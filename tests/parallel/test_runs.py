"""Runs of several processes as users start them: what they print, leave and refuse, and how they go on."""

import json
import socket

import pytest

from rsengine import train as train_module
from rsengine.data.errors import UserError
from rsengine.errors import SettingsError
from rsengine.parallel.ranks import join
from rsengine.run.log import RunLog
from tests.parallel.commands import FILES, ended, processes, torchrun
from tests.run.test_resume import assert_same


def test_a_run_prints_each_line_once_and_leaves_a_whole_folder(whole):
    run, end = whole
    assert (end.status, end.err) == (0, "")
    lines = end.out.splitlines()
    assert len(lines) == len(set(lines)) and [line[:9] for line in lines if line[:5] == "epoch"] == [
        "epoch 1/3", "epoch 2/3", "epoch 3/3"
    ]  # fmt: skip
    (compute,) = [line for line in lines if line.startswith("compute: ")]
    assert "2 processes through gloo" in compute and "1 thread each, batch norm local" in compute
    assert lines[-1].endswith("Report: run/report.html") and {path.name for path in run.iterdir()} == FILES
    (start,) = RunLog(run).records("start")
    assert (start["processes"], start["threads"]) == (2, 1)


def test_torchrun_gives_the_same_bits(whole, options, tmp_path):
    end = ended(torchrun(*options, "--out", "run", "--quiet", "--json"), tmp_path)
    assert (end.status, end.err) == (0, "")
    (line,) = end.out.splitlines()
    assert json.loads(line)["run"] == "run" and json.loads(line)["epochs"] == 3
    assert_same(whole[0], tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_a_bad_setting_is_said_once(options, tmp_path):
    end = ended(processes(*options, "--set", "train.batch_size=65", "--out", "run"), tmp_path)
    assert (end.status, end.err.splitlines()) == (2, end.errors())
    assert end.errors() == [
        "error: train.batch_size: expected a multiple of the 2 processes; got 65; use train.batch_size=64 or another "
        "number of processes"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.batch_size=65"], "train.batch_size: expected a multiple of the 2 processes"),
        (["--bad"], "python -m rsengine.train: error: unrecognized arguments: --bad"),
        (["--epochs", "x"], "python -m rsengine.train: error: argument --epochs"),
        (["--seed", "1", "--set", "train.seed=2"], "error: --seed 1: --set train.seed=2 says otherwise"),
        (["--processes", "2"], "error: --processes: torchrun has started several processes already"),
        (["--data", "nowhere"], "error: --data nowhere"),
        (["--set", "schedule.learning_rate=1e9"], "is no longer a finite number"),
    ],
)
def test_each_launcher_says_an_error_once(options, tmp_path, words, message):
    ends = [ended(torchrun(*options, *words, "--out", "run"), tmp_path / "torchrun")]
    if "--processes" not in words:
        ends.append(ended(processes(*options, *words, "--out", "run"), tmp_path / "processes"))
        assert ends[1].status == (1 if "rate" in words[-1] else 2)
    for end in ends:
        assert end.err.count(message) == 1 and end.status != 0, end.err


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_a_bad_number_of_processes_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_module.main(["--processes", text])
    assert f"argument --processes: expected a number of at least 1, or auto; got '{text}'" in capsys.readouterr().err


def test_processes_within_torchrun_are_refused(capsys, monkeypatch):
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train_module.main(["--data", "digits", "--processes", "2"]) == 2
        assert capsys.readouterr().err.count("error: --processes: torchrun has started") == said


def test_what_is_wrong_in_all_processes_is_said_by_the_first(capsys, monkeypatch):
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train_module.main(["--epochs", "2", "--set", "train.epochs=3"]) == 2
        assert capsys.readouterr().err.count("error: --epochs 2") == said


def test_a_dry_run_plans_one_process_and_says_so(monkeypatch, capsys, options):
    assert train_module.main([*options, "--processes", "2", "--dry-run"]) == 0
    assert "processes: the plan is that of one process" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_module, "plan", lambda *_: pytest.fail("every process would plan"))
    assert train_module.main([*options, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: expected a number .* got 'x'; start with torchrun, or unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE: expected a number .* got '-2'"),
        ({"RANK": "0"}, "WORLD_SIZE: expected a number .* got 'none'"),
        ({"WORLD_SIZE": "2"}, "RANK: expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected a number below WORLD_SIZE, 2; got 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK: expected a number below WORLD_SIZE, 0; got 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"}, "MASTER_PORT: expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, "MASTER_PORT: expected a port, .*; got 99999"),
    ],
)
def test_a_wrong_environment_is_one_line(environment, message):
    with pytest.raises(SettingsError, match=message) as caught:
        join("cpu", environment)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = f"127.0.0.1:{port} cannot be opened here .*; name a free port"
        with pytest.raises(SettingsError, match=message) as caught:
            join("cpu", {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port})
    assert "\n" not in str(caught.value)
