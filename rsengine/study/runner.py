"""Runs the trials of a study, each in a process of its own, until all have ended or a signal stops them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rsengine.run.files import CHECKPOINT_FILE
from rsengine.run.signals import stop_requests
from rsengine.study.progress import Progress
from rsengine.study.trials import DONE, ENDED, Trial

_POLL = 0.1  # seconds
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Process(Protocol):
    """A trial under way."""

    def ended(self) -> tuple[int, str] | None:
        """Its exit status, below 0 for a signal, and what it printed; None while it goes on."""

    def stop(self, number: int) -> None:
        """Send it a signal; after the first it saves and ends."""

    def wait(self) -> None:
        """Wait for its end."""


class Place(Protocol):
    """Where one trial at a time is trained."""

    def start(self, trial: Trial, data: str, device: str) -> Process: ...


def run_trials(
    trials: Sequence[Trial], data: Path, device: str, workers: Sequence[Place], source: str, progress: Progress
) -> int:
    """Train what has not ended yet, one trial a worker at a time. Trials that failed before are tried again.

    The first Ctrl-C or SIGTERM is passed on to the trials, which save, and no other is begun; a second Ctrl-C
    interrupts them at once.

    Args:
        data: the converted data set.
        source: recorded with each outcome.

    Returns:
        0, or the number of the signal that stopped the study.
    """
    before = {trial.name: trial.outcome() for trial in trials}
    ended = [trial for trial in trials if (known := before[trial.name]) is not None and known.status in ENDED]
    pending = [trial for trial in trials if trial not in ended]
    if ended:
        progress.line(f"study: {len(ended)} of {len(trials)} trials have ended before")
    free, passed_on = list(workers), False
    running: dict[Trial, tuple[Place, Process]] = {}
    with contextlib.closing(progress), stop_requests() as stop:
        try:
            while running or (pending and not stop.signal):
                while pending and free and not stop.signal:
                    trial, worker = pending.pop(0), free.pop(0)
                    resumed = (trial.folder / CHECKPOINT_FILE).is_file()
                    epochs = trial.recipe.train.epochs
                    progress.line(f"study: {'resuming' if resumed else 'training'} {trial.name}, {epochs} epochs")
                    running[trial] = worker, worker.start(trial, str(data.absolute()), device)
                if stop.signal and not passed_on:
                    for _, process in running.values():
                        process.stop(stop.signal)
                    passed_on = True
                for trial, (worker, process) in list(running.items()):
                    if (known := process.ended()) is not None:
                        del running[trial]
                        free.append(worker)
                        if _finish(trial, *known, source, progress, stopped=passed_on):
                            ended.append(trial)
                progress.show(list(running), ended)
                time.sleep(_POLL)
        finally:
            for _, process in running.values():  # an error here, or a second Ctrl-C: they have got the first one
                process.stop(signal.SIGINT)
            for _, process in running.values():
                process.wait()
        return stop.signal if len(ended) < len(trials) else 0


def _finish(trial: Trial, status: int, output: str, source: str, progress: Progress, *, stopped: bool) -> bool:
    """Record the outcome of a trial whose process has ended, unless it was stopped. Returns whether it has ended."""
    if stopped and (status in _STOPPED or -status in (signal.SIGINT, signal.SIGTERM)):
        progress.line(f"study: {trial.name} is stopped, and saved")
        return False
    outcome = trial.end(status, output, source)
    if outcome.status == DONE:
        accuracy = outcome.result.get("test_accuracy")
        known = f"test accuracy {accuracy:.2%}" if isinstance(accuracy, float) else "no test accuracy"
        progress.line(f"study: {trial.name} is done, {known}")
    else:
        progress.line(f"study: {trial.name} {outcome.status}: {outcome.why}; the others go on")
    return True
