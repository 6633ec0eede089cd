"""The share of this machine that each trial gets: a GPU, or some of the cores."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from rsengine.processor import usable_cpus
from rsengine.study.file import StudyError
from rsengine.study.trials import Trial

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class LocalProcess:
    """A :class:`rsengine.study.runner.Process` on this machine."""

    process: subprocess.Popen[bytes]

    def ended(self) -> tuple[int, str] | None:
        if self.process.poll() is None:
            return None
        return self.process.returncode, self.process.stdout.read().decode("utf-8", "replace")

    def stop(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> None:
        self.process.wait()


@dataclass(frozen=True)
class Worker:
    """``cores``: to which the processes of its trials are bound; empty: all. ``gpu``: the only one that they see."""

    cores: tuple[int, ...] = ()
    gpu: str | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of :class:`subprocess.Popen` for a trial. It has a session of its own, so that Ctrl-C reaches this
        process alone, and on Linux gets SIGTERM when this process is killed."""
        environment = dict(os.environ)
        if self.cores:
            environment["OMP_NUM_THREADS"] = str(len(self.cores))
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        options = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
        return options | ({"preexec_fn": self._bind} if sys.platform == "linux" else {})

    def start(self, trial: Trial, data: str, device: str) -> LocalProcess:
        """Train ``trial``, or go on with it."""
        with open(trial.log, "ab") as log:
            return LocalProcess(
                subprocess.Popen(trial.command(data, device), stdout=subprocess.PIPE, stderr=log, **self.options())
            )

    def _bind(self) -> None:
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # A background job of a shell ignores Ctrl-C, a worker of Ray blocks it, and what they start would too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def share_out(count: int, device: str) -> list[Worker]:
    """``count`` >= 1 workers, each with a GPU of its own, or with as many cores as each other.

    Raises:
        StudyError: more than there are GPUs, or cores.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if count > len(gpus):
            raise StudyError(
                f"--workers {count}: expected at most {len(gpus)}, one for each GPU; add --device cpu for cores"
            )
        cores = _shares(count)
        return [Worker(cores[i], gpus[i]) for i in range(count)]
    available = len(usable_cpus())
    if count > available:
        raise StudyError(f"--workers {count}: expected at most {available}, one for each core")
    return [Worker(cores) for cores in _shares(count)]


def _shares(count: int) -> list[tuple[int, ...]]:
    cores = sorted(usable_cpus())
    each = len(cores) // count
    if count == 1 or not each or sys.platform != "linux":
        return [()] * count
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(count)]
