"""``--processes N``: one run in several processes of this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from rsengine.data.errors import UserError
from rsengine.errors import SettingsError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

AUTO = "auto"
LAUNCHED = "RSENGINE_LAUNCHED"  # a variable of the processes that launch() starts: their number


class KilledError(UserError):
    """A process of the run was killed."""

    status = 1


def processes(text: str) -> int | str:
    """A value of ``--processes``. Raises ``argparse.ArgumentTypeError``."""
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, or {AUTO}; got {text!r}")
    return int(text)


def launch(count: int | str, argv: Sequence[str]) -> int:
    """Run ``python -m rsengine.train`` with ``argv`` in ``count`` processes.

    On the CPU each has its share of the cores, to which it is bound, and a thread for each of them.

    Returns:
        The exit status of the command.

    Raises:
        KilledError: a process was killed by a signal that nobody here sent.
    """
    # Imported here, because one process needs none of it.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "RANK" in os.environ:
        raise SettingsError("--processes: torchrun has started several processes already; leave it out")
    count = _fastest() if count == AUTO else int(count)
    os.environ[LAUNCHED] = str(count)
    logging.disable()  # of the agent's warnings, the processes or the lines below say what the user has to know
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="rsengine",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    command = [sys.executable, "-m", "rsengine.train", *argv]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return _status(error)
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def is_launched() -> bool:
    """Whether :func:`launch` has started this process."""
    return LAUNCHED in os.environ


def is_watched() -> bool:
    """Whether an agent that the user started, torchrun, watches this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and not is_launched()


@contextlib.contextmanager
def only_main_prints(*, errors: bool = False) -> Iterator[None]:
    """In this block only the process of rank 0 prints to standard output, and with ``errors`` to standard error."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        if not errors:
            yield
            return
        with contextlib.redirect_stderr(nowhere):
            yield


def bind_to_cores() -> None:
    """In a process that :func:`launch` has started: bind it to its share of the cores, with a thread for each."""
    if not is_launched() or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    count, rank = int(os.environ[LAUNCHED]), int(os.environ["LOCAL_RANK"])
    each = len(cores) // count
    if each:  # with more processes than cores the system shares them out
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])
    torch.set_num_threads(max(each, 1))


def _fastest() -> int:
    """The number of processes that ``auto`` takes: one a GPU, or one a core, as measured in ``docs/distributed.md``."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _status(error: ChildFailedError) -> int:
    """The exit status of a run whose processes ended otherwise than with 0, of which one has said why."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        raise KilledError(
            f"the process of rank {rank} (process {failure.pid}) was ended by {name}, and so the run; what the last "
            "checkpoint holds is kept: go on with the same command and --resume --out FOLDER"
        )
    return failure.exitcode
