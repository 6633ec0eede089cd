"""What the system says about the processors. Nothing else reads /proc/cpuinfo and /proc/stat."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

LISTING, STATISTICS, TASKS = Path("/proc/cpuinfo"), Path("/proc/stat"), Path("/proc/self/task")
LOOKS, MOST_CORES = 30_000, 4  # see `set_waiting`; on more cores nobody has measured it


def listing() -> list[dict[str, str]]:
    """The fields of each logical processor, as the system names them; none on systems other than Linux, which have no
    such list."""
    try:
        text = LISTING.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = ([line.partition(":") for line in block.splitlines()] for block in text.split("\n\n"))
    return [{name.strip(): value.strip() for name, _, value in block} for block in blocks if block]


def features() -> frozenset[str]:
    """The instruction sets that every processor has, x86 `flags` or Arm `Features`; none if the system does not say."""
    sets = [set(fields[name].split()) for fields in listing() for name in ("flags", "Features") if name in fields]
    return frozenset(set.intersection(*sets)) if sets else frozenset()


def usable_cpus() -> set[int]:
    """The logical processors that this process may use: all there are on macOS and Windows, which know no limit."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def wanted_by_others(looks: int = 5, pause: float = 0.02) -> int:
    """How many processors other processes want: the fewest in a few looks, ``pause`` seconds apart. 0 if the system
    does not say."""
    counts = []
    for look in range(looks):
        time.sleep(pause if look else 0)
        try:
            lines = STATISTICS.read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        counts += [int(line.split()[1]) - _running() for line in lines if line.startswith("procs_running ")]
    return max(min(counts, default=0), 0)


def _running() -> int:
    """How many threads of this process run now: this one, and those of loaders."""
    count = 0
    for path in TASKS.glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended since it was listed
            count += path.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "R"
    return count


def is_busy(threads: int) -> str:
    """What to say where other processes want processors that ``threads`` threads would use; else nothing."""
    others, there = wanted_by_others(), os.cpu_count() or 1
    if not others or others + threads <= there:
        return ""
    processes = "1 other process wants" if others == 1 else f"{others} other processes want"
    return f"the machine is busy: {processes} its {there} processors, so that all takes longer"


class OtherWork:
    """How many of the processors that this process may use others have used since it was asked last, on average."""

    def __init__(self) -> None:
        self.last = self._now()

    def used(self) -> float:
        """0 if the system does not say."""
        (then, all_then, own_then), self.last = self.last, self._now()
        now, all_now, own_now = self.last
        return max(all_now - all_then - (own_now - own_then), 0.0) / max(now - then, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """The time, and how long all processes, and this one, have computed so far, in seconds."""
        usable, ticks = {f"cpu{number}" for number in usable_cpus()}, 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in STATISTICS.read_text(encoding="utf-8").splitlines():
                name, *fields = line.split()
                if name in usable:
                    ticks += sum(int(fields[i]) for i in (0, 1, 2, 5, 6))  # user, nice, system, two of interrupts
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0, time.process_time()


def set_waiting() -> None:
    """Say in the environment how often OpenMP's threads look for work before they sleep, where nobody else has.

    PyTorch's OpenMP reads it once, and has 300,000 by default. :mod:`rsengine.waiting` changes it beside other work.
    """
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    if (os.cpu_count() or 1) <= MOST_CORES and not any(name in os.environ for name in names):
        os.environ["GOMP_SPINCOUNT"] = str(LOOKS)
