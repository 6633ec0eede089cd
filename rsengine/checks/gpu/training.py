"""Whole runs of recipes, started as a user starts them, and what their logs say."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rsengine.checks.gpu.candidates import CANDIDATES, VALIDATION, arguments
from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.suites import die_with_this_process, end_of, last_words
from rsengine.data import convert, find_dataset
from rsengine.data.dataset import DESCRIPTION
from rsengine.data.find import VARIABLE
from rsengine.data.sources.open import DIGITS
from rsengine.run.files import METRICS_FILE
from rsengine.run.log import EPOCH, START, accuracy
from rsengine.temporaries import temporary_folder

GOAL = 0.9119  # on CIFAR-10: the test accuracy of the report that this project grew out of
DRY_RUN = ("--set", "train.limit_train_batches=4", "--set", "train.epochs=2")
ARGUMENTS = {
    "quickstart, FFCV": ("--recipe", "quickstart", "--set", "train.loader=ffcv"),
    "quickstart, resident": ("--recipe", "quickstart", "--set", "train.loader=resident"),
    "quickstart, resident, plain steps": ("--recipe", "quickstart", "--set", "train.loader=resident", "--no-graph"),
    "speedrun, resident": ("--recipe", "speedrun", "--set", "train.loader=resident"),
} | {name: arguments(name) for name in CANDIDATES}


def measure(row: str, setup: Setup) -> dict[str, Any]:
    if importlib.util.find_spec("ffcv") is None:
        return {"left_out": "FFCV is not installed, and converting a data set needs it"}
    dry_run = () if setup.device.is_gpu else DRY_RUN
    started = time.monotonic()
    with temporary_folder("check") as folder:
        if row in CANDIDATES:
            source = os.environ.get(VARIABLE) or (DIGITS if dry_run else "")
            if not source or (Path(source) / DESCRIPTION).exists():
                return {"left_out": f"{VARIABLE} does not name a source to take a validation split of"}
            dataset = convert(source, folder / "data", validation=VALIDATION, log=setup.log)
        else:
            dataset = find_dataset("digits" if dry_run else None, fallback_digits=True, log=setup.log)
        conversion = time.monotonic() - started  # not a part of the run's time to its first step
        command = [sys.executable, "-m", "rsengine.train", *ARGUMENTS[row], "--data", str(dataset.folder)]
        command += ["--device", setup.device.device.type, *dry_run]
        out, printed = folder / "run", folder / "output"
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--out", str(out)],
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_this_process(),
            )
            end = end_of(process, started + setup.seconds)
        said = printed.read_text(errors="replace")
        setup.log(said)
        log = out / METRICS_FILE
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    wrong = [f"the run {end}: {last_words(said)}"] if end else []
    goal = GOAL if dataset.name.startswith("cifar10") and not dataset.name.startswith("cifar100") else None
    about = {"data": dataset.name, "conversion_s": round(conversion, 1)}
    about["command"] = shlex.join(["python", "-m", "rsengine.train", *ARGUMENTS[row]])
    return summary(records, goal) | about | {"wrong": wrong}


def summary(records: list[dict[str, Any]], goal: float | None) -> dict[str, Any]:
    """A summary of a run: its start, images/s and accuracy by epoch, and when it reached the accuracy ``goal``."""
    start = next((record for record in records if record["kind"] == START), {})
    epochs = [record for record in records if record["kind"] == EPOCH]
    reached = next((record for record in epochs if goal and accuracy(record) >= goal), None)
    return {
        "first_step_s": start.get("time_to_first_step"),
        "graph": start.get("graph"),
        "epochs": [record["epoch"] for record in epochs],
        "accuracy": [accuracy(record) for record in epochs],
        "images_per_second": [record["images_per_second"] for record in epochs],
        "evaluation_s": [record["eval_seconds"] for record in epochs],
        "run_seconds": epochs[-1]["seconds"] if epochs else None,  # "seconds" are the row's, conversion included
        "goal": goal,
        "seconds_to_goal": reached["seconds"] if reached else None,
    }
