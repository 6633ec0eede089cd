"""Runs the trials of a study, each in a process of its own, until all have ended or a signal stops them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsengine.run.files import CHECKPOINT_FILE
from rsengine.run.signals import stop_requests
from rsengine.study.progress import Progress
from rsengine.study.trials import DONE, ENDED, Trial
from rsengine.study.workers import Worker

_POLL = 0.1  # seconds
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass
class _Running:
    """A trial with its process, on a worker."""

    trial: Trial
    worker: Worker
    process: subprocess.Popen[bytes]


def run_trials(
    trials: Sequence[Trial], data: Path, device: str, workers: Sequence[Worker], source: str, progress: Progress
) -> int:
    """Train what has not ended yet, one trial a worker. Trials that failed before are tried again.

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
    free, running, passed_on = list(workers), [], False
    with contextlib.closing(progress), stop_requests() as stop:
        try:
            while running or (pending and not stop.signal):
                while pending and free and not stop.signal:
                    running.append(_start(pending.pop(0), free.pop(0), data, device, progress))
                if stop.signal and not passed_on:
                    for each in running:
                        each.process.send_signal(stop.signal)
                    passed_on = True
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    free.append(each.worker)
                    if _finish(each, source, progress, stopped=passed_on):
                        ended.append(each.trial)
                progress.show([each.trial for each in running], ended)
                time.sleep(_POLL)
        finally:
            for each in running:  # an error here, or a second Ctrl-C: they have got the first one
                each.process.send_signal(signal.SIGINT)
            for each in running:
                each.process.wait()
        return stop.signal if len(ended) < len(trials) else 0


def _start(trial: Trial, worker: Worker, data: Path, device: str, progress: Progress) -> _Running:
    resumed = (trial.folder / CHECKPOINT_FILE).is_file()
    progress.line(f"study: {'resuming' if resumed else 'training'} {trial.name}, {trial.recipe.train.epochs} epochs")
    with open(trial.log, "ab") as log:
        process = subprocess.Popen(
            trial.command(str(data.absolute()), device), stdout=subprocess.PIPE, stderr=log, **worker.options()
        )
    return _Running(trial, worker, process)


def _finish(each: _Running, source: str, progress: Progress, *, stopped: bool) -> bool:
    """Record the outcome of a trial whose process has ended, unless it was stopped. Returns whether it has ended."""
    output = each.process.stdout.read().decode("utf-8", "replace")
    status = each.process.returncode
    if stopped and (status in _STOPPED or -status in (signal.SIGINT, signal.SIGTERM)):
        progress.line(f"study: {each.trial.name} is stopped, and saved")
        return False
    outcome = each.trial.end(status, output, source)
    if outcome.status == DONE:
        accuracy = outcome.result.get("test_accuracy")
        known = f"test accuracy {accuracy:.2%}" if isinstance(accuracy, float) else "no test accuracy"
        progress.line(f"study: {each.trial.name} is done, {known}")
    else:
        progress.line(f"study: {each.trial.name} {outcome.status}: {outcome.why}; the others go on")
    return True
