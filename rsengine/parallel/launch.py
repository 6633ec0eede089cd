"""``--processes N``: one run in several processes of this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil
import torch

from rsengine.data.errors import UserError
from rsengine.parallel.ranks import CONSEQUENCE, LAUNCHED
from rsengine.temporaries import temporary_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

AUTO = "auto"
# What each process runs. Until its loop listens, Ctrl-C ends it without a word: the launcher has that word.
_WORK = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from rsengine.parallel.launch import end_process; from rsengine.train import main; end_process(main)"
)
_STOPPED = "stopped"  # a file in the launcher's folder, with the exit status of a run that a signal stopped
_PATIENCE = 600  # seconds that a stop may take: a step, or an evaluation, and saving


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

    Ctrl-C, SIGTERM and SIGHUP are passed on to them; a second one kills them.

    Returns:
        The exit status of the command.

    Raises:
        KilledError: a process was killed by a signal that nobody here sent.
    """
    # Imported here, because one process needs none of it.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    count = _fastest() if count == AUTO else int(count)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    logging.disable()  # of the agent's warnings, the processes or the lines below say what the user has to know
    with temporary_folder("launch") as folder:
        os.environ[LAUNCHED] = str(folder)
        stopped = folder / _STOPPED
        try:
            with _signals():
                elastic_launch(_config(count, folder), sys.executable)("-c", _WORK, *argv)
        except ChildFailedError as error:
            return _status(error)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT and not stopped.exists():
                print("interrupted", file=sys.stderr)
            return 128 + stop.sigval
        finally:
            del os.environ[LAUNCHED]
        return int(stopped.read_text()) if stopped.exists() else 0


def is_launched() -> bool:
    """Whether :func:`launch` has started this process."""
    return LAUNCHED in os.environ


def status_of_stop(number: int) -> int:
    """The exit status of this process when the signal ``number`` has stopped the run, and all is saved.

    An agent takes any other than 0 for a failure: it would end the processes that still write, or start all of them
    again. The launcher is told the status of the run otherwise.
    """
    if is_launched() and os.environ["RANK"] == "0":
        Path(os.environ[LAUNCHED], _STOPPED).write_text(str(128 + number))
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + number


def end_with_launcher() -> None:
    """In a process that :func:`launch` has started: stop as by SIGTERM when the launcher is killed. Linux alone can."""
    if is_launched() and sys.platform == "linux":
        set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run the command ``main`` and end this process with its exit status.

    One of several processes ends without undoing what PyTorch's C++ holds: gloo's threads, which see the others end at
    the same moment, abort it now and then on a busy machine, and the run would count as failed.
    """
    if "RANK" not in os.environ:
        sys.exit(main())
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
    count, rank = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    each = len(cores) // count
    if each:  # with more processes than cores the system shares them out
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])
    torch.set_num_threads(max(each, 1))


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """In this block a signal ends the agent's watch, so that it passes the signal on and waits for the processes; the
    next one kills them. The agent's own handler would wait once more then, and would not heed nohup."""
    from torch.distributed.elastic.multiprocessing import SignalException

    received: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException("passed on", signal.Signals(number))
        for process in psutil.Process().children():
            process.kill()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _config(count: int, folder: Path) -> LaunchConfig:
    """How torchrun's agent starts ``count`` processes once, on this machine. What it writes goes into ``folder``."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="rsengine",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="",  # see _signals
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )


def _fastest() -> int:
    """The number of processes that ``auto`` takes: one a GPU, or one a core, as measured in ``docs/distributed.md``."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _status(error: ChildFailedError) -> int:
    """The exit status of a run whose processes ended otherwise than with 0: of the one that has said why, if any has.

    The agent ends the others by SIGTERM, and by SIGKILL after half a minute.
    """
    failures = error.failures
    said = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    if causes := [status for status in said if status != CONSEQUENCE]:
        return causes[0]
    killed = [rank for rank, failure in failures.items() if failure.exitcode < 0]
    if not killed:
        return CONSEQUENCE
    rank = min(killed, key=lambda rank: (failures[rank].exitcode == -signal.SIGTERM, failures[rank].timestamp))
    name = signal.Signals(-failures[rank].exitcode).name
    raise KilledError(
        f"the process of rank {rank} (process {failures[rank].pid}) was ended by {name}, and so the run; what the last "
        "checkpoint holds is kept: go on with the same command and --resume --out FOLDER"
    )
