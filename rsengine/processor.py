"""What the system says of the processors. The only reader of /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

LISTING = Path("/proc/cpuinfo")


def listing() -> list[dict[str, str]]:
    """The fields of each logical processor, as the system names them; none where it has no such list, as elsewhere
    than on Linux."""
    try:
        text = LISTING.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = ([line.partition(":") for line in block.splitlines()] for block in text.split("\n\n"))
    return [{name.strip(): value.strip() for name, _, value in block} for block in blocks if block]


def features() -> frozenset[str]:
    """The instruction sets that every processor has, x86 `flags` or Arm `Features`; none where the system is silent."""
    sets = [set(fields[name].split()) for fields in listing() for name in ("flags", "Features") if name in fields]
    return frozenset(set.intersection(*sets)) if sets else frozenset()
