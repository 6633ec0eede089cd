"""The run log: what is written comes back, a kill loses one line at most, and a resume forgets only the future."""

import json
import math
import os
import subprocess
import sys

import pytest

from rsengine.data.errors import UserError
from rsengine.run import files
from rsengine.run import log as runlog
from rsengine.run.log import RunLog

START = {"kind": "start", "time_to_first_step": 1.0, "device": "cpu", "precision": "fp32", "threads": 2}
START |= {"resumed": False, "machine": {}, "versions": {}}


def _steps(log: RunLog) -> list[int]:
    return [record["step"] for record in log.records()]


def test_records_come_back_in_order_and_by_kind(tmp_path):
    log = RunLog(tmp_path / "runs" / "first")  # the folder is made by the first append
    assert log.records() == []
    written = [
        {"kind": "start", "step": 0, "device": "cpu", "resumed": False, "threads": 2},
        {"kind": "interval", "step": 10, "epoch": 0.5, "train_loss": 2.25},
        {"kind": "epoch", "step": 20, "epoch": 1, "test_accuracy_ema": None, "note": "é\u2028\n\udce9"},
    ]
    for record in written:
        log.append(record)
    assert log.records() == written
    assert log.records(runlog.EPOCH) == written[2:]
    assert log.records("nothing") == []
    # U+2028 ends a line for str.splitlines() but not in JSON lines: three records, three lines.
    assert log.path.read_bytes().count(b"\n") == 3
    assert RunLog(log.path.parent).records() == written


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    log = RunLog(tmp_path)
    nested = {"list": [math.inf, 1.5], "tuple": ([1.0, math.nan], 3)}
    log.append({"kind": "interval", "step": 3, "nan": math.nan, "inf": -math.inf, "nested": nested})

    def refuse(word):
        raise AssertionError(f"not valid JSON: {word}")

    record = json.loads(log.path.read_text(), parse_constant=refuse)
    assert record == {
        "kind": "interval",
        "step": 3,
        "nan": None,
        "inf": None,
        "nested": {"list": [None, 1.5], "tuple": [[1.0, None], 3]},
    }


def test_a_value_without_json_form_is_refused_and_nothing_is_written(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        log.append({"kind": "start", "step": 0, "value": {1}})
    assert not log.path.exists()


def test_a_torn_last_line_is_no_record_and_the_next_append_cuts_it_off(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.append({"kind": "interval", "step": step})
    whole = log.path.read_bytes()
    for torn in (b'{"kind": "interval", "st', b'{"kind": "interval", "step": 3}', "é".encode()[:1]):
        log.path.write_bytes(whole + torn)
        assert _steps(log) == [1, 2]
        log.append({"kind": "interval", "step": 4})
        assert log.path.read_bytes() == whole + b'{"kind": "interval", "step": 4}\n'
    # The very first line torn: nothing before it to keep.
    log.path.write_bytes(b'{"kin')
    log.append({"kind": "interval", "step": 4})
    assert _steps(log) == [4]


@pytest.mark.parametrize("damage", [b'{"kind": "inter\n', b"[1]\n", b'{"kind": "x"}\n', b"\n", b"\xff\n"])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path, damage):
    log = RunLog(tmp_path)
    log.append({"kind": "interval", "step": 1})
    log.path.write_bytes(log.path.read_bytes() + damage + b'{"kind": "interval", "step": 2}\n')
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        log.records()
    with pytest.raises(ValueError, match="line 2"):
        log.truncate_after(2)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize(
    "tail", [b"\0" * 700, b"\0" * 700 + b"\n", b"\0\n\xff\xfe\n{", b"\n\n", b"[" * 100_000 + b"\n", b'{"kind": 3}\n']
)
def test_rubbish_behind_the_last_record_is_skipped_and_goes_at_the_next_resume(tmp_path, tail):
    """What a power cut leaves: a file as long as it was to become, without its bytes."""
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.append({"kind": "interval", "step": step})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + tail)
    assert _steps(log) == [1, 2, 3]
    assert log.truncate_after(3) >= 1
    assert log.path.read_bytes() == whole
    log.path.write_bytes(whole + tail)
    log.truncate_after(2)
    assert _steps(log) == [1, 2]


def test_damage_is_the_user_s_to_know_in_one_line(tmp_path):
    log = RunLog(tmp_path)
    log.path.write_bytes(b"\0\0\0\n" + b'{"kind": "interval", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not valid JSON .*; take that line out") as caught:
        log.records()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kind": "epoch"}, "epoch: missing"),
        ({"kind": "interval", "epoch": "x"}, "epoch: expected a number from 0 to .*; got 'x'"),
        ({"kind": "interval", "epoch": -0.5}, "epoch: expected a number from 0 to"),
        ({"kind": "interval", "epoch": 10**400}, "epoch: expected a number from 0 to"),
        (
            {"kind": "interval", "epoch": 1, "train_loss": 2.0, "train_accuracy": 1.5},
            "train_accuracy: expected .* 0 to 1",
        ),
        (START | {"resumed": None}, "resumed: expected true or false; got None"),
        (START | {"threads": -1}, "threads: expected an integer from 0 to"),
        (START | {"machine": {"ram_gib": []}}, "machine.ram_gib: expected a number from 0 to"),
        (START | {"machine": {"gpus": "one"}}, "machine.gpus: expected a list; got 'one'"),
        (START | {"versions": {"torch": 2}}, "versions.torch: expected text; got 2"),
    ],
)
def test_a_record_that_no_report_can_be_made_of_is_damage(tmp_path, record, words):
    log = RunLog(tmp_path)
    log.append({"kind": "other", "step": 0})
    log.append(record | {"step": 2})
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {words}"):
        log.check()


def test_truncate_after_drops_the_future_and_keeps_order_and_bytes(tmp_path):
    log = RunLog(tmp_path)
    # A resume logs its start at a step already reached, so steps need not grow from line to line.
    lines = [b'{"kind":"start", "step": 0}\n', *(b'{"step":%d,"kind":"interval" }\n' % s for s in (5, 10, 15, 10, 20))]
    log.path.write_bytes(b"".join(lines) + b'{"kind": "in')
    assert log.truncate_after(10) == 3  # 15, 20 and the torn line
    assert log.path.read_bytes() == b"".join([lines[0], lines[1], lines[2], lines[4]])
    assert _steps(log) == [0, 5, 10, 10]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]

    stamp = log.path.stat()
    assert log.truncate_after(10) == 0
    assert log.path.stat().st_ino == stamp.st_ino, "nothing to drop: the file is left alone"
    log.append({"kind": "interval", "step": 11})
    assert _steps(log) == [0, 5, 10, 10, 11]
    assert log.truncate_after(-1) == 5
    assert log.path.read_bytes() == b""
    assert log.records() == []


def test_truncate_after_without_a_log_makes_none(tmp_path):
    assert RunLog(tmp_path).truncate_after(3) == 0
    assert os.listdir(tmp_path) == []


def test_a_failed_atomic_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runlog.os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_loses_no_record_it_had_appended(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from rsengine.run.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "for step in range(50): log.append({'kind': 'interval', 'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert _steps(RunLog(tmp_path)) == list(range(50))


def test_a_hole_that_a_power_cut_left_behind_what_was_synced_goes_at_the_resume(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.append({"kind": "interval", "step": step})
    first, second, third, fourth = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + bytes(len(second)) + third + fourth)
    with pytest.raises(runlog.LogError):
        log.truncate_after(4)  # a record that is needed lies behind it
    assert log.truncate_after(3) == 2
    assert log.path.read_bytes() == first
