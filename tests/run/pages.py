"""A run folder with every record, and what a page about it is made of, for the tests of pages."""

import numpy as np

from rsengine.config import Recipe
from rsengine.engine.evaluation import Evaluation
from rsengine.engine.predictions import Predictions
from rsengine.run.augmented import Examples
from rsengine.run.log import RunLog
from rsengine.run.mistakes import Mistake

HOSTILE = "<script>window.hacked=1</script>\"'&</table>"
CLASSES = ("airplane", HOSTILE, "bird & co")
MACHINE = {
    "processor": "Some CPU @ 2 GHz",
    "physical_cores": 4,
    "logical_cores": 8,
    "ram_gib": 15.6,
    "gpus": [],
    "os": "Debian GNU/Linux 12, x86_64",
    "python": "CPython 3.11.7",
}


def records(epochs=4, *, accuracy=0.8, old=False):
    """The log of a run; ``old``: without what older versions did not write."""
    start = {"kind": "start", "step": 0, "time_to_first_step": 4.25, "device": "cpu", "precision": "bf16", "threads": 2}
    start |= {"resumed": False, "machine": MACHINE, "versions": {"torch": "2.14.1", "ffcv": None}}
    start |= {"data": {"name": "toy", "identity": "a" * 64, "train_images": 900, "test_images": 300}}
    found = [start]
    for number in range(1, epochs + 1):
        for part in (0.5, 1.0):
            found.append(
                {
                    "kind": "interval",
                    "step": int(100 * (number - 1 + part)),
                    "epoch": number - 1 + part,
                    "train_loss": 2.0 / (number + part),
                    "train_accuracy": 0.5,
                    "learning_rate": 0.1 / number,
                    "images_per_second": 1000.0 + number,
                    "seconds": 60.0 * (number - 1) + 55 * part,
                    "loader_seconds": 2.5,
                    "checkpoint_seconds": 0.5,
                }
            )
        found.append(
            {
                "kind": "epoch",
                "step": 100 * number,
                "epoch": number,
                "train_loss": 2.0 / number,
                "train_accuracy": 0.5,
                "test_images": 300,
                "test_loss": 1.5 / number,
                "test_accuracy": accuracy - 0.05,
                "test_loss_ema": 1.4 / number,
                "test_accuracy_ema": accuracy - 0.1 * (epochs - number) / epochs,
                "learning_rate": 0.1 / number,
                "images_per_second": 1000.0 + number,
                "seconds": 60.0 * number,
                "epoch_seconds": 55.0,
                "eval_seconds": 5.0,
            }
        )
    if old:
        for record in found:
            for name in ("loader_seconds", "checkpoint_seconds", "test_images", "data"):
                record.pop(name, None)
    return found


def write_log(folder, found):
    log = RunLog(folder)
    for record in found:
        log.append(record)


def evaluation(classes=3, images=300, seed=0, predictions=True):
    """Of a network that is right four times of five."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    wrong = rng.random(images) < 0.2
    predicted = np.where(wrong, (labels + rng.integers(1, max(classes, 2), images)) % classes, labels)
    probability = rng.uniform(1 / classes, 1.0, images)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    each = Predictions(labels, predicted, probability, rng.uniform(0, 2, images)) if predictions else None
    return Evaluation(0.5, float((labels == predicted).mean()), matrix, each)


def arguments(classes=CLASSES, size=32, **other):
    """What ``write_page`` takes for a whole run, whose images are ``size`` pixels wide."""
    rng = np.random.default_rng(1)

    def images(number):
        return rng.integers(0, 256, (number, size, size, 3), np.uint8)

    result = evaluation(len(classes))
    found = result.predictions
    worst = [
        Mistake(int(i), images(1)[0], int(found.labels[i]), int(found.predicted[i]), float(found.probability[i]))
        for i in found.worst(25)
    ]
    labels = rng.integers(0, len(classes), 10)
    rows = [("original", images(10), []), ("epoch 1", images(10), ["rotate 12\nsolarize 3"] * 10)]
    return {
        "recipe_toml": Recipe(name=HOSTILE).with_settings(["train.epochs=4", "augment.flip=false"]).to_toml(),
        "title": f"{HOSTILE} on toy",
        "dataset_line": f"toy ({HOSTILE}), 900 training and 300 test images",
        "model_lines": ["ResNet-RS, blocks [1, 2, 2]"],
        "classes": classes,
        "notes": ["Began with the weights in `<b>x</b>`"],
        "again": ["# in this folder", "python -m rsengine.train --recipe recipe.toml --data SOURCE"],
        "planned_epochs": 4,
        "result": {"raw": result, "ema": result},
        "worst": worst,
        "examples": Examples(labels, rows),
        **other,
    }
