"""Studies for the tests: tiny ones on the digits, and folders with trials that were never trained."""

import json
from pathlib import Path

from rsengine.data import Dataset
from rsengine.run.files import METRICS_FILE
from rsengine.study.file import parse_study
from rsengine.study.manifest import open_manifest
from rsengine.study.trials import Trial
from tests.run.pages import records, write_log

TINY = """
base = "digits"
data = "digits"
seeds = 1
[set]
model = {blocks = [1, 1], width_multiplier = 0.125, stem_width = 8}
augment = {policy = "randaugment"}
train = {epochs = 4, limit_train_batches = 6, batch_size = 32, eval_batch_size = 60, log_interval = 1}
[variants.plain]
[variants.smooth]
train.label_smoothing = 0.3
[variants.wild]
schedule.learning_rate = 100.0
optimizer = {momentum = 0.999, weight_decay = 1.0}
"""
DATASET = Dataset(
    folder=Path("data"),
    name="toy",
    classes=("a", "b"),
    train_count=900,
    test_count=300,
    class_counts={},
    image_size=(32, 32),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    checksum="",
    source="",
    identity="a" * 64,
)


def silent(line):
    """A say() that says nothing."""


def opened(folder, text, dataset=DATASET, say=silent, **options):
    """The manifest of the study in ``text``, in ``folder``, at the epochs of its recipes."""
    study = parse_study(text, "mine.toml", Path())
    recipes = {variant.name: variant.recipe for variant in study.variants}
    options = {"accept_code": False} | options
    return open_manifest(folder, study, dataset, lambda: recipes, say=say, **options)


def done(trial: Trial, accuracy: float, ece: float = 0.05, source: str = "code", epochs: int = 4):
    """Have ``trial`` be done with this accuracy of the EMA; that of the raw weights is 5 points lower."""
    if not (trial.folder / METRICS_FILE).exists():
        write_log(trial.folder, records(epochs, accuracy=accuracy))
    result = {"test_accuracy": accuracy, "calibration": {"ece": ece, "brier": 0.3}}
    return trial.end(0, json.dumps(result), source)
