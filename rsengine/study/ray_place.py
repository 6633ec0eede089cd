"""Trials on a Ray cluster: one task a trial, which Ray runs again on another node when its node dies.

The study's folder and the data are shared by all nodes under one path. A task trains as a trial does on one machine, in
a process of its own, so a task that is run again goes on from the checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsengine.study.file import StudyError
from rsengine.study.runner import Place
from rsengine.study.trials import Trial
from rsengine.study.workers import LocalProcess, Worker

RETRIES = 20  # of a task whose node died
_HELD = "is writing this run"  # of :func:`rsengine.run.folder.locked`
_STOPPED = 128 + signal.SIGINT
_POLL = 0.2  # seconds
_PATIENCE = 600.0  # seconds for which what is left of a dead node may hold a run


@dataclass(frozen=True)
class RayProcess:
    """A :class:`rsengine.study.runner.Process` that is a task of Ray.

    It is stopped by a file beside the trial, which its task looks for: Ray's own way ends a task, or interrupts it, but
    tells it no signal.
    """

    task: Any
    trial: Trial

    def ended(self) -> tuple[int, str] | None:
        import ray

        if not ray.wait([self.task], timeout=0)[0]:
            return None
        try:
            return ray.get(self.task)
        except ray.exceptions.RayError as error:
            return 1, str(error).strip().splitlines()[-1]

    def stop(self, number: int) -> None:
        _stop_file(self.trial).touch()

    def wait(self) -> None:
        import ray

        ray.wait([self.task])


@dataclass(frozen=True)
class RayPlace:
    """Room for one trial in the cluster; which node that is, Ray decides."""

    train: Callable[..., Any]

    def start(self, trial: Trial, data: str, device: str) -> RayProcess:
        _stop_file(trial).unlink(missing_ok=True)  # of a study that was stopped before
        return RayProcess(self.train(trial, data, device), trial)


def connect(address: str, workers: int, device: str, say: Callable[[str], None]) -> list[Place]:
    """Connect to the cluster at ``address``; empty: to the one that is known here, or to a new one on this machine.

    Args:
        workers: trials at a time on the node with the fewest cores, which share them.

    Returns:
        As many places as trials that the cluster has room for.

    Raises:
        StudyError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise StudyError("--on ray: Ray is not installed; `pip install 'rsengine[ray]'` brings it") from error
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or "the default address"
        raise StudyError(f"--on ray: no cluster at {where} ({str(error).splitlines()[0][:200]})") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = min(int(node.get("CPU", 0)) for node in nodes)
    if workers > cores:
        raise StudyError(f"--workers {workers}: expected at most {cores}, the cores of the smallest node")
    each = cores // workers
    has_gpus = device != "cpu" and any(node.get("GPU") for node in nodes)
    options = {"num_cpus": each, "num_gpus": 1 if has_gpus else 0, "max_retries": RETRIES}
    room = sum(int(min(node.get("CPU", 0) // each, node.get("GPU", 0) if has_gpus else 1e9)) for node in nodes)
    say(f"study: Ray has {len(nodes)} nodes, with room for {room} trials of {each} cores{' and a GPU' * has_gpus}")
    task = ray.remote(**options)(_train)
    return [RayPlace(lambda trial, data, device: task.remote(trial, data, device, each))] * room


def _train(trial: Trial, data: str, device: str, threads: int) -> tuple[int, str]:
    """Train ``trial`` on the node of the task. Returns the exit status and what was printed."""
    deadline, stop = time.monotonic() + _PATIENCE, _stop_file(trial)
    options = Worker().options()
    options["env"]["OMP_NUM_THREADS"] = str(threads)
    while not stop.exists():
        with open(trial.log, "ab") as log:
            process = subprocess.Popen(trial.command(data, device), stdout=subprocess.PIPE, stderr=log, **options)
        status, output = _followed(LocalProcess(process), stop)
        lines = trial.log.read_text("utf-8", errors="replace").rstrip().split("\n")
        if status != 2 or _HELD not in lines[-1] or time.monotonic() > deadline:
            return status, output
        time.sleep(1.0)
    return _STOPPED, ""


def _followed(process: LocalProcess, stop: Path) -> tuple[int, str]:
    """Wait for the end of a trial, and have it save and end once there is a file ``stop``."""
    is_told = False
    while (known := process.ended()) is None:
        if not is_told and stop.exists():
            process.stop(signal.SIGINT)
            is_told = True
        time.sleep(_POLL)
    return known


def _stop_file(trial: Trial) -> Path:
    return trial.log.with_suffix(".stop")
