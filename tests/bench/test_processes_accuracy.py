"""Runs in one process beside runs in several: their commands, and their table, from made-up records."""

import pytest

from bench import processes_accuracy as bench
from bench.processes import ACCURACY
from rsengine.config import load_recipe
from rsengine.run.log import RunLog

START = {
    "kind": "start",
    "step": 0,
    "precision": "bf16",
    "threads": 2,
    "machine": {"processor": "A processor"},
    "versions": {"torch": "2"},
}


def record(folder, accuracy, epochs=bench.EPOCHS):
    """A run that has done some epochs, or all."""
    log = RunLog(folder)
    log.append(START)
    found = {"kind": "epoch", "epoch": epochs, "step": 1, "test_accuracy": 0.1, "test_accuracy_ema": accuracy}
    log.append(found | {"images_per_second": 250.0})  # the only epoch that is evaluated
    recipe = load_recipe("quickstart").with_settings(["train.epochs=3", "train.limit_train_batches=97"])
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")


def test_every_seed_is_run_in_one_process_and_in_several(tmp_path):
    commands = bench.runs(tmp_path, "data", [4, 5], 2, 97)
    assert [folder.name for folder in commands] == [f"processes{n}-seed{seed}" for seed in (4, 5) for n in (1, 2)]
    one, several = list(commands.values())[:2]
    assert "--processes=2" in several and [word for word in several if word != "--processes=2"] == [
        word.replace("processes1", "processes2") for word in one
    ]
    assert {"--seed=4", "--epochs=3", "--limit-train-batches=97"} <= set(one)
    # What goes on with a run keeps its processes.
    assert bench.resumed(several)[-2:] == ["--processes=2", "--resume"]


def test_the_table_has_the_runs_that_are_done(tmp_path):
    assert bench.table(tmp_path, [0, 1], 2) == ""
    for seed, accuracy in ((0, 0.5), (1, 0.52)):
        record(bench.run_folder(tmp_path, 1, seed), accuracy)
    record(bench.run_folder(tmp_path, 2, 0), 0.515)
    record(bench.run_folder(tmp_path, 2, 1), 0.9, epochs=2)
    written = bench.table(tmp_path, [0, 1], 2)
    assert "| 1 | 51.00 ± 1.00 | 50.00, 52.00 | 250 |" in written
    assert "| 2 | 51.50 | 51.50 | 250 |" in written
    assert "A processor, bf16, 2 threads; torch 2. Several processes share the threads." in written
    assert "Recipe `quickstart`: 3 epochs of 97 batches of 256; batch norm `local`." in written


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(bench, "called", lambda name, command: called.append((name, command)) or 0)
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 2)
    record(bench.run_folder(tmp_path, 1, 3), 0.5)
    begun = bench.run_folder(tmp_path, 2, 3)
    begun.mkdir()
    (begun / "checkpoint.pt").touch()
    results = tmp_path / "results.md"
    words = ["--data", "data", "--out", str(tmp_path), "--seeds", "3", "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["", *words])
    assert bench.main() == 0
    assert [name for name, _ in called] == [begun.name] and called[0][1][-1] == "--resume"
    assert ACCURACY in results.read_text()
    monkeypatch.setattr(bench, "called", lambda name, command: 2)
    assert bench.main() == 2


def test_one_core_has_nothing_to_share(monkeypatch, capsys):
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("sys.argv", ["", "--data", "data"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "one core, or one thread" in capsys.readouterr().err
