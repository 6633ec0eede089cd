"""A run goes on wherever and however often it is resumed, and ends as if it had never stopped."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from rsengine import train as train_module
from rsengine import trainer as trainer_module
from rsengine import training
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.weights import load_weights
from tests.test_train import RECIPE

TIMES = {"seconds", "epoch_seconds", "eval_seconds", "images_per_second", "loader_seconds", "checkpoint_seconds"}
EPOCHS, STEPS = 3, 4


@pytest.fixture(scope="module")
def options(tmp_path_factory, toy_dataset):
    path = tmp_path_factory.mktemp("recipe") / "toy.toml"
    path.write_text(RECIPE)
    options = ["--recipe", path, "--data", toy_dataset.folder, "--device", "cpu", "--epochs", EPOCHS]
    options += ["--limit-train-batches", STEPS, "--set", "train.log_interval=1"]
    return [str(each) for each in options]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_module.main([*options, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def train(options, monkeypatch):
    """Runs the command; ``stop_after`` steps of it, SIGTERM stops it as a user would."""

    def run(out, *arguments, stop_after=None):
        plain, done = trainer_module.choose_step, []

        def choose(*args, **kwargs):
            step = plain(*args, **kwargs)

            def counted(*batch):
                step(*batch)
                done.append(1)
                if len(done) == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "choose_step", choose)
            if stop_after:  # pictures and reports of these take most of the time, and are made anew
                patch.setattr(training, "write_records", lambda *args, **kwargs: None)
            return train_module.main([*options, "--out", str(out), *arguments])

    return run


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "start"]
    return [{key: line[key] for key in line.keys() - TIMES} for line in lines]


def assert_same(a, b):
    """Two run folders hold the same bits, apart from times."""
    assert records(a) == records(b)
    states = [load_checkpoint(folder / "checkpoint.pt") for folder in (a, b)]
    for state in states:
        del state["seconds"], state["totals"]["epoch_seconds"]
    left, right = (torch.utils._pytree.tree_flatten(state) for state in states)
    assert left[1] == right[1]
    for x, y in zip(left[0], right[0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    weights = [load_weights(folder).model.state_dict() for folder in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ten_resumes_in_a_row_end_as_the_whole_run(train, whole, tmp_path):
    assert train(tmp_path / "run", stop_after=1) == 143
    for _ in range(10):
        assert train(tmp_path / "run", "--resume", stop_after=1) == 143
    assert train(tmp_path / "run", "--resume") == 0  # the twelfth step of twelve
    assert_same(whole, tmp_path / "run")
    starts = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == EPOCHS * STEPS and not [path for path in (tmp_path / "run").glob(".*")]


def test_a_run_folder_that_was_moved_goes_on_there(train, whole, tmp_path):
    assert train(tmp_path / "before", stop_after=5) == 143
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "before").rename(tmp_path / "elsewhere" / "after")
    assert train(tmp_path / "elsewhere" / "after", "--resume") == 0
    assert_same(whole, tmp_path / "elsewhere" / "after")
    assert not (tmp_path / "before").exists()


def test_a_run_goes_on_from_another_working_directory(train, whole, tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert train("run", stop_after=5) == 143
    monkeypatch.chdir(tmp_path / "two")
    assert train(Path("..", "one", "run"), "--resume") == 0
    assert_same(whole, tmp_path / "one" / "run")
    assert list((tmp_path / "two").iterdir()) == [] and f"Report: {Path('..', 'one', 'run')}" in capsys.readouterr().out


def test_another_number_of_threads_is_said(options, train, tmp_path, capsys):
    assert train(tmp_path / "run", stop_after=5) == 143
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert train(tmp_path / "run", "--resume", stop_after=1) == 143
    finally:
        torch.set_num_threads(threads)
    said = [line for line in capsys.readouterr().out.splitlines() if "not bit for bit" in line]
    change = f"threads {threads}, now {threads + 1}"
    assert said == [f"resumed otherwise than before ({change}): the run goes on, not bit for bit as without a stop"]
