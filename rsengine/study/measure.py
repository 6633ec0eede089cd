"""How long trials will take: a few steps of each network, by ``rsengine train --dry-run`` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rsengine.config import OptimizerSection, Recipe, ScheduleSection
from rsengine.study.file import StudyError
from rsengine.study.workers import Worker
from rsengine.temporaries import temporary_folder


class Measurement:
    """Measures recipes on ``data``, as of ``--data``, with what a ``worker`` has. Those whose steps cost the same are
    measured once."""

    def __init__(self, data: str | None, device: str, worker: Worker, say: Callable[[str], None]) -> None:
        self.data, self.device, self.worker, self.say = data, device, worker, say
        self._known: dict[Recipe, float | None] = {}

    def epoch_seconds(self, recipes: Sequence[Recipe]) -> list[float | None]:
        """Seconds of an epoch of each recipe, evaluation included; None where the data are not converted yet.

        Raises:
            StudyError: a recipe that cannot be trained here.
        """
        for recipe in recipes:
            if (key := _cost(recipe)) not in self._known:
                self.say(f"study: measuring a few steps of {recipe.name}")
                self._known[key] = _measured(recipe, self.data, self.device, self.worker)
        return [self._known[_cost(recipe)] for recipe in recipes]


def _cost(recipe: Recipe) -> Recipe:
    """``recipe`` without what changes nothing in the time of a step."""
    train = recipe.train
    epochs = train.epochs if train.start_scale < 1 else 1
    return replace(
        recipe,
        name="",
        comment="",
        model=replace(recipe.model, zero_init="last"),
        optimizer=OptimizerSection(name=recipe.optimizer.name, clip_norm=recipe.optimizer.clip_norm),
        schedule=ScheduleSection(),
        ema=replace(recipe.ema, decay=0.0, warmup=False),
        train=replace(train, epochs=epochs, seed=0, label_smoothing=0.0),
    )


def _measured(recipe: Recipe, data: str | None, device: str, worker: Worker) -> float | None:
    with temporary_folder("study") as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "rsengine.train", "--dry-run", "--json", "--device", device]
        command += ["--recipe", str(path), *(["--data", data] if data else [])]
        done = subprocess.run(command, capture_output=True, text=True, **worker.options())
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise StudyError(f"{recipe.name}: {lines[-1].removeprefix('error: ')}")
    seconds = json.loads(done.stdout)["predicted_seconds"]
    return None if seconds is None else seconds / recipe.train.epochs
