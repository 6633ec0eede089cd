"""The orchestration for real: processes that hang, are killed, crash, raise, print, and a second call."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsengine.checks.gpu import runner
from rsengine.checks.gpu.parts import PARTS, Part, Row
from rsengine.checks.gpu.runner import Check
from rsengine.gpu_check import SECONDS

ROOT = Path(__file__).parents[3]
MODULE = "tests.checks.gpu.faulty_part"


def part(*rows, name="faulty", module=MODULE):
    return Part(name, "for a test", module, tuple(Row(row, 1, 5, on_cpu=True) for row in rows))


def run(parts, folder, results=None, seconds=120.0):
    results = {} if results is None else results
    said = []
    Check(results, seconds=seconds, device="cpu", logs=folder, say=said.append).run(parts)
    return results, said


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    rows = [
        "first",
        "raises",
        "prints",
        "is killed",
        "breaks the device",
        "after",
        "hides a broken device",
        "next",
        "hangs",
        "crashes",
        "exits",
        "last",
    ]
    changes = []
    results = {}
    folder = tmp_path_factory.mktemp("logs")
    check = Check(
        results, seconds=120, device="cpu", logs=folder, changed=lambda: changes.append(len(results["faulty"]))
    )
    check.run([part(*rows), part("other", name="other")])
    return results, changes, rows


def test_no_row_costs_another_its_result(survived):
    results, _, rows = survived
    assert set(results["faulty"]) == set(rows)
    for name in ("first", "prints", "after", "next", "last"):
        assert results["faulty"][name]["wrong"] == [], name
    assert results["other"]["other"]["wrong"] == []


def test_how_a_row_ended_is_said(survived):
    wrong = {name: row["wrong"] for name, row in survived[0]["faulty"].items()}
    assert wrong["raises"] == ["ValueError: no"]
    assert wrong["breaks the device"] == ["RuntimeError: an illegal memory access"]
    assert "was ended by SIGKILL" in wrong["is killed"][0]
    assert "was ended by SIGSEGV" in wrong["crashes"][0]
    assert "was not finished within its limit of 5 s" in wrong["hangs"][0]
    assert wrong["exits"] == ["the process ended with status 3; it last said: the last words"]


def test_a_lost_device_is_left_behind_with_its_process(survived):
    rows = survived[0]["faulty"]
    assert rows["first"]["pid"] == rows["prints"]["pid"] != rows["after"]["pid"]


def test_every_result_is_handed_on_as_soon_as_it_is_there(survived):
    assert survived[1] == [*range(1, 13), 12]  # the other part's row changes nothing in this one


def test_a_second_call_runs_what_is_missing_and_what_went_wrong_last(tmp_path):
    results, _ = run([part("good", "raises")], tmp_path)
    pid = results["faulty"]["good"]["pid"]
    again, said = run([part("good", "raises", "new")], tmp_path, results)
    assert again["faulty"]["good"]["pid"] == pid and again["faulty"]["new"]["wrong"] == []
    assert said[0].startswith("faulty: new, raises ")


def test_what_was_left_out_is_tried_again_and_a_good_row_only_when_asked(tmp_path):
    known = {"good": {"pid": 0, "wrong": []}, "other": {"left_out": "FFCV is not installed"}}
    results, _ = run([part("good", "other")], tmp_path, {"faulty": dict(known)})
    assert results["faulty"]["good"]["pid"] == 0 and results["faulty"]["other"]["pid"]
    results = {"faulty": dict(known)}
    Check(results, seconds=3.0, device="cpu", logs=tmp_path, again=True).run([part("good")])
    assert results["faulty"]["good"]["pid"] == 0  # no time: what was there stays
    Check(results, seconds=60.0, device="cpu", logs=tmp_path, again=True, source="abc").run([part("good")])
    assert results["faulty"]["good"]["pid"] and results["faulty"]["good"]["source"] == "abc"


def test_the_time_of_a_call_is_kept_and_the_row_cut_off_is_still_missing(tmp_path):
    start = time.monotonic()
    slow = Part("faulty", "for a test", MODULE, (Row("hangs", 1, 500, on_cpu=True), Row("next", 1, 5, on_cpu=True)))
    results, said = run([slow], tmp_path, seconds=8)
    assert time.monotonic() - start < 10
    assert results == {} and "hangs: was cut off: the time was over" in said[-1]


def test_extra_rows_run_after_the_essential_ones_of_every_part_where_they_are_expected_to_fit(tmp_path):
    rows = (Row("extra", 1, 5, False, True), Row("long", 1000, 5, False, True), Row("essential", 1, 5, True, True))
    results, said = run([Part("faulty", "", MODULE, rows), part("other", name="other")], tmp_path, seconds=60)
    started = [line.split(" (")[0] for line in said if "about" in line]
    assert started == ["faulty: essential", "other: other", "faulty: extra"]
    assert set(results["faulty"]) == {"essential", "extra"}


def test_a_part_that_cannot_start_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    hanging = tmp_path / "hanging_part.py"
    hanging.write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "START_LIMIT", 6.0)
    missing, hangs = part("a", "b", name="missing", module="no_such_part"), part("c", name="hangs", module=hanging.stem)
    results, _ = run([missing, hangs, part("good")], tmp_path)
    for row in results["missing"].values():
        assert row["wrong"][0].endswith("ModuleNotFoundError: No module named 'no_such_part'")
    assert set(results["missing"]) == {"a", "b"}
    assert "was not finished within its limit of 6 s" in results["hangs"]["c"]["wrong"][0]
    assert results["faulty"]["good"]["wrong"] == []


def test_a_row_is_told_how_long_it_may_take(tmp_path):
    results, _ = run([part("good")], tmp_path)
    assert 0 < results["faulty"]["good"]["given"] < 5


def test_the_essential_rows_fit_a_call_and_no_name_comes_twice():
    assert sum(part.seconds(essential=True) for part in PARTS) <= SECONDS
    assert len({part.name for part in PARTS}) == len(PARTS)
    for each in PARTS:
        assert len({row.name for row in each.rows}) == len(each.rows)
        assert all(row.limit > row.seconds for row in each.rows)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "rsengine.gpu_check", "--device", "cpu", *map(str, arguments)]


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_loses_nothing(tmp_path):
    environment = os.environ | {"RSENGINE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command("--parts", "smoke,train", "--out", tmp_path), cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A run of tests in the background of a shell ignores the signal, and its processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; what was measured is written, and a second call goes on" in output
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["parts"]["card"]["card"]["wrong"] == []
    assert file.with_suffix(".md").exists()
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], text=True, capture_output=True).stdout


@pytest.mark.slow
def test_it_works_in_a_copied_tree_without_installation_and_without_ffcv(tmp_path):
    """As on a machine with a GPU and no network."""
    tree = tmp_path / "tree"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True
    ).stdout.split()
    for name in tracked:
        if name.startswith(("rsengine", "kernels", "data", "bench/")) and "results" not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).symlink_to((ROOT / name).readlink()) if (ROOT / name).is_symlink() else (
                tree / name
            ).write_bytes((ROOT / name).read_bytes())
    blocked = tmp_path / "blocked" / "ffcv"
    blocked.mkdir(parents=True)
    (blocked.parent / "sitecustomize.py").write_text(
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name.split('.')[0] == 'ffcv' else find(name, *rest)\n"
        "sys.modules['ffcv'] = None\n"
    )
    done = subprocess.run(
        command("--parts", "smoke,train", "--out", "../out", "--seconds", 100), cwd=tree, text=True,
        env=os.environ | {"PYTHONPATH": str(blocked.parent)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("*.json")
    parts = json.loads(file.read_text())["parts"]
    assert "left out: smoke, feeder: FFCV is not installed" in done.stdout
    assert parts["smoke"]["feeder"]["left_out"] == "FFCV is not installed"
    assert "FFCV is not installed" in parts["train"]["quickstart, resident"]["left_out"]
    assert parts["card"]["card"]["device"]["copy_gb_per_s"] > 0
