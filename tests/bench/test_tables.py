"""The tables that benchmarks write, from made-up measurements."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.baselines import Case
from bench.markdown import write_section
from bench.own_process import OURS, OwnProcess
from bench.scaling import AXES, DOCUMENT, Point, draw, measure, rows_of, text
from bench.speedrun import pictures, runs
from bench.speedrun import run as speedrun
from bench.speedrun import table as speedrun_table
from bench.train_step_table import kind, table
from rsengine.config import Recipe
from rsengine.run.log import RunLog

FOUND = {
    "images_per_second": 200.0,
    "peak_bytes": 3 * 2**29,
    "start_seconds": 2.5,
    "multiply_adds": 1e8,
    "activation_bytes": 0.0,
    "parameters": 0,
}


def test_a_row_of_growth_and_a_row_that_failed():
    written = text({"depth": [(Point(depth=26), FOUND), (Point(depth=420), {"failed": "more than 9 s"})]})
    assert "| 26 | 200.0 | 120 | 1.50 | 2.5 |" in written
    assert "| 420 | more than 9 s | | | |" in written
    assert written.count("| 420 |") == 1


def test_the_picture_of_growth_is_drawn_from_its_tables(tmp_path):
    written = text({"depth": [(Point(depth=26), FOUND), (Point(depth=420), {"failed": "more than 9 s"})]})
    assert rows_of("# Before\n\n### batch\n\n| 1 | 2.0 | 3 | 4.00 | 5.0 |\n\n" + written) == {
        "depth": [(26, 200.0, 1.5)]
    }
    kept = rows_of(DOCUMENT.read_text(encoding="utf-8"))
    assert list(kept) == list(AXES)
    for rows in (kept, {"threads": kept["threads"]}):
        draw(rows, tmp_path / "growth.png")
        with Image.open(tmp_path / "growth.png") as picture:
            assert picture.width == 1260


def test_a_point_is_measured_in_its_own_processes_and_a_slow_one_is_said():
    found = measure(Point(depth=26, batch=2, processes=2, threads=1), 120)
    assert found["images_per_second"] > 0 and found["peak_bytes"] > 2 * 2**27 and found["start_seconds"] > 0
    assert measure(Point(depth=26, batch=2), 0.1) == {"failed": "more than 0 s"}
    assert "failed" in measure(Point(depth=27), 60)


def test_a_step_runs_in_its_own_process_and_says_that_it_ended():
    case = Case(26, stem_width=8, stem_stride=2, size=32, batch=2)
    with contextlib.closing(OwnProcess(OURS, case)) as ours:
        assert ours.step() > 0
        ours.process.kill()
        with pytest.raises(RuntimeError, match="rsengine: its process ended"):
            ours.step()


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("GenuineIntel", ["avx2", "avx512f", "avx512_bf16", "amx_bf16"], "intel-amx-bf16"),
        ("AuthenticAMD", ["avx2", "avx512f", "avx512_bf16"], "amd-avx512-bf16"),
        ("AuthenticAMD", ["avx2"], "amd-avx2"),
        ("", [], "other-plain"),
    ],
)
def test_results_are_kept_by_kind_of_processor(vendor, flags, expected):
    assert kind({"vendor_id_raw": vendor, "flags": flags}) == expected


def test_a_process_has_the_variables_that_it_is_given(monkeypatch):
    monkeypatch.setenv("RSENGINE_DATA", "given")
    case = Case(26, stem_width=8, stem_stride=2, size=32, batch=2)
    with contextlib.closing(OwnProcess(OURS, case, {"RSENGINE_DATA": None, "OMP_NUM_THREADS": "1"})) as ours:
        ours.step()  # it is what it is started as
        variables = Path(f"/proc/{ours.process.pid}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=1" in variables and not any(each.startswith(b"RSENGINE_DATA") for each in variables)
    assert os.environ["RSENGINE_DATA"] == "given"


def test_steps_side_by_side():
    rows = {
        "rsengine": dict.fromkeys(("images/s", "first_step_s"), 400.0)
        | {"of_bf16_matmul": 0.5, "rsengine_is_times_faster": [1.0, 1.0, 1.0]},
        "baseline": dict.fromkeys(("images/s", "first_step_s"), 100.0)
        | {"of_bf16_matmul": 0.125, "rsengine_is_times_faster": [3.5, 4.0, 4.5]},
    }
    info = {
        "case": "RS-50",
        "multiply_adds": 1e8,
        "bf16_matmul_GFLOP/s": 400.0,
        "rounds": 9,
        "threads": 2,
        "versions": {"torch": "2"},
        "rows": rows,
    }
    machine = {"cpu": {"brand_raw": "A processor"}}
    results = {
        "benchmarks": [{"extra_info": info}, {"extra_info": {}}],
        "machine_info": machine,
        "datetime": "2026-11-24T",
    }
    written = table(results)
    assert "A processor, 2 threads; torch 2." in written and "## RS-50" in written
    assert "| baseline | 100.0 | 12.5% | 4.0x (3.5 to 4.5) | 100.0 |" in written
    assert "| rsengine | 400.0 | 50.0% |  | 400.0 |" in written


def test_attempts_of_a_speedrun(tmp_path):
    epochs = [
        {"kind": "epoch", "step": n, "epoch": n, "seconds": 240.0 * n, "epoch_seconds": 230.0, "eval_seconds": 10.0}
        | {"images_per_second": 200.0, "test_accuracy": 0.1 * n, "test_accuracy_ema": 0.1 * n + 0.05}
        for n in (1, 2, 3)
    ]
    for record in epochs:
        RunLog(tmp_path).append(record)
    recipe = Recipe().with_settings(["optimizer.name=muon", "model.blocks=[1, 2]", "train.batch_size=64"])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    attempt = runs.read(tmp_path)
    assert attempt.recipe == recipe and attempt.epochs == epochs
    # Evaluations at 4, 8 and 12 minutes; at 20 the run has been over for longer than an epoch.
    assert [attempt.after(m) for m in (3, 5, 10, 15, 20)] == [None, pytest.approx(0.15), pytest.approx(0.25)] + [
        pytest.approx(0.35),
        None,
    ]
    written = speedrun_table.test_set_section([attempt])
    assert (
        "| blocks [1, 2], width 1, stem 32, strides 2 and 2 | Muon 0.1, 0.9; SGD 0.1 | 64 | 3 | 12.0 | 11.5 | 200 |"
        in written
    )
    assert f"| {tmp_path.name} | 15.00% | 25.00% |  |  |  |" in written


def test_seeds_of_a_recipe_are_summed_up():
    def run(name, accuracy):
        record = {"kind": "epoch", "epoch": 1, "seconds": 700.0, "epoch_seconds": 600.0, "eval_seconds": 100.0}
        record |= {"images_per_second": 9.0}
        return runs.Run(name, None, [record | {"test_accuracy": accuracy, "test_accuracy_ema": accuracy}])

    written = speedrun_table.test_set_section([run("fast-seed0", 0.91), run("fast-seed1", 0.93), run("other", 0.5)])
    assert "**fast**, 2 seeds: mean 92.00%, standard deviation 1.41%, in 10.0 minutes of training each." in written
    assert "**other**" not in written


def _run(name, *evaluations):
    records = [
        {
            "kind": "epoch",
            "step": n,
            "epoch": n,
            "seconds": 60.0 * minutes,
            "test_accuracy": ema,
            "test_accuracy_ema": ema,
        }
        for n, (minutes, ema) in enumerate(evaluations, start=1)
    ]
    return runs.Run(name, None, records)


def test_the_frontier_has_the_runs_that_ended_better_than_all_before_them():
    made = [_run("late", (9, 0.8)), _run("worse", (7, 0.6)), _run("first", (1, 0.5), (5, 0.7)), _run("same", (8, 0.7))]
    assert [run.name for run in pictures.frontier(made)] == ["first", "late"]
    assert speedrun_table._best(made, 0.5) == [] and speedrun_table._best(made, 5) == [("first", 0.7)]


def test_pictures_of_runs_are_whole_and_leave_no_setting_behind(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    seeds = [_run("fast-seed0", (1, 0.5), (2, 0.7), (3, 0.8)), _run("fast-seed1", (1, 0.4), (2, 0.75))]
    for name, drawing in (("a", pictures.draw_attempts), ("b", pictures.draw_test_set)):
        drawing([*seeds, _run("other", (4, 0.9))], tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (1260, 900)
    assert dict(matplotlib.rcParams) == before


def test_the_kept_attempts_make_the_document():
    document = speedrun_table.DOCUMENT.read_text(encoding="utf-8")
    for section, (_, until), path in (
        (speedrun_table.test_set_section, speedrun_table.TEST_SET_SECTION, runs.TEST_SET),
        (speedrun_table.attempts_section, speedrun_table.ATTEMPTS_SECTION, runs.ATTEMPTS),
    ):
        assert f"\n\n{section(runs.load(path))}\n{until}\n" in document


def test_a_section_is_written_between_what_stands_around_it(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("# Title\n\n## Old\n\nwords\n\n### Old\n\n## Next\n\nkept\n", encoding="utf-8")
    write_section(document, "## Old", "## Old\n\nnew\n", "## Next")
    assert document.read_text(encoding="utf-8") == "# Title\n\n## Old\n\nnew\n\n## Next\n\nkept\n"
    write_section(document, "## Next", "## Next\n\nlast\n")
    write_section(document, "## More", "## More\n")
    assert document.read_text(encoding="utf-8") == "# Title\n\n## Old\n\nnew\n\n## Next\n\nlast\n\n## More\n"


def test_a_file_of_runs_gives_back_recipes_and_records(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert runs.load(path) == []
    recipes = [Recipe(), Recipe().with_settings(["model.blocks=[1, 2]", "train.seed=3", "comment=é"]), None]
    records = [
        {"kind": "start", "step": 0, "versions": {"torch": "2"}, "gpus": [], "data": {"name": "digits"}},
        {"kind": "epoch", "step": 3, "train_loss": 0.1 + 0.2, "test_loss": None},
    ]
    kept = [runs.Run(name, recipe, records) for name, recipe in zip("bca", recipes, strict=True)]
    made = [records[0] | {"data": {"name": "digits", "folder": "/home"}}, records[1]]  # the folder is not kept
    for run in kept:
        runs.add(runs.Run(run.name, run.recipe, made), path)
    assert runs.load(path) == sorted(kept, key=lambda run: run.name)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4  # the base and three runs
    runs.add(runs.Run("b", recipes[1], records[1:]), path)  # in place of the first
    assert [(run.name, len(run.records)) for run in runs.load(path)] == [("a", 2), ("b", 1), ("c", 2)]


@pytest.mark.parametrize("path", [runs.ATTEMPTS, runs.TEST_SET], ids=lambda path: path.stem)
def test_the_kept_runs_are_whole(path, tmp_path, capsys):
    kept = runs.load(path)
    assert [run.name for run in kept] == sorted({run.name for run in kept})
    for run in kept:
        assert all(isinstance(record["step"], int) and record["seconds"] > 0 for record in run.epochs)
        assert [record["epoch"] for record in run.epochs] == sorted({record["epoch"] for record in run.epochs})
        if run.recipe is None:
            continue
        assert run.records[0]["kind"] == "start" and run.epochs[-1]["epoch"] <= run.recipe.train.epochs
        speedrun_table.main(["--recipe", run.name])
        assert Recipe.from_toml(capsys.readouterr().out) == run.recipe
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    runs.add(kept[0], copy)
    assert copy.read_bytes() == path.read_bytes()  # it is as the next run that is added will leave it


def test_a_folder_without_a_run_is_not_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speedrun_table, "ATTEMPTS", tmp_path / "attempts.jsonl")
    for option in (["--add", str(tmp_path / "none")], ["--recipe", "none"]):
        with pytest.raises(SystemExit):
            speedrun_table.main(option)
    assert "at least one epoch; found none" in capsys.readouterr().err
    assert not (tmp_path / "attempts.jsonl").exists()


QUIET = """
import json, sys, time
with open("metrics.jsonl", "a") as file:
    print(json.dumps({"kind": "interval", "step": 1, "seconds": 50}), file=file)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_run_is_stopped_when_its_time_is_up_and_a_finished_one_is_not_run_again(tmp_path):
    """A stand-in for a run: it says that it has trained for 50 seconds, and waits to be stopped."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        assert speedrun.run([sys.executable, "-c", QUIET], tmp_path, seconds=40.0, poll=0.05, cwd=tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert speedrun.seconds_of(tmp_path) == 50
    fails = [sys.executable, "-c", "import sys; sys.exit(3)"]
    assert speedrun.run(fails, tmp_path, seconds=40.0, poll=0.05, cwd=tmp_path) == 0  # its time is up: not started
    assert speedrun.run(fails, tmp_path, seconds=60.0, poll=0.05, cwd=tmp_path) == 3


def test_the_speedruns_commands_are_those_of_the_entry_points(tmp_path):
    commands = speedrun.commands(tmp_path, "data", (0, 1))
    assert set(speedrun.BASELINES) < commands.keys()  # a misspelt one would never be stopped
    assert list(commands) == ["speedrun-seed0", "speedrun-seed1", "timm-resnetrs50", "report-4", "speedrun-94"]
    assert commands["speedrun-seed1"][1:] == [
        *("-m", "rsengine.train", "--data", "data", "--out", str(tmp_path / "speedrun-seed1")),
        *("--recipe", "speedrun", "--seed", "1"),
    ]
    labelled = speedrun.commands(tmp_path, None, [0], "amx")
    assert list(labelled) == ["speedrun-amx-seed0", "timm-resnetrs50-amx", "report-4-amx", "speedrun-94-amx"]
    assert all(name in command[4] for name, command in labelled.items())
    (tmp_path / "report-4").mkdir()
    (tmp_path / "report-4" / "checkpoint.pt").touch()
    assert speedrun.commands(tmp_path, None, ())["report-4"][3:] == ["--out", str(tmp_path / "report-4"), "--resume"]
