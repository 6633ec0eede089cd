"""Writing measured tables into the documents under docs/."""

from __future__ import annotations

from pathlib import Path


def write_section(document: Path, heading: str, section: str, until: str | None = None) -> None:
    """Put ``section``, which begins with ``heading``, in place of what stands from that heading to the end.

    With ``until``, a later heading, what stands from there on is kept.
    """
    before, _, rest = f"\n{document.read_text(encoding='utf-8')}".partition(f"\n{heading}\n")
    after = "" if until is None else "".join(rest.partition(f"\n{until}\n")[1:])
    document.write_text(f"{before.strip()}\n\n{section}{after}", encoding="utf-8")
