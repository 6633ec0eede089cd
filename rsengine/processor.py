"""What the system says about the processors. Nothing else reads /proc/cpuinfo."""

from __future__ import annotations

import os
from pathlib import Path

LISTING = Path("/proc/cpuinfo")


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
