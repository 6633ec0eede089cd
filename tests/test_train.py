"""Whole runs on a toy data set: records, stopping, resuming bit for bit, and every refusal."""

import dataclasses
import datetime
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsengine import evaluate as evaluate_module
from rsengine import predict as predict_module
from rsengine import train as train_module
from rsengine import trainer as trainer_module
from rsengine import training as training_module
from rsengine.config import Recipe
from rsengine.data.beton.reader import BetonReader
from rsengine.engine import graph as graph_module
from rsengine.engine.graph import CapturedStep
from rsengine.engine.step import TrainStep
from rsengine.input import batches as batches_module
from rsengine.input.transfer import Feeder, TensorBuffers
from rsengine.model import ResNetRS
from rsengine.model.preprocess import Preprocess
from rsengine.predict import predict
from rsengine.run import folder as folder_module
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.log import RunLog
from rsengine.run.weights import load_weights
from rsengine.trainer import Trainer
from tests.engine.graph_simulator import ReplayRecorder

RECIPE = """
name = "toy"
[model]
blocks = [1, 1]
width_multiplier = 0.25
stem_width = 8
drop_path = 0.1
[schedule]
name = "one_cycle"
learning_rate = 0.2
[ema]
decay = 0.9
[augment]
cutout_holes = 1
[train]
epochs = 3
batch_size = 16
eval_batch_size = 10
log_interval = 4
"""


@pytest.fixture
def toy(tmp_path, toy_dataset, monkeypatch):
    """Runs the command on the toy data in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(RECIPE)

    def run(*arguments, out="run", data=True):
        options = ["--recipe", "toy.toml", "--device", "cpu", "--out", out]
        return train_module.main([*options, *(["--data", str(toy_dataset.folder)] if data else []), *arguments])

    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, toy_dataset):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe, out = folder / "toy.toml", folder / "run"
    recipe.write_text(RECIPE)
    options = ["--recipe", recipe, "--data", toy_dataset.folder, "--device", "cpu", "--out", out]
    assert train_module.main([str(option) for option in options]) == 0
    return out


def state_of(folder):
    return load_checkpoint(Path(folder) / "checkpoint.pt")


def assert_same_tensors(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tensors(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tensors(x, y, f"{path}[{i}]")


def test_a_run_learns_and_leaves_every_record(toy, capsys, toy_dataset):
    assert toy() == 0
    output = capsys.readouterr().out
    assert "test accuracy" in output and "Report: run/report.html" in output and " thread" in output
    names = {path.name for path in Path("run").iterdir()}
    assert names == {
        "recipe.toml", "metrics.jsonl", "checkpoint.pt", "best.pt", "weights.safetensors",
        "curves.png", "augmented.png", "confusion.png", "report.md", "report.html",
    }  # fmt: skip
    assert Recipe.from_toml(Path("run/recipe.toml").read_text()) == Recipe.from_toml(RECIPE)
    log = RunLog(Path("run"))
    epochs, (start,) = log.records("epoch"), log.records("start")
    assert [e["epoch"] for e in epochs] == [1, 2, 3] and [e["step"] for e in epochs] == [9, 18, 27]
    assert epochs[-1]["test_accuracy_ema"] > 0.8  # three colours, chance is 0.33
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert all(e["images_per_second"] > 0 and e["seconds"] > 0 for e in epochs)
    assert [r["step"] for r in log.records("interval")] == [4, 8, 9, 13, 17, 18, 22, 26, 27]
    for record in log.records("interval"):
        images = 16 * (4 if record["step"] % 9 in (4, 8) else 1)
        assert 0 < record["loader_seconds"] < images / record["images_per_second"]
        assert (record["checkpoint_seconds"] > 0) == (record["step"] in (13, 22))  # after that of an epoch
    assert start["data"]["test_images"] == epochs[-1]["test_images"] == 21 and start["data"]["train_images"] == 150
    assert start["data"]["name"] == toy_dataset.name and len(start["data"]["identity"]) == 64
    assert start["time_to_first_step"] > 0 and start["precision"] in ("bf16", "fp32") and not start["resumed"]
    report = Path("run/report.md").read_text()
    assert f"{epochs[-1]['test_accuracy_ema']:.2%}".rstrip("%") in report and "curves.png" in report
    page = Path("run/report.html").read_text()
    parts = {"mistakes", "calibration", "confusion", "augmentation", "time"}
    assert parts <= set(re.findall(r'<section id="(\w+)">', page)) and "waiting for the loader" in page
    best = max(epochs, key=lambda e: e["test_accuracy_ema"])
    assert load_checkpoint(Path("run/best.pt"))["epoch"] == best["epoch"]
    # The saved weights are the EMA, and the evaluate command gets the same accuracy from them.
    weights, state = load_weights("run"), state_of("run")
    assert torch.equal(weights.model.fc.weight, state["step"]["ema"]["fc.weight"])
    assert not torch.equal(weights.model.fc.weight, state["step"]["model"]["fc.weight"])
    assert evaluate_module.main(["run", "--data", str(toy_dataset.folder), "--device", "cpu"]) == 0
    assert f"accuracy {epochs[-1]['test_accuracy_ema']:.2%}" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_costs_nothing_else(toy, capsys, monkeypatch):
    def failing(*arguments, **options):
        raise KeyError("a fault of the page")

    monkeypatch.setattr("rsengine.run.records.write_page", failing)
    assert toy("--epochs", "1") == 0
    output = capsys.readouterr().out
    assert "run/report.html: not written (KeyError: 'a fault of the page'); all else is saved" in output
    assert "test accuracy" in output and Path("run/report.md").exists() and Path("run/weights.safetensors").exists()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(toy):
    assert toy("--epochs", "1", out="a") == toy("--epochs", "1", out="b") == 0
    assert toy("--epochs", "1", "--seed", "1", out="c") == 0
    assert_same_tensors(state_of("a")["step"], state_of("b")["step"])
    assert not torch.equal(state_of("a")["step"]["ema"]["fc.weight"], state_of("c")["step"]["ema"]["fc.weight"])


@pytest.mark.parametrize("stop_at", [5, 9, 13], ids=["in the first epoch", "at its end", "in the second epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(toy, whole_run, monkeypatch, capsys, stop_at):
    plain = Trainer.__init__

    def stopping(self, *arguments, **options):
        plain(self, *arguments, **options)
        step = self.step.__call__

        def counted(images, labels):
            step(images, labels)
            if int(self.step.counter) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        class Counted(type(self.step)):
            __call__ = staticmethod(counted)

        self.step.__class__ = Counted

    evaluations, write_records = [], training_module.write_records

    def evaluated(self):
        evaluations.append(self.steps_done)
        return plain_evaluate(self)

    def written(*arguments, **options):
        print("records are written")
        write_records(*arguments, **options)

    plain_evaluate = Trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", stopping)
        patch.setattr(Trainer, "evaluate", evaluated)
        patch.setattr(training_module, "write_records", written)
        assert toy(out="parts") == 130
    output = capsys.readouterr().out
    assert f"stopped after step {stop_at} of 27" in output
    assert output.index("Go on with: ") < output.index("records are written")
    assert evaluations == [9] * (stop_at > 9)  # who stops a run does not wait for an evaluation
    assert re.search(r"Go on with: python -m rsengine.train --resume --out parts --data \S+", output)
    assert "Unfinished run" in Path("parts/report.md").read_text()
    assert toy("--resume", out="parts") == 0
    whole, parts = state_of(whole_run), state_of("parts")
    assert_same_tensors(whole["step"], parts["step"])
    assert torch.equal(whole["rng"]["cpu"], parts["rng"]["cpu"])
    logs = [RunLog(Path(folder)).records("epoch") for folder in (whole_run, "parts")]
    for a, b in zip(*logs, strict=True):
        for key in ("epoch", "step", "train_accuracy", "test_loss_ema", "test_accuracy", "learning_rate"):
            assert a[key] == b[key], key
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-12)
    assert [s["resumed"] for s in RunLog(Path("parts")).records("start")] == [False, True]


def command(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "rsengine.train", "--device", "cpu", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, words, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and words in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_sigterm_saves_and_exits_143_and_kill_9_loses_only_the_epoch_under_way(toy, tmp_path, toy_dataset):
    long = ["--recipe", "toy.toml", "--data", toy_dataset.folder, "--epochs", 400, "--out", "long"]
    process = command(tmp_path, *long)
    metrics = tmp_path / "long" / "metrics.jsonl"
    wait_for(metrics, '"kind": "epoch"', process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Go on with: python -m rsengine.train --resume --out long" in output
    stopped = state_of(tmp_path / "long")
    done = 9 * stopped["epoch"] + stopped["batch"]
    assert int(stopped["step"]["counter"]) == done == RunLog(tmp_path / "long").records()[-1]["step"]

    process = command(tmp_path, "--resume", *long[2:4], "--out", "long")
    wait_for(metrics, f'"epoch": {stopped["epoch"] + 2}, "step"', process)
    process.kill()
    process.communicate(timeout=120)
    after = state_of(tmp_path / "long")
    assert after["epoch"] >= stopped["epoch"] + 1  # the epoch before the kill at least


@pytest.mark.parametrize(("what", "after"), [("the loss", 12), ("a weight", 18)], ids=["loss", "weight"])
def test_a_diverging_run_stops_with_the_step_the_rate_and_the_last_good_checkpoint(
    toy, capsys, monkeypatch, what, after
):
    plain = TrainStep.__call__

    def poisoned(self, images, labels):
        plain(self, images, labels)
        if int(self.counter) == after:  # 18: the last of the second epoch, so that no loss shows it
            with torch.no_grad():
                self.model.fc.weight.fill_(float("nan"))

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    assert toy() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    bad = {12: 12, 18: 17}[after]
    assert re.search(rf"error: {what} is no longer a finite number at step {bad} \(learning rate 0\.[\d]+\)", error)
    assert "the last good checkpoint is run/checkpoint.pt" in error
    state = state_of("run")
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["step"]["model"].values())


def test_prediction_preprocesses_as_training_does(toy, toy_dataset, capsys):
    """The report predicted from pixels that were never normalised."""
    assert toy() == 0
    reader = BetonReader(toy_dataset.test_beton)
    images = np.stack([reader.image(i) for i in range(len(reader))])
    weights = load_weights("run")
    probabilities = predict(weights, images)
    assert torch.allclose(probabilities.sum(1), torch.ones(21))
    x = Preprocess(toy_dataset.mean, toy_dataset.std)(torch.from_numpy(images))
    torch.testing.assert_close(probabilities, weights.model(x).softmax(1).detach(), rtol=1e-5, atol=1e-6)
    assert (probabilities.argmax(1).numpy() == reader.labels).mean() > 0.8
    Image.fromarray(images[20].repeat(3, 0).repeat(3, 1)).save("big.png")
    capsys.readouterr()
    assert predict_module.main(["run", "big.png", "--device", "cpu"]) == 0
    assert re.search(r"^big.png: stripes \d", capsys.readouterr().out, re.MULTILINE)
    assert predict_module.main(["run", "none.png"]) == 2
    assert "none.png" in capsys.readouterr().err


REFUSALS = [
    (["--recipe", "quikstart"], "did you mean quickstart?"),
    (["--set", "train.epochz=3"], "did you mean train.epochs?"),
    (["--set", "schedule.warmup_epochs=3"], "warmup_epochs: expected fewer than the run's 3 epochs"),
    (["--set", "train.batch_size=200"], "150 images cannot fill one batch of 200; add --set train.batch_size=128"),
    (
        ["--set", "train.loader=resident", "--set", "train.batch_size=200"],
        "150 images cannot fill 1 batch of 200; add --set train.batch_size=128",
    ),
    (["--resume", "--out", "nowhere"], "no checkpoint there; start the run without --resume"),
    (["--data", "nowhere"], "nowhere"),
    (["--epochs", "1", "--set", "train.epochs=2"], "--epochs 1: --set train.epochs=2 says otherwise; give one of them"),
    (["--seed", "1", "--set", "train.seed=2"], "--seed 1: --set train.seed=2 says otherwise"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_bad_input_is_one_line_and_exit_2(toy, capsys, arguments, words):
    assert toy(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_the_command_that_resumes_a_run_is_one_for_the_shell():
    request = training_module.Request(data="my data; x", track=["tensorboard"], graph=False)
    words = ["--resume", "--out", "runs/it's", "--data", "my data; x", "--no-graph", "--track=tensorboard"]
    line = training_module.resume_command(request, Path("runs/it's"))
    assert shlex.split(line) == ["python", "-m", "rsengine.train", *words]


def test_one_epoch_of_one_step_is_no_plural(toy, capsys):
    assert toy("--epochs", "1", "--limit-train-batches", "1") == 0
    out = capsys.readouterr().out
    assert "run: toy, 1 epoch of 1 step, into run" in out and "after 1 epoch, " in out


def test_a_run_is_not_overwritten_and_its_recipe_and_data_cannot_change(toy, capsys, tmp_path, monkeypatch):
    assert toy("--epochs", "1") == 0
    assert toy("--epochs", "1") == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert toy("--epochs", "2", "--resume") == 2
    assert "train.epochs: 2 against 1" in capsys.readouterr().err
    rng = np.random.default_rng(9)
    for name in ("a", "b", "c"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / "other" / name / f"{i}.png"
            )
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    assert toy("--epochs", "1", "--resume", "--data", str(tmp_path / "other")) == 2
    assert "the run was on other data" in capsys.readouterr().err


def test_without_its_checkpoint_a_run_is_not_overwritten_either(toy, capsys):
    assert toy() == 0
    checkpoint, best, weights = (Path("run", name) for name in ("checkpoint.pt", "best.pt", "weights.safetensors"))
    kept = best.read_bytes(), weights.read_bytes(), Path("run", "metrics.jsonl").read_bytes()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    for _ in range(2):  # damaged, then removed
        assert toy("--resume") == 2
        assert "copy best.pt over it to go on from the best epoch" in capsys.readouterr().err
        checkpoint.unlink(missing_ok=True)
        assert toy() == 2
        assert "holds the best.pt of an earlier run; name another folder" in capsys.readouterr().err
    assert kept == (best.read_bytes(), weights.read_bytes(), Path("run", "metrics.jsonl").read_bytes())
    shutil.copy(best, checkpoint)
    assert toy("--resume") == 0  # as the message says


def test_a_finished_run_resumed_says_its_result_again(toy, capsys):
    assert toy("--epochs", "1") == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert toy("--epochs", "1", "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == first


def test_images_of_several_sizes_are_refused_with_the_remedy(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / "sizes" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20 + i, 30), (i, 2, 3)).save(tmp_path / "sizes" / name / f"{i}.png")
    assert toy("--data", str(tmp_path / "sizes")) == 2
    assert "differ in size; convert them again with --size N" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(toy):
    Path("run").mkdir()
    RunLog(Path("run")).append({"kind": "start", "step": 0})
    assert toy("--epochs", "1") == 0
    assert len(RunLog(Path("run")).records("start")) == 1


def test_a_refused_run_leaves_no_folder(toy):
    assert toy("--set", "train.batch_size=200") == 2
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/nowhere/g++", "there is no C++ compiler /nowhere/g++; install one, name one in CXX, or leave out --compile"),
        ("sh -c 'echo fatal error: no headers >&2; exit 1'", "does not work (fatal error: no headers); mend it"),
        ("false", "the C++ compiler false does not work (silent)"),
        (os.devnull, f"the C++ compiler {os.devnull} does not work ("),
    ],
    ids=["none", "one that fails", "one that says nothing", "no program"],
)
def test_without_a_compiler_nothing_is_begun(toy, capsys, monkeypatch, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    assert toy("--compile") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --compile: ") and words in error and error.count("\n") == 1
    assert not Path("run").exists()


def test_what_the_compiler_of_pytorch_cannot_do_is_one_line(toy, capsys, monkeypatch):
    def broken(_module, _inputs):
        raise ImportError("no such header\nand a hundred lines")

    monkeypatch.setattr(graph_module, "compile_forward", lambda model: model.compile(backend=broken, dynamic=False))
    assert toy("--epochs", "1", "--compile") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: --compile: PyTorch cannot compile the network here .*; leave out --compile", error)


def test_ctrl_c_that_ends_the_compiler_too_is_no_error_of_it(toy, capsys, monkeypatch):
    def interrupted(_module, _inputs):
        signal.raise_signal(signal.SIGINT)
        raise ImportError("the compiler was ended by signal 2")

    monkeypatch.setattr(
        graph_module, "compile_forward", lambda model: model.compile(backend=interrupted, dynamic=False)
    )
    assert toy("--epochs", "1", "--compile") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_a_disk_that_fills_up_ends_a_run_in_one_line(toy, toy_dataset, capsys, monkeypatch):
    assert toy("--epochs", "1", "--set", "train.limit_train_batches=2", out="whole") == 0
    plain, calls = os.fsync, []

    def filling(descriptor):
        calls.append(descriptor)
        if len(calls) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", filling)
    for limit in (0, 2, 4, 6):
        calls.clear()
        capsys.readouterr()
        assert toy("--epochs", "1", "--set", "train.limit_train_batches=2", out=f"full{limit}") == 2
        error = capsys.readouterr().err
        assert re.match(
            rf"error: full{limit}[/\w.]*: cannot be written \(No space left on device\): the disk is full", error
        )
        assert error.count("\n") == 1 and not list(Path(f"full{limit}").glob(".*"))


def test_a_power_cut_in_the_log_is_repaired_and_other_damage_named_at_resume(toy, capsys):
    assert toy("--epochs", "1") == 0
    metrics = Path("run/metrics.jsonl")
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b"\0" * 4096)
    assert toy("--epochs", "1", "--resume") == 0 and metrics.read_bytes() == whole
    capsys.readouterr()
    metrics.write_bytes(b"\0" * 100 + b"\n" + whole)
    assert toy("--epochs", "1", "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run/metrics.jsonl, line 1: not valid JSON") and error.count("\n") == 1
    metrics.write_bytes(b'{"kind": "epoch", "step": 3}\n' + whole)
    assert toy("--epochs", "1", "--resume") == 2
    assert "run/metrics.jsonl, line 1: epoch: missing" in capsys.readouterr().err


def test_two_runs_into_one_folder_at_once_do_not_mix(toy, capsys):
    holding = "import sys; from pathlib import Path; from rsengine.run.folder import locked\n"
    holding += "with locked(Path('run'), print): print('held', flush=True); sys.stdin.read()"
    Path("run").mkdir()
    for options in ([], ["--resume"]):
        with subprocess.Popen([sys.executable, "-c", holding], stdin=-1, stdout=-1, text=True) as other:
            assert other.stdout.readline() == "held\n"
            before = {path: path.read_bytes() for path in Path("run").iterdir()}
            assert toy("--epochs", "1", *options) == 2
            error = capsys.readouterr().err
            assert f"run: process {other.pid} on " in error and "is writing this run" in error
            assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
            other.communicate("")
        assert toy("--epochs", "1", *options) == 0
        assert not Path("run/.lock").exists()


def test_runs_begun_in_one_second_each_have_a_folder(toy, toy_dataset, monkeypatch):
    class Noon(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 12)

    monkeypatch.setattr(folder_module.datetime, "datetime", Noon)
    options = ["--recipe", "toy.toml", "--data", str(toy_dataset.folder), "--device", "cpu", "--epochs", "1"]
    options += ["--limit-train-batches", "2"]
    assert train_module.main(options) == train_module.main(options) == 0
    found = sorted(Path("runs").iterdir())
    assert [path.name for path in found] == ["toy-20300102-120000", "toy-20300102-120000-2"]
    assert all(len(RunLog(path).records("start")) == 1 for path in found)


def test_resume_looks_for_the_runs_that_the_same_command_makes(toy, toy_dataset, monkeypatch, capsys):
    """Digits are trained by a recipe of their own when none is named."""
    digits = dataclasses.replace(toy_dataset, name="digits")
    monkeypatch.setattr(training_module, "find_dataset", lambda *_, **__: digits)
    options = ["--device", "cpu", "--data", "digits", "--set", "model.blocks=[1]", "--set", "train.batch_size=16"]
    options += ["--epochs", "1", "--limit-train-batches", "2"]
    assert train_module.main(options) == 0
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("digits-")
    assert train_module.main([*options, "--resume"]) == 0
    assert f"into {made}" in capsys.readouterr().out
    # Another recipe whose name begins alike is not taken, nor the only run there is.
    assert train_module.main([*options, "--resume", "--recipe", "quickstart"]) == 2
    assert "no run of recipe quickstart with a checkpoint under runs/" in capsys.readouterr().err


class ImmediateLanes:
    """:class:`rsengine.input.transfer.Lanes` of a device that does everything at once."""

    def __init__(self, *shape):
        self.shape = shape

    def new_event(self):
        return None

    def new_buffers(self):
        return TensorBuffers(*self.shape, torch.device("cpu"), pinned=False)

    def record(self, event, lane):
        pass

    def wait(self, event, lane):
        pass

    def wait_on_host(self, event):
        pass

    def upload(self, buffers):
        buffers.upload()


@pytest.fixture
def graphs_on_the_cpu(monkeypatch, eager_ops):
    """A run takes the path it takes on a GPU, through the feeder and captured steps; gives what was captured."""
    captured = []

    class Recorder(ReplayRecorder):
        def __init__(self, device):
            super().__init__()

        def record(self, program):
            captured.append(program)
            return super().record(program)

    monkeypatch.setattr(trainer_module, "uses_graph", lambda execution, graph=True: graph)
    monkeypatch.setattr(graph_module, "uses_graph", lambda execution, graph=True: graph)
    monkeypatch.setattr(trainer_module, "CudaRecorder", Recorder)
    monkeypatch.setattr(batches_module, "feeder_for", lambda device, size, shape: Feeder(ImmediateLanes(size, shape)))
    return captured


@pytest.mark.parametrize(
    ("loader", "scale"),
    [("auto", 1.0), ("resident", 1.0), ("auto", 0.5)],
    ids=["streamed", "resident", "growing images"],
)
def test_a_captured_run_stopped_and_resumed_equals_a_plain_one_bit_for_bit(
    toy, monkeypatch, capsys, graphs_on_the_cpu, loader, scale
):
    growing = ["--set", f"train.start_scale={scale}"]  # 16, 24, then 32 pixels a side
    assert toy(*growing, "--no-graph", out="plain") == 0 and not graphs_on_the_cpu
    plain = CapturedStep.__call__

    def stopping(self, *inputs):
        plain(self, *inputs)
        if isinstance(self.step, TrainStep) and int(self.step.counter) == 13:
            os.kill(os.getpid(), signal.SIGINT)

    settings = [*growing, "--set", f"train.loader={loader}"]
    with monkeypatch.context() as patch:
        patch.setattr(CapturedStep, "__call__", stopping)
        assert toy(*settings, out="captured") == 130
    graphs = 2 + (scale < 1)  # the step, the evaluation, and the step for images of another size
    assert len(graphs_on_the_cpu) == graphs
    assert "each step one CUDA-graph replay" in capsys.readouterr().out
    assert toy(*settings, "--resume", out="captured") == 0
    assert len(graphs_on_the_cpu) == 2 * graphs
    a, b = state_of("plain"), state_of("captured")
    assert_same_tensors(a["step"], b["step"])
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    for x, y in zip(*(RunLog(Path(out)).records("epoch") for out in ("plain", "captured")), strict=True):
        assert [x[k] for k in ("step", "test_loss", "test_loss_ema")] == [
            y[k] for k in ("step", "test_loss", "test_loss_ema")
        ]
    assert [r["graph"] for r in RunLog(Path("captured")).records("start")] == [True, True]


def test_evaluation_every_other_epoch_changes_nothing_but_the_records(toy, whole_run, monkeypatch):
    plain = Trainer.save

    def stopping(self):
        plain(self)
        if self.steps_done == 9:
            os.kill(os.getpid(), signal.SIGINT)

    every = ["--set", "train.evaluate_every=2"]
    with monkeypatch.context() as patch:  # stopped after an epoch that has no evaluation
        patch.setattr(Trainer, "save", stopping)
        assert toy(*every, out="other") == 130
    assert not RunLog(Path("other")).records("epoch")
    assert toy(*every, "--resume", out="other") == 0
    assert_same_tensors(state_of(whole_run)["step"], state_of("other")["step"])
    each, other = (RunLog(Path(out)).records("epoch") for out in (whole_run, "other"))
    assert [record["epoch"] for record in other] == [2, 3]  # the last one is always measured
    assert [record["test_loss_ema"] for record in other] == [each[1]["test_loss_ema"], each[2]["test_loss_ema"]]
    assert other[0]["train_loss"] == pytest.approx((each[0]["train_loss"] + each[1]["train_loss"]) / 2, rel=1e-9)
    assert other[1]["train_loss"] == pytest.approx(each[2]["train_loss"], rel=1e-9)
    assert Path("other/report.md").exists() and Path("other/curves.png").exists()


def test_images_grow_over_the_run(toy, monkeypatch):
    seen = []
    plain = ResNetRS.forward

    def watched(self, x):
        if x.device.type == "cpu":  # not those of the summary
            seen.append((self.training, tuple(x.shape[2:])))
        return plain(self, x)

    monkeypatch.setattr(ResNetRS, "forward", watched)
    assert toy("--set", "train.start_scale=0.5") == 0
    assert [size for training, size in seen if training] == [(s, s) for s in (16, 24, 32) for _ in range(9)]
    assert {size for training, size in seen if not training} == {(32, 32)}


def test_a_resident_run_equals_a_streamed_one(toy):
    assert toy("--epochs", "1", out="streamed") == 0
    assert toy("--epochs", "1", "--set", "train.loader=resident", out="resident") == 0
    assert_same_tensors(state_of("streamed")["step"], state_of("resident")["step"])


def test_a_resident_run_imports_ffcv_for_nothing_before_its_first_step():
    code = "import sys, rsengine.train; assert not {'ffcv', 'numba', 'matplotlib', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiling_changes_how_the_network_is_trained_and_nothing_that_is_saved(toy, capsys, monkeypatch):
    compiled = []

    def stand_in(model):  # Inductor takes a minute
        compiled.append(model)
        model.compile(backend="eager", dynamic=False)

    assert toy("--epochs", "1", out="plain") == 0
    assert "plain steps (CUDA graphs need a GPU)" in capsys.readouterr().out
    monkeypatch.setattr(graph_module, "compile_forward", stand_in)
    assert toy("--epochs", "1", "--compile", out="compiled") == 0
    assert "plain steps (CUDA graphs need a GPU), forward and backward pass compiled" in capsys.readouterr().out
    assert len(compiled) == 1 and RunLog(Path("compiled")).records("start")[0]["compiled"]
    assert state_of("plain")["step"]["model"].keys() == state_of("compiled")["step"]["model"].keys()
    counts = [RunLog(Path(out)).records("epoch")[0]["train_accuracy"] for out in ("plain", "compiled")]
    assert counts[0] == pytest.approx(counts[1], abs=0.05)


def test_metrics_are_plain_json(toy):
    assert toy("--epochs", "1") == 0
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
