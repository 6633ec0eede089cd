"""Curves where people look at them already: ``--track tensorboard``, ``wandb`` or ``mlflow``.

One module each behind one interface, imported only when asked for. A tracker that fails is left out with one line, and
the run goes on. What is tracked is what the run folder holds too, so nothing is lost with a tracker.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rsengine.errors import SettingsError
from rsengine.run.files import AUGMENTED_FILE, CONFUSION_FILE
from rsengine.run.lettering import labels_said
from rsengine.run.log import EPOCH, INTERVAL
from rsengine.run.mistakes import MISTAKES_FILE, draw_mistakes, mistakes_of

if TYPE_CHECKING:
    from rsengine.config import Recipe
    from rsengine.data import Dataset

TRACKERS = ("tensorboard", "wandb", "mlflow")

# Names under which fields of the run's log are tracked: by kind of record.
_CURVES = {
    INTERVAL: {
        "train_loss": "train/loss",
        "train_accuracy": "train/accuracy",
        "learning_rate": "train/learning_rate",
        "images_per_second": "time/images_per_second",
    },
    EPOCH: {
        "test_loss": "test/loss",
        "test_accuracy": "test/accuracy",
        "test_loss_ema": "test/loss_ema",
        "test_accuracy_ema": "test/accuracy_ema",
        "epoch_seconds": "time/epoch_seconds",
        "eval_seconds": "time/eval_seconds",
        "epoch": "epoch",
    },
}
_RESULTS = ("test_accuracy", "test_loss", "epochs", "seconds")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: the run folder, which exists.
        settings: every setting of the recipe by ``section.key``, lists as text, and the data set's name as ``data``.
        step: optimiser steps done; more than 0 where the run is resumed.
    """

    folder: Path
    settings: Mapping[str, bool | int | float | str]
    step: int = 0
    results: Sequence[str] = field(default=tuple(f"result/{name}" for name in _RESULTS))

    @property
    def name(self) -> str:
        return self.folder.absolute().name


class Tracker(Protocol):
    """Where a run is followed. Every method may raise anything: :class:`Tracking` then goes on without it."""

    def begin(self, run: TrackedRun) -> None:
        """Open a new run there, or go on with the same one where ``run.step`` is not 0."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers by name, after ``step`` optimiser steps."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG, which may be gone when this returns."""

    def finish(self, result: Mapping[str, float], completed: bool) -> None:
        """The last call, with the names of ``run.results``: fewer where the run was not ``completed``."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`SettingsError` for a name that is no tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"--track {name}: expected one of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise SettingsError(f"--track {name}: {name} is not installed; pip install 'rsengine[{name}]'")


def open_tracking(
    names: Sequence[str], out: Path, recipe: Recipe, dataset: Dataset, step: int, say: Callable[[str], None]
) -> Tracking:
    """Begin to follow a run with the trackers ``names``. Those that fail are left out, with a line to ``say``."""
    tracking = Tracking({}, say)
    settings = {key: str(value) if isinstance(value, list) else value for key, value in recipe.flat().items()}
    run = TrackedRun(out, {**settings, "data": dataset.name}, step)
    for name in dict.fromkeys(names):
        with tracking.guarded(name):
            tracker: Tracker = importlib.import_module(f"rsengine.track.{name}_tracker").make()
            tracker.begin(run)
            tracking.trackers[name] = tracker
    return tracking


class Tracking:
    """Hands what a run logs to its trackers, by name, and survives them."""

    def __init__(self, trackers: dict[str, Tracker], say: Callable[[str], None]) -> None:
        self.trackers, self.say = trackers, say

    def guarded(self, name: str) -> _Guard:
        """In this block, an exception ends the tracker ``name`` in one line and nothing else."""
        return _Guard(self, name)

    def record(self, record: Mapping[str, Any]) -> None:
        """One record of the run's log."""
        names = _CURVES.get(record["kind"], {})
        values = {name: record[key] for key, name in names.items() if record.get(key) is not None}
        self._each(lambda tracker: tracker.scalars(_finite(values), record["step"]))

    def finish(self, summary: Mapping[str, Any], trainer: Any) -> None:
        """The pictures of the run folder and the mistakes, then the result.

        Args:
            summary: as :meth:`rsengine.training.Outcome.summary` gives it.
            trainer: the :class:`rsengine.trainer.Trainer`, which has the network and the test set.
        """
        if not self.trackers:
            return
        completed, step = not summary["stopped_by_signal"], trainer.steps_done
        for file in (AUGMENTED_FILE, CONFUSION_FILE):
            self._picture(file.removesuffix(".png"), trainer.out / file, step)
        if completed and self.trackers:
            with tempfile.TemporaryDirectory(prefix="rsengine-") as folder:
                path = Path(folder) / MISTAKES_FILE
                with self.guarded("mistakes"):
                    _draw_mistakes(trainer, path)
                self._picture("mistakes", path, step)
        values = {f"result/{key}": summary[key] for key in _RESULTS if summary[key] is not None}
        self._each(lambda tracker: tracker.finish(_finite(values), completed))
        self.trackers.clear()

    def close(self) -> None:
        """End the trackers of a run that failed; nothing after :meth:`finish`."""
        self._each(lambda tracker: tracker.finish({}, False))
        self.trackers.clear()

    def _picture(self, name: str, path: Path, step: int) -> None:
        if path.exists():
            self._each(lambda tracker: tracker.picture(name, path, step))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self.guarded(name):
                act(tracker)


def _draw_mistakes(trainer: Any, path: Path) -> None:
    """The picture of the result's mistakes, if there are any."""
    found = mistakes_of(trainer.dataset, trainer.result.get("ema") or trainer.result["raw"])
    if found:
        labels = labels_said(trainer.dataset.classes, lambda _line: None)  # said already, with the other pictures
        draw_mistakes(found, labels, path, title=f"{trainer.recipe.name} on {trainer.dataset.name}: mistakes")


class _Guard:
    """A context manager, not a generator: it must not swallow what ends the process."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self.tracking, self.name = tracking, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.tracking.trackers.pop(self.name, None)
        why = " ".join(f"{type(error).__name__}: {error}".split())
        self.tracking.say(f"track: {self.name} failed ({why}); the run goes on without it")
        return True


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
