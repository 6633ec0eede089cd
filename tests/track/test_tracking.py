"""Trackers: what each holds of a run, read back with its own reader; and what fails in one ends nothing but it."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from rsengine import track as track_module
from rsengine import train as train_module
from rsengine.config import Recipe
from rsengine.errors import SettingsError
from rsengine.run.log import RunLog
from rsengine.track import TRACKERS, TrackedRun, check_trackers
from rsengine.trainer import DivergedError, Trainer
from tests.test_train import RECIPE


@pytest.fixture
def toy(tmp_path, toy_dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(RECIPE)

    def run(*arguments, out="run"):
        options = ["--recipe", "toy.toml", "--device", "cpu", "--out", out, "--data", str(toy_dataset.folder)]
        return train_module.main([*options, *arguments])

    return run


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class Recorded:
    """A tracker that keeps what it is given, and fails where it is told to."""

    def __init__(self, fails=""):
        self.fails, self.calls, self.pixels = fails, [], {}

    def _call(self, name, *what):
        self.calls.append((name, *what))
        if name == self.fails:
            raise RuntimeError("the server is\ngone")

    def begin(self, run):
        self._call("begin", run)

    def scalars(self, values, step):
        self._call("scalars", values, step)

    def picture(self, name, path, step):
        self.pixels[name] = path.read_bytes()
        self._call("picture", name, step)

    def finish(self, result, completed):
        self._call("finish", result, completed)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a recorded tracker in the place of tensorboard."""

    def place(tracker):
        module = types.SimpleNamespace(make=lambda: tracker)
        monkeypatch.setitem(sys.modules, "rsengine.track.tensorboard_tracker", module)
        monkeypatch.setattr(track_module, "find_spec", lambda _name: object())
        return tracker

    return place


def test_a_tracker_is_given_what_the_run_logs(toy, stand_in):
    tracker = stand_in(Recorded())
    assert toy("--track", "tensorboard") == 0
    (_, run), *_ = tracker.calls
    assert run == TrackedRun(Path("run"), run.settings) and run.name == "run"
    settings = Recipe.from_toml(RECIPE).flat() | {"data": "source"}  # trackers hold no lists
    texts = {key: str(settings[key]) for key in ("model.blocks", "schedule.milestones")}
    assert run.settings == settings | texts
    log = RunLog(Path("run"))
    given = [(values, step) for name, *rest in tracker.calls if name == "scalars" for values, step in [rest]]
    losses = {step: values["train/loss"] for values, step in given if "train/loss" in values}
    assert losses == {record["step"]: record["train_loss"] for record in log.records("interval")}
    tests = [(values["test/accuracy_ema"], values["epoch"]) for values, _ in given if "test/accuracy_ema" in values]
    assert tests == [(record["test_accuracy_ema"], record["epoch"]) for record in log.records("epoch")]
    assert tracker.pixels["augmented"] == Path("run/augmented.png").read_bytes()
    name, result, completed = tracker.calls[-1]
    assert name == "finish" and completed
    assert result["result/test_accuracy"] == log.records("epoch")[-1]["test_accuracy_ema"]


@pytest.mark.parametrize("method", ["begin", "scalars", "picture", "finish"])
def test_a_tracker_that_fails_is_left_out_in_one_line(toy, stand_in, capsys, method):
    tracker = stand_in(Recorded(fails=method))
    assert toy("--track", "tensorboard", "--epochs", "1") == 0
    output = capsys.readouterr()
    line = "track: tensorboard failed (RuntimeError: the server is gone); the run goes on without it"
    assert output.out.splitlines().count(line) == 1 and "test accuracy" in output.out and not output.err
    assert [name for name, *_ in tracker.calls].count(method) == 1 and tracker.calls[-1][0] == method


def test_a_run_that_fails_ends_its_trackers(toy, stand_in, monkeypatch):
    def diverged(self):
        raise DivergedError("the loss is no longer a finite number")

    monkeypatch.setattr(Trainer, "run", diverged)
    tracker = stand_in(Recorded())
    assert toy("--track", "tensorboard") == 1
    assert [call for call in tracker.calls if call[0] != "begin"] == [("finish", {}, False)]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(monkeypatch, name):
    monkeypatch.setattr(track_module, "find_spec", lambda _name: None)
    with pytest.raises(SettingsError, match=rf"pip install 'rsengine\[{name}\]'"):
        check_trackers([name])
    with pytest.raises(SettingsError, match="--track stars: expected one of tensorboard, wandb, mlflow"):
        check_trackers(["stars"])


@needs("tensorboard")
def test_tensorboard_reads_back_curves_pictures_settings_and_result(toy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert toy("--track", "tensorboard", "--seed", "3") == 0
    events = EventAccumulator("run", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"augmented", "confusion"} <= set(tags["images"])
    log = RunLog(Path("run"))
    for kind, names in track_module._CURVES.items():
        for field, tag in names.items():
            expected = [(record["step"], record[field]) for record in log.records(kind)]
            assert [(event.step, event.value) for event in events.Scalars(tag)] == [
                (step, pytest.approx(value, rel=1e-6)) for step, value in expected
            ], tag
    final = log.records("epoch")[-1]["test_accuracy_ema"]
    assert [event.value for event in events.Scalars("result/test_accuracy")] == [pytest.approx(final)]
    contents = events.summary_metadata

    def plugin(name):
        return HParamsPluginData.FromString(contents[f"_hparams_/{name}"].plugin_data.content)

    settings = plugin("session_start_info").session_start_info.hparams
    assert settings["train.seed"].number_value == 3 and settings["schedule.name"].string_value == "one_cycle"
    metrics = {metric.name.tag for metric in plugin("experiment").experiment.metric_infos}
    assert metrics == {"result/test_accuracy", "result/test_loss", "result/epochs", "result/seconds"}
    assert plugin("session_end_info").session_end_info.status == 1  # STATUS_SUCCESS


@needs("tensorboard")
def test_a_resumed_run_shows_each_step_once(toy, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = Trainer.save

    def killed(self):
        plain(self)
        if self.progress.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        assert toy("--track", "tensorboard") == 130
    assert toy("--resume", "--track", "tensorboard") == 0
    events = EventAccumulator("run")
    events.Reload()
    steps = [record["step"] for record in RunLog(Path("run")).records("interval")]
    assert [event.step for event in events.Scalars("train/loss")] == steps


@needs("wandb")
def test_wandb_offline_holds_the_run_and_goes_on_with_it(toy, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert toy("--track", "wandb", "--epochs", "1") == 0
    (folder,) = Path("run/wandb").glob("offline-run-*")
    (written,) = folder.glob("*.wandb")
    content = written.read_bytes()
    for word in (b"train/loss", b"test/accuracy_ema", b"result/test_accuracy", b"schedule.learning_rate"):
        assert word in content
    assert folder.name.endswith(Path("run/.wandb-id").read_text())
    assert list(folder.glob("files/media/images/augmented_*.png"))


@needs("mlflow")
def test_mlflow_in_a_folder_holds_the_run(toy, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    assert toy("--track", "mlflow", "--epochs", "1") == 0
    client = MlflowClient()
    kept = client.get_run(Path("run/.mlflow-id").read_text())
    epochs = RunLog(Path("run")).records("epoch")
    assert kept.info.status == "FINISHED" and kept.info.run_name == "run"
    assert kept.data.params["train.epochs"] == "1" and kept.data.params["data"] == "source"
    assert kept.data.metrics["result/test_accuracy"] == epochs[-1]["test_accuracy_ema"]
    assert "pictures/augmented.png" in [file.path for file in client.list_artifacts(kept.info.run_id, "pictures")]


def test_the_mistakes_are_the_surest_ones_with_their_classes(toy, monkeypatch):
    from rsengine import track as track_module
    from rsengine.run import mistakes as mistakes_module

    drawn, trainers = {}, []
    monkeypatch.setattr(mistakes_module.plots, "image_grid", lambda rows, path, **how: drawn.update(rows=rows, **how))
    plain = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (trainers.append(self), plain(self))[1])
    assert toy("--epochs", "1", "--set", "schedule.learning_rate=0.0001") == 0  # learns nothing, so it errs
    track_module._draw_mistakes(trainers[0], Path("mistakes.png"))
    texts = [text for row in drawn["captions"] for text in row if text]
    result = trainers[0].result["ema"]
    assert len(texts) == min(25, round(result.images * (1 - result.accuracy))) > 0
    shares = [int(text.split("\n")[0].split()[-1].rstrip("%")) for text in texts]
    assert shares == sorted(shares, reverse=True)
    assert all(text.split()[0] != text.split()[-1] for text in texts)
    assert len({images.shape for _, images in drawn["rows"]}) == 1


def test_json_has_the_result_and_nothing_else(toy, capsys):
    assert toy("--json", "--epochs", "1") == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["test_accuracy"] == RunLog(Path("run")).records("epoch")[-1]["test_accuracy_ema"]
    assert result["run"] == "run" and result["epochs"] == 1 and result["stopped_by_signal"] is None
    assert "epoch 1/1" in output.err
    assert toy("--quiet", "--epochs", "1", out="other") == 0
    assert capsys.readouterr() == ("", "")
